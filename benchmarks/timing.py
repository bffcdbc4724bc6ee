"""What the benchmarks share: the floor of a step, interleaved timing, the machine's name, tables."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where a benchmark runs as a script


def floor_step(x: Float[Tensor, "batch act_size"], dict_size: int, product_dtype: torch.dtype) -> Callable[[], None]:
    """Prepare the least that a training step can cost, ready to be run and timed on x.

    One encoder product into a reused buffer and one fused Adam step over matrices of the size of W_enc and W_dec: no
    step that trains all of both does without them.
    """
    encoder, decoder = (x.new_ones(dict_size, x.shape[1], dtype=torch.float32) for _ in range(2))
    for matrix in (encoder, decoder):
        matrix.grad = torch.ones_like(matrix)
    adam = torch.optim.Adam([encoder, decoder], fused=True)
    x = x.to(product_dtype)
    product = x.new_empty(len(x), dict_size)

    def run() -> None:
        torch.mm(x, encoder.to(product_dtype).t(), out=product)
        adam.step()

    return run


def synchronise(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """Say in one line where the figures come from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
        name = (
            f"{models[0].split(':')[1].strip() if models else platform.processor()}, {torch.get_num_threads()} threads"
        )
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def interleaved(
    contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each contender, `repeats` times, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-1, repeats):
        for name, run in contenders.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def spread(seconds: list[float]) -> str:
    """Write median and range in milliseconds."""
    return f"{median(seconds) * 1e3:.0f} ({min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f})"


def print_table(rows: list[dict[str, str]]) -> None:
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].rjust(width) for key, width in widths.items()))


def write_json(path: Path | None, result: object) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2))
