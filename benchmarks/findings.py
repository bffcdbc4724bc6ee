"""The literature's findings on sparse autoencoders, looked for in ours: how the types compare, and what width brings.

    python benchmarks/findings.py       # trains 19 SAEs on the embedded model's activations; tables and a figure

Beside the types, at the same L0, what needs no training: the first k principal components, the k of a token's
components or coordinates that are largest, and the k of as many random directions as an SAE has that are closest to the
token, fitted by least squares. What the results file has is not trained again.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from itertools import product
from pathlib import Path

import matplotlib
import torch
from activations import CACHE, Activations
from jaxtyping import Float
from matplotlib.figure import Figure
from peers import Coder
from quality import DICT_SIZE, Result, ahead, load, mean, train_all
from timing import print_table
from torch import Tensor

from analysis.figures import STYLE, TICKS, WIDTH
from config import TYPES, Config

FITTED_ROWS = 1024  # at a time
SAMPLED = 20_000  # activations, for principal components
WIDTHS, K, OF_WIDTHS = (512, 1024, 2048, 4096, 8192), 32, "batchtopk"
PAIRS = (
    ("batchtopk", "topk"), ("jumprelu", "batchtopk"), ("matryoshka", "batchtopk"), ("vanilla", "topk"),
    ("vanilla", "PCA, first k"), ("vanilla", "PCA, largest k"), ("vanilla", "random directions"),
    ("vanilla", "neurons, largest k"), ("topk", "PCA, largest k"),
)  # fmt: skip


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=Path("findings.jsonl"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    return parser.parse_args()


# ---- what needs no training ----


def largest(values: Float[Tensor, "row direction"], k: int) -> Float[Tensor, "row direction"]:
    """Keep the k of each row that are farthest from 0."""
    return values * torch.zeros_like(values).scatter_(1, values.abs().topk(k).indices, 1.0)


def in_basis(basis: Float[Tensor, "direction act_size"], mean: Float[Tensor, "act_size"], k: int) -> Coder:
    """Code in an orthonormal basis: its k largest coordinates are the best k."""

    def code(x: Tensor) -> Tensor:
        return largest((x - mean) @ basis.T, k)

    return Coder(lambda x: code(x).abs(), lambda x: code(x) @ basis + mean)


def in_directions(directions: Float[Tensor, "direction act_size"], mean: Float[Tensor, "act_size"], k: int) -> Coder:
    """Code with the k of many directions that are closest to a row, fitted to it by least squares."""

    def code(x: Tensor) -> Tensor:
        chosen = ((x - mean) @ directions.T).abs().topk(k).indices
        atoms = directions[chosen]
        fitted = torch.linalg.solve(atoms @ atoms.mT, atoms @ (x - mean)[:, :, None])[:, :, 0]
        return x.new_zeros(len(x), len(directions)).scatter_(1, chosen, fitted)

    def encode(x: Tensor) -> Tensor:
        return torch.cat([code(rows) for rows in x.split(FITTED_ROWS)])

    return Coder(lambda x: encode(x).abs(), lambda x: encode(x) @ directions + mean)


def untrained(activations: Activations, k: int) -> dict[str, Coder]:
    """Prepare what an SAE must be better than, from some of the training activations."""
    sample = torch.cat([x for x, _ in zip(activations, range(SAMPLED // activations.cfg.batch_size))])
    mean = sample.mean(dim=0)
    components = torch.linalg.svd(sample - mean, full_matrices=False).Vh
    directions = torch.randn(DICT_SIZE, len(mean), generator=torch.Generator().manual_seed(0))
    return {
        "PCA, first k": in_basis(components[:k], mean, k),
        "PCA, largest k": in_basis(components, mean, k),
        "random directions": in_directions(torch.nn.functional.normalize(directions), mean, k),
        "neurons, largest k": in_basis(torch.eye(len(mean)), mean, k),
    }


# ---- what is found ----


def of(results: list[Result], **values: object) -> list[Result]:
    """Pick the results that have these values: one for each seed."""
    return [result for result in results if all(result[key] == value for key, value in values.items())]


def label(sae_type: str) -> str:
    return TYPES[sae_type].label if sae_type in TYPES else sae_type


def print_types(results: list[Result]) -> None:
    """Print explained variance, in percent, and relative reconstruction bias: below 1, outputs are too small."""
    rows = []
    for sae_type in dict.fromkeys(result["sae_type"] for result in results):
        runs = {k: of(results, k=k, sae_type=sae_type) for k in dict.fromkeys(result["k"] for result in results)}
        variance = {f"EV, k {k}": f"{100 * mean(found, 'explained_variance'):.2f}" for k, found in runs.items()}
        bias = {f"bias, k {k}": f"{mean(found, 'relative_bias'):.3f}" for k, found in runs.items()}
        rows.append({"": label(sae_type)} | variance | bias)
    print_table(rows)


def print_gaps(results: list[Result]) -> None:
    """Print how much more variance, in percent, one explains than another: 95% intervals over windows and seeds."""
    rows = []
    for pair in PAIRS:
        row = {"EV": f"{label(pair[0])} - {label(pair[1])}"}
        for k in dict.fromkeys(result["k"] for result in results):
            low, high = ahead(*(of(results, k=k, sae_type=sae_type) for sae_type in pair))
            row[f"k {k}"] = f"{100 * low:+.2f} to {100 * high:+.2f}"
        rows.append(row)
    print_table(rows)


def print_widths(results: list[Result]) -> None:
    rows = {"EV": "explained_variance", "silent": "silent"}
    print_table(
        [
            {"": name} | {str(w): f"{100 * mean(of(results, dict_size=w), metric):.2f}" for w in WIDTHS}
            for name, metric in rows.items()
        ]
    )


@matplotlib.rc_context(STYLE)
def figure(types: list[Result], widths: list[Result]) -> Figure:
    """Plot explained variance and CE recovered against L0, and explained variance against width."""
    drawn = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    variance, recovered, width = drawn.subplots(1, 3)
    greys = iter(("0.1", "0.4", "0.6", "0.75"))
    for sae_type in dict.fromkeys(result["sae_type"] for result in types):
        runs = [of(types, sae_type=sae_type, k=k) for k in dict.fromkeys(result["k"] for result in types)]
        trained = sae_type in TYPES
        colour, line = (TYPES[sae_type].colour, "o-") if trained else (next(greys), "s--")
        for axes, metric in ((variance, "explained_variance"), (recovered, "ce_recovered")):
            l0, found = ([mean(seeds, name) for seeds in runs] for name in ("l0", metric))
            axes.plot(l0, found, line, color=colour, markersize=4, label=label(sae_type))
    found = [mean(of(widths, dict_size=w), "explained_variance") for w in WIDTHS]
    width.plot(WIDTHS, found, "o-", color=TYPES[OF_WIDTHS].colour, markersize=4)
    for axes, x, y in (
        (variance, "L0", "Explained variance"), (recovered, "L0", "CE recovered"),
        (width, f"Latents ({label(OF_WIDTHS)}, k {K})", "Explained variance"),
    ):  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=x, ylabel=y)
        axes.tick_params(**TICKS)
    drawn.legend(*variance.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return drawn


def main(options: Namespace) -> None:
    common = dict(num_tokens=options.tokens, library="ours", lr=None)
    types = [
        common | dict(dict_size=DICT_SIZE, k=k, sae_type=t, seed=s)
        for t, k, s in product(TYPES, options.k, options.seeds)
    ]
    widths = [common | dict(dict_size=w, k=K, sae_type=OF_WIDTHS, seed=s) for w, s in product(WIDTHS, options.seeds)]
    train_all([*types, *(run for run in widths if run not in types)], options.results, options.cache)
    results, activations = load(options.results), Activations(Config(num_tokens=options.tokens), options.cache)
    by_type, by_width = ([r for run in runs for r in of(results, **run)] for runs in (types, widths))
    for k in options.k:
        for name, coder in untrained(activations, k).items():
            by_type.append(dict(sae_type=name, k=k, seed=0) | activations.measure(coder))
    print_types(by_type)
    print_gaps(by_type)
    print_widths(by_width)
    figure(by_type, by_width).savefig(options.results.with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    main(parse())
