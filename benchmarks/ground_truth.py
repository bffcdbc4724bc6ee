"""How well each type recovers known features, which no metric of reconstruction can tell.

    python benchmarks/ground_truth.py                        # 90 SAEs
    python benchmarks/ground_truth.py --peers --figure recovery.png   # beside sae-lens' trainers

Activations are sums of a few of 4 * act_size features (`World`), and the SAEs, which have as many latents, are trained
with plain defaults at half, once and twice the true L0, all of them on the same batches. A seed is of the initial
weights and of the rows; the features stay. Held-out rows then tell what was recovered: for each metric its mean over
the seeds, with the standard deviation where there is room.

With --peers sae-lens trains its own (benchmarks/peers.py; the environment is that of requirements-bench.txt) at three
learning rates, and the rate with the best MCC over the seeds is shown. The coefficient of its standard SAE is
interpolated, for each rate and width, between the L0s that twelve of them, 1/4 to 11.3, lead to with the first seed.
"""

import importlib.util
import math
import multiprocessing
import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import peers
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from timing import machine, print_table, write_json
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from analysis.figures import STYLE, TICKS
from config import TYPES, Config
from runtime.checks import require
from sae import build_sae
from training import Trainer

BATCH_SIZE, HELD_OUT = 1024, 10_000
WORLD_SEED, ROWS_SEED, HELD_OUT_SEED = 10_000, 20_000, 30_000  # far from the SAEs': equal seeds give equal directions
FACTORS, CORRELATION = 8, 0.3  # of the features' copula
SPREAD, NOISE = 0.3, 0.05  # standard deviations: of magnitudes, and of what is added to each coordinate
SHARES = (0.5, 1, 2)  # of the true L0: target_l0
RATES = (3e-3, 1e-2, 3e-2)
COEFFICIENTS = tuple(2 ** (half / 2) for half in range(-4, 8))
METRICS = {
    "l0": "L0", "explained_variance": "EV", "mcc": "MCC", "precision": "prec", "recall": "rec", "f1": "F1",
    "uniqueness": "uniq", "dead": "dead", "shrinkage": "gamma",
}  # fmt: skip
WITH_SPREAD = ("explained_variance", "mcc", "f1")


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--act-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=350_000, help="rows to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--types", choices=TYPES, nargs="+", default=list(TYPES))
    parser.add_argument("--peers", action="store_true", help="also sae-lens' trainers")
    parser.add_argument("--json", type=Path, help="file for all metrics of all SAEs")
    parser.add_argument("--figure", type=Path, help="file for MCC and F1 against explained variance")
    return parser.parse_args()


# ---- activations from known features ----


