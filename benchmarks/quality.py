"""What is trained here beside what other libraries train, on the same activations of the embedded model.

    python benchmarks/quality.py --tokens 1000000 --seeds 0   # adds to the results file; what is in it is not repeated
    python benchmarks/quality.py --table                      # the table and the figure of that file

All get the same batches in the same order. Ours train with plain defaults; the others as their documents recommend
(benchmarks/peers.py), and again with four learning rates. The metrics are of held-out text. The environment is that of
requirements-bench.txt. The whole grid takes days on 2 cores: run it in pieces.
"""

import json
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import peers
import torch
from activations import CACHE, Activations
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from timing import machine, print_table

from analysis.figures import STYLE, TICKS, WIDTH
from config import TYPES, Config
from sae import build_sae
from training import Trainer

DICT_SIZE = 2048
LIBRARIES = {"ours": tuple(TYPES)} | peers.TYPES
COLOURS = dict(zip(LIBRARIES, ("#D55E00", "#0072B2", "#009E73", "#CC79A7")))
COMPARABLE = 1.1  # times k: an L0 above it is an advantage
RATES = (None, 1e-3, 3e-3, 6e-3, 1e-2)
RESAMPLES = 2000
# What tells runs apart; lr is None where it is what the library recommends.
RUN = ("num_tokens", "dict_size", "k", "sae_type", "library", "lr", "seed")
Result = dict[str, Any]


def rate(text: str) -> float | None:
    return None if text == "own" else float(text)


