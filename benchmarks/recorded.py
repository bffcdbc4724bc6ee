"""What reading recorded activations costs, beside the training step that they are read for.

    python benchmarks/recorded.py                     # a TopK SAE of GPT-2's sizes: 2 GB on the disk, about 2 minutes

Random rows in bfloat16 are written to a folder and served by a TensorStore, in turn with steps on them. The time of a
read is a mean, as most batches come from the buffer and some wait for half of it to be read; that of a step a median.
"""

import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import interleaved, machine, median, spread

from activation_store import TensorStore
from config import Config
from sae import build_sae
from training import Trainer

FILES, ROWS_IN_FILE = 10, 1 << 17


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--act-size", type=int, default=768)
    parser.add_argument("--dict-size", type=int, default=12288)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=96)
    return parser.parse_args()


def main(options: Namespace, folder: Path) -> None:
    cfg = Config(
        act_size=options.act_size, dict_size=options.dict_size, sae_type="topk", batch_size=options.batch_size,
        num_tokens=10**9, dtype="bfloat16", device=options.device,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    for number in range(FILES):
        rows = torch.randn(ROWS_IN_FILE, options.act_size, generator=rng).bfloat16()
        save_file({cfg.hook_name: rows}, folder / f"{number}.safetensors")
    store, trainer, served = TensorStore(folder, cfgs=[cfg]), Trainer(build_sae(cfg)), []

    def read() -> None:
        served.append(store.next_batch()[cfg.hook_name])

    def step() -> None:
        trainer.step(served.pop(), trainer.steps)

    seconds = interleaved({"read": read, "step": step}, options.repeats, cfg.torch_device)
    reading = sum(seconds["read"]) / options.repeats
    print(machine(cfg.torch_device))
    print(f"a step takes {spread(seconds['step'])} ms, reading its {cfg.batch_size:,} rows {reading * 1e3:.1f} ms")
    print(f"reading costs {reading / median(seconds['step']):.1%} of a step")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(parse(), Path(temporary))