class World:
    """Features, and the distribution of activations that are sums of them.

    x = sum_i m_i v_i + noise        [act_size]
    v_i     uniform on the unit sphere; n = 4 act_size of them, so they are in superposition
    m_i     |N(1, SPREAD^2)| where feature i fires, else 0; independent of each other
    noise   N(0, NOISE^2) in each coordinate
    p_i     the share of rows in which feature i fires: proportional to 1 / (i + n / 32), i from 1 to n (Zipf and
            Mandelbrot's law), and their sum is l0, 3/4 sqrt(act_size) to the nearest even number: 6 for 64, 12 for 256

    A feature fires where a standard normal g_i exceeds its threshold. The g_i have FACTORS common factors, by which
    they correlate with CORRELATION u_i . u_j, u_i uniform on the unit sphere: a Gaussian copula.
    The second quarter of the features are children, four to each of the n / 16 most frequent ones. A child fires only
    where its parent fires too, with probability p_child / p_parent, from 0.07 to 0.3; its g_i is independent of all
    others, so p_child holds exactly.
    """

    def __init__(self, act_size: int, seed: int) -> None:
        rng, n = torch.Generator().manual_seed(seed), 4 * act_size
        self.l0 = 2 * round(3 / 8 * math.sqrt(act_size))
        self.directions = functional.normalize(torch.randn(n, act_size, generator=rng), dim=1)
        weights = 1 / (torch.arange(1, n + 1) + n / 32)
        self.probabilities = self.l0 * weights / weights.sum()
        self.children = torch.arange(n // 4, n // 2)
        self.parents = self.children % (n // 16)
        alone = self.probabilities.clone()
        alone[self.children] /= self.probabilities[self.parents]
        self.thresholds = -torch.special.ndtri(alone)
        self.loadings = math.sqrt(CORRELATION) * functional.normalize(torch.randn(FACTORS, n, generator=rng), dim=0)
        self.loadings[:, self.children] = 0

    def batch(
        self, rng: torch.Generator, rows: int
    ) -> tuple[Float[Tensor, "rows act_size"], Float[Tensor, "rows features"]]:
        """Draw activations, and the magnitudes of the features they are made of."""
        g = torch.randn(rows, len(self.directions), generator=rng) * (1 - self.loadings.square().sum(dim=0)).sqrt()
        fires = g.addmm_(torch.randn(rows, FACTORS, generator=rng), self.loadings) > self.thresholds
        fires[:, self.children] &= fires[:, self.parents]
        truth = fires.float()
        truth[fires] = (1 + SPREAD * torch.randn(int(fires.sum()), generator=rng)).abs()
        noise = NOISE * torch.randn(rows, self.directions.shape[1], generator=rng)
        return noise.addmm_(truth, self.directions), truth


# ---- how much of them is recovered ----


def cosines(
    W_dec: Float[Tensor, "latents act_size"], directions: Float[Tensor, "features act_size"]
) -> Float[Tensor, "latents features"]:
    return functional.normalize(W_dec, dim=1) @ functional.normalize(directions, dim=1).t()


def matched(cosine: Float[Tensor, "latents features"]) -> list[int]:
    """Give each true feature a latent of its own, so that the sum of their cosines is largest (Hungarian algorithm).

    Latents and magnitudes are positive, so the opposite direction is no match. As many latents as features.
    """
    return linear_sum_assignment(cosine.t().numpy(), maximize=True)[1].tolist()


def mcc(cosine: Float[Tensor, "latents features"]) -> float:
    """Average the cosine between true features and their latents (Song et al. 2025, arXiv:2505.20254, but signed)."""
    return float(cosine.t()[range(cosine.shape[1]), matched(cosine)].mean())


def firing(found: Bool[Tensor, "rows features"], true: Bool[Tensor, "rows features"]) -> tuple[float, float, float]:
    """Compute precision, recall and F1 of the firing of matched latents, averaged over features that occur.

    hits / found, hits / true and 2 hits / (found + true), counted over rows; precision is 0 where nothing is found.
    """
    found, true = found[:, true.any(dim=0)], true[:, true.any(dim=0)]
    hits, fired, occurs = ((found & true).sum(dim=0), found.sum(dim=0), true.sum(dim=0))
    scores = hits / fired.clamp_min(1), hits / occurs, 2 * hits / (fired + occurs)
    return tuple(float(score.mean()) for score in scores)


def uniqueness(cosine: Float[Tensor, "latents features"]) -> float:
    """Count the features that are nearest to some latent, per latent: 1 where no two have the same (as in SAELens)."""
    return len(cosine.argmax(dim=1).unique()) / len(cosine)


def dead(acts: Float[Tensor, "rows latents"]) -> float:
    """Give the share of the latents that fire in no row."""
    return float((acts <= 0).all(dim=0).float().mean())


def shrinkage(x: Float[Tensor, "rows act_size"], x_hat: Float[Tensor, "rows act_size"]) -> float:
    """Compute the relative reconstruction bias E[|x_hat|^2] / E[x_hat . x]: below 1 where x_hat is too small.

    It is the gamma for which x_hat / gamma is nearest to x (Rajamanoharan et al. 2024, arXiv:2404.16014); as there, no
    mean or b_dec is subtracted.
    """
    return float(x_hat.double().square().sum() / (x_hat.double() * x).sum())


def explained_variance(x: Float[Tensor, "rows act_size"], x_hat: Float[Tensor, "rows act_size"]) -> float:
    """Compute 1 - sum (x - x_hat)^2 / sum (x - mean(x))^2, over rows and width together."""
    return float(1 - (x - x_hat).double().square().sum() / (x - x.mean(dim=0)).double().square().sum())


@torch.no_grad()
def measure(sae: nn.Module, world: World, x: Tensor, truth: Tensor) -> dict[str, float]:
    """Compute METRICS of a trained dictionary on held-out rows."""
    acts = sae.encode(x)
    x_hat, cosine = sae.decode(acts), cosines(sae.W_dec, world.directions)
    precision, recall, f1 = firing(acts[:, matched(cosine)] > 0, truth > 0)
    values = (
        float((acts > 0).sum() / len(acts)), explained_variance(x, x_hat), mcc(cosine), precision, recall, f1,
        uniqueness(cosine), dead(acts), shrinkage(x, x_hat),
    )  # fmt: skip
    return dict(zip(METRICS, values))


# ---- training ----


class Run(NamedTuple):
    """One SAE. lr is None where it is a default; sparsity is the target L0, or sae-lens' L1 coefficient."""

    act_size: int
    seed: int
    target_l0: int
    library: str
    lr: float | None
    sae_type: str
    sparsity: float


class Contender(NamedTuple):
    """A dictionary in training, and what it is in the end: a module with `encode`, `decode` and W_dec."""

    step: Callable[[Float[Tensor, "batch act_size"], int], object]
    finish: Callable[[], nn.Module]


def ours(run: Run, tokens: int) -> Contender:
    sae = build_sae(
        Config(
            sae_type=run.sae_type, act_size=run.act_size, dict_size=4 * run.act_size, target_l0=run.target_l0,
            num_tokens=tokens, batch_size=BATCH_SIZE, seed=run.seed, device="cpu",
        )
    )  # fmt: skip
    trainer = Trainer(sae)

    def finish() -> nn.Module:
        trainer.release()
        return sae.eval()

    return Contender(trainer.step, finish)


def theirs(run: Run, tokens: int, x: Tensor) -> Contender:
    torch.manual_seed(run.seed)
    F, steps = 4 * run.act_size, tokens // BATCH_SIZE
    peer = peers.contender(run.library, run.sae_type, F, run.sparsity, steps, x, run.lr)
    return Contender(peer.step, lambda: peer.finish().reconstruct)  # sae-lens' SAE itself


def train(tokens: int, runs: list[Run]) -> list[dict[str, Any]]:
    """Train SAEs of one act_size and seed on the same batches, each of which is drawn once."""
    act_size, seed, *_ = runs[0]
    world, rng = World(act_size, WORLD_SEED), torch.Generator().manual_seed(ROWS_SEED + seed)
    contenders = []
    for step in range(tokens // BATCH_SIZE):
        x, _ = world.batch(rng, BATCH_SIZE)
        contenders = contenders or [ours(run, tokens) if run.lr is None else theirs(run, tokens, x) for run in runs]
        for contender in contenders:
            contender.step(x, step)
    x, truth = world.batch(torch.Generator().manual_seed(HELD_OUT_SEED), HELD_OUT)
    return [run._asdict() | measure(made.finish(), world, x, truth) for run, made in zip(runs, contenders)]


def coefficient_for(target_l0: int, l0s: list[float]) -> float:
    """Interpolate, on logarithmic scales, between the L0 that each of COEFFICIENTS led to."""
    low_first = np.maximum.accumulate(np.log(np.maximum(l0s, 1e-3))[::-1])  # np.interp wants no number to fall
    return float(np.exp(np.interp(math.log(target_l0), low_first, np.log(COEFFICIENTS)[::-1])))


def train_all(options: Namespace) -> list[dict[str, Any]]:
    """Train what was asked for, in as many processes as there are cores: at these sizes one thread each is fastest."""
    widths, first_seed = sorted(options.act_size, reverse=True), options.seeds[0]
    rates = [("ours", None), *(("sae_lens", lr) for lr in RATES if options.peers)]
    searched = "vanilla" in options.types and options.peers
    ladders = [
        [Run(d, first_seed, 0, "sae_lens", lr, "vanilla", c) for c in COEFFICIENTS]
        for d, lr in product(widths, RATES if searched else ())
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        work = partial(pool.map, partial(train, options.tokens))
        l0s = {(run.act_size, run.lr): [r["l0"] for r in found] for (run, *_), found in zip(ladders, work(ladders))}
        jobs = []
        for d, seed, share, (library, lr) in product(widths, options.seeds, SHARES, rates):
            l0 = int(share * World(d, WORLD_SEED).l0)
            sparsity = dict.fromkeys(options.types, l0)
            if (d, lr) in l0s:
                sparsity["vanilla"] = coefficient_for(l0, l0s[d, lr])
            jobs.append([Run(d, seed, l0, library, lr, *setting) for setting in sparsity.items()])
        return [result for found in tqdm(work(jobs), total=len(jobs), unit="job") for result in found]


# ---- what is shown ----


class Cell(NamedTuple):
    """What the seeds of one SAE led to."""

    act_size: int
    target_l0: int
    sae_type: str
    library: str
    lr: float | None
    values: dict[str, list[float]]  # of METRICS, by seed


def cells(results: list[dict[str, Any]]) -> list[Cell]:
    """Bring the seeds together and, of each library's rates, keep the one with the best MCC; types in their order."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        alike.setdefault(tuple(result[field] for field in Cell._fields[:-1]), []).append(result)
    best: dict[tuple, Cell] = {}
    for key, seeds in alike.items():
        cell = Cell(*key, {metric: [seed[metric] for seed in seeds] for metric in METRICS})
        best[key[:-1]] = max(best.get(key[:-1], cell), cell, key=lambda cell: mean(cell.values["mcc"]))
    types = list(TYPES)
    return sorted(best.values(), key=lambda cell: (*cell[:2], types.index(cell.sae_type), cell.library))


def row(cell: Cell) -> dict[str, str]:
    name = TYPES[cell.sae_type].label if cell.lr is None else f"{cell.library} {cell.lr:g}"
    shown = {}
    for metric, label in METRICS.items():
        values = cell.values[metric]
        text = f"{mean(values):.1f}" if metric == "l0" else _short(mean(values))
        spread = metric in WITH_SPREAD and len(values) > 1
        shown[label] = f"{text}±{_short(stdev(values))}" if spread else text
    return {"": name} | shown


def _short(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1)


@matplotlib.rc_context(STYLE)
def draw(found: list[Cell]) -> Figure:
    """Plot MCC and F1 against explained variance, a line of three L0s for each type; sae-lens' lines are dashed."""
    widths = sorted({cell.act_size for cell in found})
    figure = Figure(figsize=(7.5, 3 * len(widths)), layout="constrained")
    panels = figure.subplots(len(widths), 2, squeeze=False, sharex="row")
    lines: dict[tuple, list[Cell]] = {}
    for cell in found:
        lines.setdefault((cell.act_size, cell.sae_type, cell.library), []).append(cell)
    for (d, sae_type, library), cells in lines.items():
        look = TYPES[sae_type]
        label, dashes = (look.label, "-") if library == "ours" else (f"{look.label}, {library}", "--")
        for axes, metric in zip(panels[widths.index(d)], ("mcc", "f1")):
            x, y = ([mean(cell.values[name]) for cell in cells] for name in ("explained_variance", metric))
            axes.plot(x, y, color=look.colour, linestyle=dashes, label=label, linewidth=1.2)
            axes.scatter(x, y, color=look.colour, s=[10, 25, 50])
            axes.set(xlabel=f"Explained variance, act_size {d}", ylabel=METRICS[metric])
            axes.tick_params(**TICKS)
    handles, labels = panels[0][0].get_legend_handles_labels()
    title = "target_l0 is half, once and twice the true L0; larger dots are larger L0s"
    layout = dict(ncols=5, fontsize=7.5, handlelength=1.6, columnspacing=1, title=title, title_fontsize=8)
    figure.legend(handles, labels, loc="outside lower center", **layout)
    return figure


def main(options: Namespace) -> None:
    absent = options.peers and importlib.util.find_spec("sae_lens") is None
    require(not absent, "--peers: sae-lens is not installed; pip install -r requirements-bench.txt, elsewhere")
    print(machine(torch.device("cpu")))
    found = cells(train_all(options))
    for (d, target), group in groupby(found, lambda cell: (cell.act_size, cell.target_l0)):
        world = World(d, WORLD_SEED)
        print(f"\nact_size {d}, {len(world.directions)} features, true L0 {world.l0}; target_l0 {target}")
        print_table([row(cell) for cell in group])
    write_json(options.json, [cell._asdict() for cell in found])
    if options.figure:
        draw(found).savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main(parse())
