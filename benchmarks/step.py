"""Time and memory of one training step, against the least it can cost and against other libraries.

    python benchmarks/step.py                                    # 2 cores: about 3 minutes
    python benchmarks/step.py --dict-size 98304 --sae-type topk  # each row takes 2.4 GB
    python benchmarks/step.py --device cuda --batch-size 4096 --json step.json

The floor is one encoder product into a reused buffer and one fused Adam step over W_enc and W_dec: no step that trains
all of both can do without them. The dense reference is the same SAE with ordinary autograd over [batch, dict_size].
Contenders run in turn in one process; a row gives the median and the range. Peak memory is what a step needs beyond
parameters, gradients and Adam's state, in a process of its own.
"""

import itertools
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from timing import floor_step, interleaved, machine, median, print_table, spread, write_json
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where this file runs as a script

from config import TYPES, Config
from sae import PenalisedAutoencoder, build_sae
from training import Trainer

L0 = 64  # of Vanilla and JumpReLU
DEAD_SHARE = 0.1
DEAD_POSITIVE = 0.04  # of the dead latents' pre-activations; on tiny-lm 0.45 when the first die, 0.02 soon after


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    types, flag = tuple(TYPES), BooleanOptionalAction
    parser.add_argument("--sae-type", nargs="+", choices=types, default=types)
    parser.add_argument("--act-size", type=int, default=768)
    parser.add_argument("--dict-size", type=int, nargs="+", default=[12288])
    parser.add_argument("--target-l0", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--product-dtype", nargs="+", choices=dtypes, default=dtypes, help="of our steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--auxk", action=flag, default=True, help="also TopK and BatchTopK with a tenth dead")
    parser.add_argument("--dense", action=flag, default=True, help="also the dense reference, in float32")
    parser.add_argument("--peers", action=flag, default=True, help="also the installed of requirements-bench.txt")
    parser.add_argument("--memory", action=flag, default=True)
    parser.add_argument("--json", type=Path, help="file for the figures, in seconds and bytes")
    parser.add_argument("--measure-memory", choices=types, help=SUPPRESS)  # in a process of its own: of one step
    return parser.parse_args()


def config(options: Namespace, sae_type: str, dict_size: int, product_dtype: str = "float32") -> Config:
    return Config(
        sae_type=sae_type, act_size=options.act_size, dict_size=dict_size, target_l0=options.target_l0,
        device=options.device, batch_size=options.batch_size, num_tokens=1000 * options.batch_size, lr=1e-6,
        l1_coeff=1e-3, top_k_aux=512, product_dtype=product_dtype, dead_after_tokens=10**12,
    )  # fmt: skip


def activations(options: Namespace) -> list[Tensor]:
    """Make batches with the structure SAEs look for: sums of a few of many directions, and noise."""
    rng = torch.Generator().manual_seed(1)  # not the seed of the latents, which would then be the directions
    directions = torch.randn(4 * options.act_size, options.act_size, generator=rng) / options.act_size**0.5
    batches = []
    for _ in range(3):
        chosen = torch.randint(len(directions), (options.batch_size, 16), generator=rng)
        weights = torch.rand(options.batch_size, 16, 1, generator=rng) * 4
        x = (directions[chosen] * weights).sum(dim=1)
        batches.append((x + 0.1 * torch.randn(x.shape, generator=rng)).to(options.device))
    return batches


def trainer(cfg: Config, x: Tensor, dead_share: float = 0.0) -> Trainer:
    """Make an SAE, ready to train, whose Vanilla or JumpReLU latents fire L0 times a row."""
    sae = build_sae(cfg).train()
    sae.initialise_from(x)
    with torch.no_grad():
        if isinstance(sae, PenalisedAutoencoder):
            sae.meet(x, L0)
        if dead_share:  # small weights, so that they stay out of the k largest
            dead = slice(0, int(dead_share * cfg.dict_size))
            sae.W_enc[:, dead] *= 0.01
            pre = (x[:64] - sae.b_dec) @ sae.W_enc[:, dead]
            sae.b_enc[dead] -= pre.flatten().topk(int(DEAD_POSITIVE * pre.numel())).values[-1]
            sae.tokens_since_fired[dead] = 2 * 10**12
    return Trainer(sae)


@torch.no_grad()
def dense(of: Trainer, x: Tensor) -> Trainer:
    """Make the same step with ordinary autograd over [batch, dict_size]; BatchTopK keeps as many by a threshold."""
    of.sae.select = lambda centred: None
    if "threshold" in dict(of.sae.named_buffers()):
        sample = ((x[:64] - of.sae.b_dec) @ of.sae.W_enc + of.sae.b_enc).flatten()
        of.sae.threshold.fill_(sample.topk(64 * of.cfg.target_l0).values[-1])
    return of


def our_step(of: Trainer, batch: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        of.step(batch(), 500)

    return run


def benchmark(options: Namespace, dict_size: int) -> dict[tuple[str, str], list[float]]:
    """Measure seconds, by product_dtype and name of the step."""
    batches = itertools.cycle(activations(options))
    x = next(batches)
    contenders: dict[tuple[str, str], Callable[[], None]] = {}
    for dtype in dict.fromkeys(("float32", *options.product_dtype)):
        contenders[dtype, "floor"] = floor_step(x, dict_size, getattr(torch, dtype))
    for dtype, sae_type in itertools.product(options.product_dtype, options.sae_type):
        cfg = config(options, sae_type, dict_size, dtype)
        contenders[dtype, sae_type] = our_step(trainer(cfg, x), lambda: next(batches))
        if options.auxk and "aux_penalty" in TYPES[sae_type].fields:
            contenders[dtype, f"{sae_type}, 10% dead"] = our_step(trainer(cfg, x, DEAD_SHARE), lambda: next(batches))
        if options.dense and dtype == "float32":
            contenders[dtype, f"{sae_type}, dense"] = our_step(dense(trainer(cfg, x), x), lambda: next(batches))
    if options.peers:
        for name, run in peers.steps(options.act_size, dict_size, options.target_l0, x).items():
            contenders["float32", name] = run
    return interleaved(contenders, options.repeats, x.device)


def measure_memory(options: Namespace) -> int:
    """Measure the bytes beyond parameters, gradients and Adam's state at the peak of a step."""
    sae_type, (dict_size,), (dtype,) = options.measure_memory, options.dict_size, options.product_dtype
    batches = activations(options)
    of = trainer(config(options, sae_type, dict_size, dtype), batches[0])
    if options.device != "cpu":
        of.step(batches[0], 500)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        of.step(batches[1], 501)
        gradients = sum(p.numel() * p.element_size() for p in of.sae.parameters())
        return torch.cuda.max_memory_allocated() - before - gradients
    # A process's peak is kept for ever: fill what a step keeps by hand, then see how much further the peak rises.
    matrices = iter(of.sae.lent.memory._all.values())
    for view in of.views:
        view.grad = next(matrices).fill_(1) if view.ndim == 2 else torch.ones_like(view)
    of.optimizer.step()
    kept = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak, too, starts from here
    for batch in batches:
        of.step(batch, 500)
    return _memory("VmHWM") - kept


def _memory(field: str) -> int:
    """Read the bytes that Linux gives for this process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(options: Namespace, sae_type: str, dict_size: int, dtype: str) -> int:
    """Run measure_memory in a process of its own."""
    command = [
        sys.executable, __file__, "--measure-memory", sae_type, "--dict-size", str(dict_size),
        "--act-size", str(options.act_size), "--batch-size", str(options.batch_size),
        "--target-l0", str(options.target_l0),
        "--device", options.device, "--product-dtype", dtype,
    ]  # fmt: skip
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(options: Namespace) -> None:
    if options.measure_memory:
        print(measure_memory(options))
        return
    where = machine(torch.device(options.device))
    print(f"{where}\nact_size {options.act_size}, batch {options.batch_size}, k {options.target_l0}, L0 {L0} of")
    print("vanilla and jumprelu; milliseconds: median (range); multiples of the floor in float32")
    rows, figures = [], []
    for dict_size in options.dict_size:
        seconds = benchmark(options, dict_size)
        base = median(seconds["float32", "floor"])
        for (dtype, name), times in seconds.items():
            measured = options.memory and name in options.sae_type
            memory = peak_memory(options, name, dict_size, dtype) if measured else None
            rows.append(
                {
                    "dict_size": str(dict_size),
                    "product": dtype,
                    "step": name,
                    "ms": spread(times),
                    "x floor": f"{median(times) / base:.2f}",
                    "peak MB": "" if memory is None else f"{memory / 1e6:.0f}",
                }
            )
            figures.append(
                {"dict_size": dict_size, "product_dtype": dtype, "step": name, "seconds": times, "peak_bytes": memory}
            )
    print_table(rows)
    write_json(options.json, {"machine": where, "figures": figures})


if __name__ == "__main__":
    main(parse())
