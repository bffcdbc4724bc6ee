"""Measure saved SAEs on held-out text, with 95% intervals: python results.py evaluate <checkpoint>...

The intervals are of a bootstrap over windows: how much a metric would vary with the text. SAEs of one hook see the same
windows in the same resamples, so that the interval of a difference leaves out what both have in common. Windows are
resampled and not documents, of which one can hold several; few windows are from the same document, as they are drawn
from a text of 32 times as many.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from analysis.latents import encoder_alignment, matched_cosines, nearest_cosines
from config import OF_TEXT, Config, setting
from evaluation import HeldOut, Tally, averages, tally
from interop.pretrained import load_pretrained
from language_model import check_model, load_model
from runtime.checks import require
from runtime.cli import Parser
from runtime.disk import write_durably
from text import held_out_windows

RESAMPLES = 1000
MATCHED = 8192  # latents: matching takes memory with their square and time with their cube
ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)  # of an interval
COLUMNS = {"l0": ("L0", 1), "explained_variance": ("expl. var.", 3), "ce_recovered": ("CE recovered", 3)}


def resampled(found: Tally, seed: int = 0) -> dict[str, Float[Tensor, "resample"]]:
    """Compute each metric of rows and predictions on resamples of the windows, the same for equal seeds."""
    windows = len(found.sums["_rows"])
    drawn = torch.randint(windows, (RESAMPLES, windows), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(RESAMPLES, windows, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    return averages({name: times @ sums.cpu() for name, sums in found.sums.items()})


def measure(paths: Sequence[str], windows: int | None = None) -> list[dict[str, Any]]:
    """Measure saved SAEs of any format that `load_pretrained` knows, each on the held-out text of its Config.

    windows: of text; as many as the Configs say, at most, when not given. Returns for each SAE, ready for JSON:
        checkpoint, config
        metrics             those of `evaluate`
        intervals           low and high end of 95%, of those that are averages or made from them
        log10_density       histogram of the latents by the share of tokens on which they fire; silent ones are left out
        nearest_cosine      histogram of the cosines of decoder rows with the row nearest to each
        encoder_alignment   histogram of the cosines of encoder directions with decoder rows; not of a transcoder
        compared_with       the first checkpoint of the same hook and text; of the others,
        differences         of each average from the first one's, with its interval
        matched_cosine      mean cosine of decoder rows with the first one's, matched one to one, up to MATCHED of them
    Raises ValueError or OSError, one line, when an SAE, a model or a text cannot be read.
    """
    require(windows is None or windows >= 1, f"windows = {windows}: give 1 or more")
    saes = [load_pretrained(path, Config().torch_device) for path in paths]
    same_text: dict[tuple, list[int]] = {}
    for number, sae in enumerate(saes):
        same_text.setdefault(tuple(getattr(sae.cfg, field) for field in OF_TEXT), []).append(number)
    measured: dict[int, dict[str, Any]] = {}
    for numbers in same_text.values():
        cfgs = [check_model(saes[number].cfg) for number in numbers]
        model = load_model(cfgs[0])
        tokens = held_out_windows(cfgs[0], model.tokenizer, windows or max(cfg.eval_windows for cfg in cfgs))
        bar = partial(tqdm, desc=cfgs[0].model_name, unit="batch", dynamic_ncols=True, disable=None)
        tallies = tally(HeldOut(model, tokens), [saes[number] for number in numbers], bar)
        first: dict[tuple, tuple] = {}  # of each hook
        for number, found in zip(numbers, tallies):
            on_resamples, metrics = resampled(found), found.metrics()
            row = measured[number] = {"checkpoint": str(paths[number]), "config": found.sae.cfg.to_dict()}
            row |= {"metrics": metrics, "intervals": {name: _interval(of) for name, of in on_resamples.items()}}
            row |= _of_latents(found)
            hooks = found.sae.cfg.reads, found.sae.cfg.writes
            base, of_base, base_resampled = first.setdefault(hooks, (found, row, on_resamples))
            if found is not base:
                row["compared_with"] = of_base["checkpoint"]
                row["differences"] = {
                    name: [metrics[name] - of_base["metrics"][name], *_interval(of - base_resampled[name])]
                    for name, of in on_resamples.items()
                }
                if max(found.sae.cfg.dict_size, base.sae.cfg.dict_size) <= MATCHED:
                    row["matched_cosine"] = float(matched_cosines(found.sae.W_dec, base.sae.W_dec).mean())
    return [measured[number] for number in range(len(paths))]


def _of_latents(found: Tally) -> dict[str, Any]:
    density = found.fired[found.fired > 0] / found.rows_by_l0.sum()
    cosines = {"nearest_cosine": nearest_cosines(found.sae.W_dec)}
    if found.sae.y_is_x:
        cosines["encoder_alignment"] = encoder_alignment(found.sae)
    histograms = {name: _histogram(values, -1, 1) for name, values in cosines.items()}
    return {"log10_density": _histogram(density.log10(), -8, 0)} | histograms


def _histogram(values: Float[Tensor, "latents"], low: int, high: int, bins: int = 40) -> dict[str, Any]:
    values = values.detach().double().cpu().clamp(low, high)  # cosines of 1 + 1e-7
    counts, edges = values.histogram(bins, range=(low, high))
    return {"mean": float(values.mean()), "counts": counts.int().tolist(), "edges": edges.tolist()}


def _interval(values: Float[Tensor, "resample"]) -> list[float]:
    return values.quantile(ENDS).tolist()


def format_measured(measured: list[dict[str, Any]]) -> str:
    """Write a table of at most 80 columns: metrics with half the width of their intervals, and differences below."""
    table = [("", "type", "dict", "setting", *(heading for heading, _ in COLUMNS.values()))]
    paths = [row["checkpoint"] for row in measured]
    for number, row in enumerate(measured, start=1):
        cfg, ends = Config(**row["config"]), row["intervals"]
        cells = [_plus_minus(row["metrics"][name], *ends[name], d) for name, (_, d) in COLUMNS.items()]
        table.append((str(number), cfg.sae_type, str(cfg.dict_size), setting(cfg), *cells))
        if "differences" in row:
            cells = [_plus_minus(*row["differences"][name], d, "+") for name, (_, d) in COLUMNS.items()]
            table.append(("", f"  less {paths.index(row['compared_with']) + 1}", "", "", *cells))
    widths = [max(map(len, column)) for column in zip(*table)]
    aligned = "  ".join(f"{{:{align}{width}}}" for align, width in zip("><><>>>", widths))
    lines = [aligned.format(*cells).rstrip() for cells in table]
    return "\n".join([*lines, "", *(f"{number}  {path}" for number, path in enumerate(paths, start=1))])


def _plus_minus(value: float, low: float, high: float, decimals: int, sign: str = "") -> str:
    half = f"{(high - low) / 2:.{decimals}f}".removeprefix("0")
    return f"{value:{sign}.{decimals}f} ±{half}"


def evaluate_parser() -> Parser:
    parser = Parser(prog="results.py evaluate", description="Measure SAEs on held-out text, with 95%% intervals.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder of an SAE, or user/repo:folder")
    parser.add_argument("--windows", type=int, help="windows of text to read (default: eval_windows of its Config)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every metric, interval and histogram to it")
    return parser


def command(words: list[str]) -> None:
    """Print the table that `python results.py evaluate` is asked for, and write its file."""
    args = evaluate_parser().parse_args(words)
    measured = measure(args.checkpoints, args.windows)
    print(format_measured(measured))
    if args.json:
        write_durably(args.json, json.dumps(measured, indent=1).encode())
        print(f"\nall metrics  {args.json}")
