"""Wall time of a sweep on one stream, against its parts: one pass of the model and each SAE's steps measured alone.

python benchmarks/sweep.py                        # the tiny sweep's 12 SAEs, 60 steps: about 6 minutes on 2 cores
python benchmarks/sweep.py --sweep gpt2 --device cuda
"""

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import torch
from timing import floor_step, interleaved, machine, median, print_table, synchronise, write_json
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where this file runs as a script

from activation_store import ActivationsStore
from config import SWEEPS
from language_model import check_model, load_model
from sae import build_sae
from training import Trainer


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
    seconds: dict[str, list[float]] = {"sweep": [], "model alone": [], "steps alone": []}
    for _ in range(options.repeats):
        seconds["sweep"].append(run(options, cfgs, ActivationsStore(model, cfgs), device))
        seconds["model alone"].append(run(options, [], ActivationsStore(model, cfgs), device))
        recorded = ActivationsStore(model, cfgs)
        batches = [recorded.next_batch()[cfgs[0].hook_name] for _ in range(options.steps)]
        seconds["steps alone"].append(sum(train_alone(cfg, batches, device) for cfg in cfgs))
    floors = {str(i): floor_step(batches[0], cfg.dict_size, torch.float32) for i, cfg in enumerate(cfgs)}
    floor = options.steps * sum(map(median, interleaved(floors, options.repeats, device).values()))
    sweep, parts = median(seconds["sweep"]), median(seconds["model alone"]) + median(seconds["steps alone"])
    rows = [{"": name, "s": f"{median(times):.2f}"} for name, times in seconds.items()]
    rows += [{"": "sweep / parts", "s": f"{sweep / parts:.3f}"}, {"": "floor / sweep", "s": f"{floor / sweep:.3f}"}]
    print_table(rows)
    write_json(options.json, {"machine": where, "seconds": seconds, "floor": floor})


def run(options: Namespace, cfgs: list, store: ActivationsStore, device: torch.device) -> float:
    """Time the loop over the stream, the first batch (which fills the buffer) included."""
    trainers = [Trainer(build_sae(cfg)) for cfg in cfgs]
    start = time.perf_counter()
    for step in range(options.steps):
        rows = store.next_batch()
        for trainer in trainers:
            trainer.step(rows[trainer.cfg.hook_name], step)
    synchronise(device)
    return time.perf_counter() - start


def train_alone(cfg, batches: list[torch.Tensor], device: torch.device) -> float:
    trainer = Trainer(build_sae(cfg))
    start = time.perf_counter()
    for step, x in enumerate(batches):
        trainer.step(x, step)
    synchronise(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(parse())
