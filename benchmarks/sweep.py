"""Wall time of a sweep on one stream, against its parts: one pass of the model and each SAE's steps measured alone.

python benchmarks/sweep.py                        # the tiny sweep's 12 SAEs, 60 steps: about 6 minutes on 2 cores
python benchmarks/sweep.py --sweep gpt2 --device cuda
"""

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from timing import machine, median, print_table, write_json
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where this file runs as a script

from activation_store import ActivationsStore, check_model, load_model
from config import SWEEPS
from sae import build_sae
from training import Trainer, synchronise


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=SWEEPS, default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the figures, in seconds")
    return parser.parse_args()


def main(options: Namespace) -> None:
    disable_progress_bar()
    device = torch.device(options.device)
    where = machine(device)
    cfgs = [check_model(replace(cfg, device=options.device)) for cfg in SWEEPS[options.sweep]()]
    print(
        f"{where}\nsweep {options.sweep}: {len(cfgs)} SAEs, {options.steps} steps of {cfgs[0].batch_size} activations"
    )
    model = load_model(cfgs[0])
    seconds: dict[str, list[float]] = {"sweep": [], "model alone": [], "steps alone": [], "sweep waits for text": []}
    for _ in range(options.repeats):
        store = ActivationsStore(model, cfgs[0])
        waits: list[float] = []
        store._token_batches = timed(store._token_batches, waits)
        seconds["sweep"].append(run(options, cfgs, store, device))
        seconds["sweep waits for text"].append(sum(waits[1:]))  # nothing can be done before the first
        seconds["model alone"].append(run(options, [], ActivationsStore(model, cfgs[0]), device))
        recorded = ActivationsStore(model, cfgs[0])
        batches = [recorded.next_batch() for _ in range(options.steps)]
        seconds["steps alone"].append(sum(train_alone(cfg, batches, device) for cfg in cfgs))
    parts = median(seconds["model alone"]) + median(seconds["steps alone"])
    rows = [{"": name, "s": f"{median(times):.2f}"} for name, times in seconds.items()]
    print_table([*rows, {"": "sweep / parts", "s": f"{median(seconds['sweep']) / parts:.3f}"}])
    write_json(options.json, {"machine": where, "seconds": seconds})


def timed(batches: Iterator[torch.Tensor], waits: list[float]) -> Iterator[torch.Tensor]:
    """The same batches; the seconds that each was waited for go to `waits`."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        yield batch


def run(options: Namespace, cfgs: list, store: ActivationsStore, device: torch.device) -> float:
    """Seconds of the loop over the stream, the first batch (which fills the buffer) included."""
    trainers = [Trainer(build_sae(cfg).train()) for cfg in cfgs]
    start = time.perf_counter()
    for step in range(options.steps):
        x = store.next_batch()
        for trainer in trainers:
            if step == 0:
                trainer.sae.initialise_from(x)
            trainer.step(x, step)
    synchronise(device)
    return time.perf_counter() - start


def train_alone(cfg, batches: list[torch.Tensor], device: torch.device) -> float:
    trainer = Trainer(build_sae(cfg).train())
    trainer.sae.initialise_from(batches[0])
    start = time.perf_counter()
    for step, x in enumerate(batches):
        trainer.step(x, step)
    synchronise(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(parse())