def parse(words: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    types = ["topk", "batchtopk", "jumprelu", "matryoshka"]
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--types", choices=TYPES, nargs="+", default=types)
    parser.add_argument("--libraries", choices=LIBRARIES, nargs="+", default=list(LIBRARIES))
    parser.add_argument("--rates", type=rate, nargs="+", default=RATES, help="of the others; own: as they recommend")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the activations, 2 GB for 4M tokens")
    parser.add_argument("--table", action="store_true", help="train nothing, show the results; the figure lies beside")
    return parser.parse_args(words)


# ---- training ----


def plan(options: Namespace) -> Iterator[Result]:
    """List the runs that were asked for and exist: ours have no rate but their own."""
    asked = (options.tokens, [DICT_SIZE], options.k, options.types, options.libraries, options.rates, options.seeds)
    for run in (dict(zip(RUN, values)) for values in product(*asked)):
        if run["sae_type"] in LIBRARIES[run["library"]] and (run["lr"] is None or run["library"] != "ours"):
            yield run


def ours(cfg: Config) -> peers.Contender:
    sae = build_sae(cfg)
    trainer = Trainer(sae)

    def finish() -> peers.Coder:
        trainer.release()
        sae.eval()
        return peers.Coder(sae.encode, lambda x: sae(x).sae_out)

    return peers.Contender(trainer.step, finish)


def train(run: Result, activations: Activations) -> Result:
    """Train one contender on all batches; its metrics, and the seconds that its steps took."""
    torch.manual_seed(run["seed"])
    k, dict_size, sae_type, first = run["k"], run["dict_size"], run["sae_type"], next(iter(activations))
    if run["library"] == "ours":
        cfg = replace(activations.cfg, sae_type=sae_type, target_l0=k, seed=run["seed"], dict_size=dict_size)
        contender = ours(cfg)
    else:
        num_steps = activations.cfg.num_steps
        contender = peers.contender(run["library"], sae_type, dict_size, k, num_steps, first, run["lr"])
    seconds = 0.0
    for number, x in enumerate(activations):
        began = time.perf_counter()
        contender.step(x, number)
        seconds += time.perf_counter() - began
    return run | activations.measure(contender.finish()) | {"seconds": seconds, "machine": machine(x.device)}


def train_all(runs: Iterable[Result], file: Path, cache: Path) -> None:
    """Train what the results file does not have yet, and add it there."""
    done = [{key: result[key] for key in RUN} for result in load(file)]
    left = [run for run in runs if run not in done]
    for num_tokens in dict.fromkeys(run["num_tokens"] for run in left):
        activations = Activations(Config(num_tokens=num_tokens), cache)
        for run in (run for run in left if run["num_tokens"] == num_tokens):
            result = train(run, activations)
            with file.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            metrics = ("explained_variance", "ce_recovered", "l0", "silent", "seconds")
            print(*run.values(), *(f"{name} {result[name]:.4g}" for name in metrics), flush=True)


def load(file: Path) -> list[Result]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- table and figure ----


def mean(results: list[Result], name: str) -> float:
    return float(np.mean([result[name] for result in results]))


def contenders(results: list[Result], k: int) -> Iterator[tuple[str, str, list[Result]]]:
    """Pick from one cell of the table each library's recommended rate, and before it the best one if that is another.

    The best has the highest explained variance of those whose L0 is no advantage.
    """
    for library in LIBRARIES:
        by_rate: dict[float | None, list[Result]] = {}
        for result in results:
            if result["library"] == library:
                by_rate.setdefault(result["lr"], []).append(result)
        fair = [runs for runs in by_rate.values() if mean(runs, "l0") <= COMPARABLE * k]
        best = max(fair, key=lambda runs: mean(runs, "explained_variance"), default=None)
        if best is not None:
            yield library, "best", best
        if None in by_rate and by_rate[None] is not best:
            yield library, "recommended", by_rate[None]


def ahead(ours: list[Result], theirs: list[Result]) -> tuple[float, float]:
    """Bound by how much more variance ours explain: the 95% interval of a bootstrap over seeds and held-out windows.

    Both draw the same seeds and windows, as the difference varies less than its parts.
    """
    seeds = [seed for seed in (r["seed"] for r in ours) if any(r["seed"] == seed for r in theirs)]
    errors = ({r["seed"]: np.array(r["errors"]) for r in runs} for runs in (theirs, ours))
    of_theirs, of_ours = (np.stack([of_seed[seed] for seed in seeds]) for of_seed in errors)
    gaps, powers = of_theirs - of_ours, np.array(ours[0]["powers"])
    rng, windows = np.random.default_rng(0), len(powers)
    seed = rng.integers(len(gaps), size=(RESAMPLES, len(gaps), 1))
    window = rng.integers(windows, size=(RESAMPLES, 1, windows))
    drawn = gaps[seed, window].mean(axis=1).sum(axis=1) / powers[window].sum(axis=(1, 2))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def row(library: str, runs: list[Result], of_ours: list[Result]) -> dict[str, str]:
    """Format a row of the table; in percent what is a share."""
    lr = {result["lr"] for result in runs}.pop()
    paired = library != "ours" and {r["seed"] for r in of_ours} & {r["seed"] for r in runs}
    low, high = ahead(of_ours, runs) if paired else (0.0, 0.0)
    return {
        "": library,
        "rate": f"{lr:g}" if lr else "own",
        "EV %": f"{100 * mean(runs, 'explained_variance'):.2f}",
        "CE %": f"{100 * mean(runs, 'ce_recovered'):.2f}",
        "L0": f"{mean(runs, 'l0'):.1f}",
        "silent": f"{100 * mean(runs, 'silent'):.0f}",
        "s": f"{mean(runs, 'seconds'):.0f}",
        "ours ahead by": f"{100 * low:+.2f} to {100 * high:+.2f}" if paired else "",
    }


def cells(results: list[Result]) -> dict[tuple[int, int, str], list[Result]]:
    """Group by what a comparison shares: tokens, k and type."""
    found: dict[tuple[int, int, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["num_tokens"], list(TYPES).index(r["sae_type"]), r["k"])):
        found.setdefault((result["num_tokens"], result["k"], result["sae_type"]), []).append(result)
    return found


def print_tables(results: list[Result]) -> None:
    for (num_tokens, k, sae_type), runs in cells(results).items():
        picked = list(contenders(runs, k))
        of_ours = [result for library, _, runs in picked if library == "ours" for result in runs]
        seeds = max(len(runs) for _, _, runs in picked)
        print(f"\n{TYPES[sae_type].label}, k {k}, {num_tokens / 1e6:g}M tokens, {seeds} seeds")
        print_table([row(library, runs, of_ours) for library, _, runs in picked])


@matplotlib.rc_context(STYLE)
def figure(results: list[Result]) -> Figure:
    """Plot explained variance and CE recovered against L0: lines are the best rates, circles recommended ones.

    An L0 beyond those that were asked for is out of the picture.
    """
    by_cell = cells(results)
    lengths, ks, types = (list(dict.fromkeys(cell[i] for cell in by_cell)) for i in (0, 1, 2))
    rows = list(product(lengths, (("explained_variance", "Explained variance"), ("ce_recovered", "CE recovered"))))
    drawn = Figure(figsize=(WIDTH, 1.9 * len(rows) + 0.5), layout="constrained")
    panels = drawn.subplots(len(rows), len(types), sharex=True, sharey="row", squeeze=False)
    for (i, (num_tokens, (metric, name))), (j, sae_type) in product(enumerate(rows), enumerate(types)):
        axes = panels[i, j]
        of_type = {k: runs for (n, k, t), runs in by_cell.items() if (n, t) == (num_tokens, sae_type)}
        picked = [found for k, runs in of_type.items() for found in contenders(runs, k)]
        for library, which in product(LIBRARIES, ("recommended", "best")):
            runs = [runs for *names, runs in picked if names == [library, which]]
            l0, found = ([mean(seeds, key) for seeds in runs] for key in ("l0", metric))
            look = dict(linestyle="-") if which == "best" else dict(linestyle="", fillstyle="none")
            axes.plot(l0, found, marker="o", markersize=4, color=COLOURS[library], **look)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(ks) / 1.3, max(ks) * 1.3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(**TICKS)
        if i == 0:
            axes.set_title(TYPES[sae_type].label)
        if j == 0:
            axes.set_ylabel(f"{name}\n{num_tokens / 1e6:g}M tokens")
        if i + 1 == len(rows):
            axes.set_xlabel("L0")
    lines = [Line2D([], [], color=colour, marker="o", markersize=4, label=name) for name, colour in COLOURS.items()]
    drawn.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    return drawn


def main(options: Namespace) -> None:
    if not options.table:
        train_all(plan(options), options.results, options.cache)
    results = load(options.results)
    print_tables(results)
    figure(results).savefig(options.results.with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    main(parse())
