"""Runs and checkpoints -> tables, Pareto plots and feature dashboards.

python results.py runs/tiny-20261123-183000             prints the table, writes results.csv and the figures there
python results.py wandb:entity/project --group NAME     the same from W&B, written into the current folder
python results.py dashboard <checkpoint>                writes a page with the latents of an SAE
"""

import json
import math
import re
import sys
from itertools import cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
import tyro
import wandb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from sae import BaseAutoencoder

TYPES = {  # sae_type -> name, and colour (Okabe and Ito's, for colour-blind eyes); in the order of tables and legends
    "vanilla": ("Vanilla", "#CC79A7"),
    "topk": ("TopK", "#0072B2"),
    "batchtopk": ("BatchTopK", "#D55E00"),
    "jumprelu": ("JumpReLU", "#009E73"),
}
METRICS = (
    "l0", "l1", "mse", "explained_variance", "ce", "ce_clean", "ce_zero", "ce_mean", "ce_degradation", "ce_recovered",
    "ce_recovered_mean", "kl", "dead_share",
)  # fmt: skip
CHECKPOINT = re.compile("step-[0-9]{1,18}")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")


def load_results(source: str | Path, *, group: str | None = None) -> pd.DataFrame:
    """One row per SAE, sorted by type (in the order of TYPES), dict_size and l0; with `group`, of that sweep alone.

    source: a folder (of one SAE, a sweep or many sweeps), or "wandb:entity/project".
    Columns:
        run, name            of the sweep and of the SAE: their folders' names, or W&B's group and name
        ...                  the fields of Config; a field that is None can read NaN
        step, tokens         how far training has come, which while it runs may be past the last evaluation
        l0, mse, ...         the last value of each "eval/..." metric; those in METRICS are NaN before an evaluation
        checkpoint           path of the latest checkpoint; None where there is none, and from W&B
    Raises ValueError when the source is missing or holds no runs, or a file in it is corrupt; FileNotFoundError when
    a metrics.jsonl has no config.json beside it; wandb.Error when W&B refuses.
    """
    if str(source).startswith("wandb:"):
        rows = _wandb_rows(str(source).removeprefix("wandb:"), group)
    else:
        rows = _local_rows(Path(source), group)
    if not rows:
        raise ValueError(f"{source}: holds no runs" + (f" of the sweep {group!r}" if group is not None else ""))
    df = pd.DataFrame(rows)
    df["checkpoint"] = pd.Series(
        [row["checkpoint"] for row in rows], dtype=object
    )  # a column of str would make None NaN
    rank = {sae_type: i for i, sae_type in enumerate(TYPES)}
    by = ["sae_type", "dict_size", "l0"]
    return df.sort_values(by, key=lambda c: c.map(rank) if c.name == "sae_type" else c, ignore_index=True)


def _local_rows(root: Path, group: str | None) -> list[dict]:
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    rows = []
    for folder in sorted(path.parent for path in root.rglob("metrics.jsonl")):
        run, name = folder.resolve().parts[-2:]
        if group is not None and run != group:
            continue
        config = _parse((folder / "config.json").read_bytes(), f"{folder / 'config.json'}")
        if missing := {"sae_type", "dict_size", "top_k", "l1_coeff"} - config.keys():
            raise ValueError(f"{folder / 'config.json'}: no field {min(missing)!r}; it is not a Config")
        steps = {int(p.name[5:]): str(p) for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name) and p.is_dir()}
        checkpoint = steps[max(steps)] if steps else None
        rows.append(_row(run, name, config, _read_metrics(folder / "metrics.jsonl"), checkpoint))
    return rows


def _wandb_rows(project: str, group: str | None) -> list[dict]:
    if project.count("/") != 1 or not all(project.split("/")):
        raise ValueError(f'wandb:{project}: give "wandb:entity/project"')
    filters = {"group": group} if group is not None else {}
    runs = wandb.Api().runs(project, filters=filters, lazy=False)  # lazy would make a request for every run
    return [_row(run.group or "", run.name, run.config, run.summary_metrics, None) for run in runs]


def _row(run: str, name: str, config: dict, last: dict, checkpoint: str | None) -> dict:
    progress = {"step": last.get("step", 0), "tokens": last.get("tokens", 0)}
    metrics = {key.removeprefix("eval/"): float(last[key]) for key in last if key.startswith("eval/")}  # W&B has "NaN"
    missing = dict.fromkeys(METRICS, math.nan)
    return {"run": run, "name": name} | config | progress | missing | metrics | {"checkpoint": checkpoint}


def _read_metrics(path: Path) -> dict[str, float]:
    """The last value of each key, as the summary of a W&B run has it."""
    lines = path.read_bytes().splitlines()
    if lines and not lines[-1].endswith(b"}"):
        lines.pop()  # a killed process left it incomplete
    last = {}
    for number, line in enumerate(lines, start=1):
        row = _parse(line, f"{path}, line {number}")
        if wrong := [key for key, value in row.items() if not isinstance(value, int | float)]:
            raise ValueError(f"{path}, line {number}: {wrong[0]!r} is not a number")
        last |= row
    return last


def _parse(text: bytes, place: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds {type(value).__name__}, not an object of fields")
    return value


def format_table(df: pd.DataFrame) -> str:
    """Plain text of at most 80 columns, a row per SAE; a table per sweep, under its name, where df has several.

    setting is what decides the SAE's L0: k of TopK and BatchTopK, l1_coeff of the others. CE recovered is the share of
    the loss of zero ablation that the SAE gives back, dead % that of latents. "-" where there is no evaluation yet.
    """
    if df["run"].nunique() > 1:
        return "\n\n".join(f"{run[:80]}\n{format_table(saes)}" for run, saes in df.groupby("run"))
    table = [("type", "dict", "setting", "L0", "expl. var.", "CE recovered", "dead %")]
    for sae in df.itertuples():
        setting = f"k={sae.top_k}" if sae.sae_type in ("topk", "batchtopk") else f"l1={sae.l1_coeff:g}"
        numbers = (sae.l0, 1), (sae.explained_variance, 3), (sae.ce_recovered, 3), (100 * sae.dead_share, 1)
        table.append((sae.sae_type, str(sae.dict_size), setting, *(_number(*number) for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*table)]
    row = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<><>>>>", widths))
    return "\n".join(row.format(*cells) for cells in table)


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"


def plot_pareto(df: pd.DataFrame) -> Figure:
    """Explained variance, and the share of cross-entropy recovered, against L0; a line per type and dict_size.

    Colours are types; markers and dashes are dict_sizes where there are several, the most frequent one solid.
    A line joins all rows of its type and dict_size, so give SAEs that may be compared. SAEs without an evaluation, with
    numbers that are not finite or with an L0 of 0 are left out. Raises ValueError when none remains.
    """
    panels = {"explained_variance": "Explained variance (share)", "ce_recovered": "CE recovered (share)"}
    df = df[np.isfinite(df[["l0", *panels]]).all(axis=1) & (df["l0"] > 0)].sort_values("l0")
    if df.empty:
        raise ValueError("nothing to plot: no SAE has an evaluation with finite numbers and an L0 above 0")
    widths = sorted(df["dict_size"].unique())
    several = len(widths) > 1
    markers = dict(zip(widths if several else TYPES, cycle(MARKERS)))
    dashes = dict(zip(df["dict_size"].value_counts().index, cycle(DASHES)))
    look = dict(linewidth=1.4, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels.items()):
        for (sae_type, width), saes in df.groupby(["sae_type", "dict_size"]):
            name, colour = TYPES[sae_type]
            style = dict(color=colour, marker=markers[width if several else sae_type], linestyle=dashes[width])
            axes.plot(saes["l0"], saes[metric], label=f"{name} {width}", **style, **look)
        low, high = df["l0"].min(), df["l0"].max()
        margin = max(1.2, 2 * math.sqrt(low / high))  # two octaves in sight at least, so two powers of 2
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("L0 (latents active per token)", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)

    colours = [
        Line2D([], [], label=name, color=colour, marker="" if several else markers[sae_type], **look)
        for sae_type, (name, colour) in TYPES.items()
        if sae_type in set(df["sae_type"])
    ]
    shapes = [
        Line2D([], [], label=f"{width} latents", color="0.4", marker=markers[width], linestyle=dashes[width], **look)
        for width in widths
        if several
    ]
    rows = [row for row in (colours, shapes) if row]
    blank = Line2D([], [], linestyle="", label=" ")
    handles = [handle for column in zip_longest(*rows, fillvalue=blank) for handle in column]  # legends fill columns
    layout = dict(ncols=max(map(len, rows)), handlelength=2.4, handletextpad=0.6, columnspacing=1.2)
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False, **layout)
    return figure


def save_figures(df: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write plot_pareto(df) as pareto.png and pareto.pdf into a folder that exists; returns the two paths."""
    figure = plot_pareto(df)
    paths = [Path(folder) / "pareto.png", Path(folder) / "pareto.pdf"]
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: many publishers refuse the default, Type 3
        for path in paths:
            figure.savefig(path, dpi=150)
    return paths


def feature_dashboard(
    sae: "BaseAutoencoder",
    path: str | Path = "dashboard.html",
    *,
    model: "TransformerBridge | None" = None,
    windows: int = 1024,
) -> Path:
    """Write one HTML file, which needs no network, with a table of the SAE's latents and what is known of each:

    density, largest activation, histogram, the contexts that activate it most, contexts from each quarter of its
    activations, the tokens it promotes and suppresses (`dashboard.direct_effects`) and the nearest decoder rows.

    sae: of any type; only its evaluation counts. model: the language model of sae.cfg, loaded when not given.
    windows: context windows of cfg.seq_len held-out tokens to read; special tokens are not read.
    Returns the path. Raises ValueError when the model or the held-out text cannot be read.
    """
    from dashboard import write_dashboard  # which imports torch and the model's library: seconds, for a table

    path = Path(path)
    write_dashboard(sae, path, model, windows)
    return path


def dashboard(checkpoint: Path, /, windows: int = 1024, output: Path | None = None) -> None:
    """Write one HTML file with the latents of an SAE: what activates each, and what it promotes.

    Args:
        checkpoint: Folder of a saved SAE, such as runs/<sweep>/<name>/step-000195.
        windows: Context windows of held-out text to read.
        output: The file; beside the checkpoint, and named as it is, when not given.
    """
    from config import Config
    from logs import load_checkpoint

    sae = load_checkpoint(checkpoint, Config().torch_device)
    folder = checkpoint.resolve()
    path = feature_dashboard(sae, output or folder.with_name(f"{folder.name}.html"), windows=windows)
    print(f"{sae.cfg.dict_size:,} latents, {path.stat().st_size / 1e6:.1f} MB: {path}")


def main(source: str, /, group: str | None = None) -> None:
    """Print the table of trained SAEs, and write it and the Pareto plots. (results.py dashboard --help: the latents.)

    Args:
        source: Folder of one SAE, a sweep or many sweeps, or wandb:entity/project.
        group: Only the sweep of this name.
    """
    df = load_results(source, group=group)
    print(format_table(df))
    folder = Path.cwd() if source.startswith("wandb:") else Path(source)
    df.to_csv(folder / "results.csv", index=False)
    figures = save_figures(df, folder)
    print(f"\nresults.csv, {', '.join(path.name for path in figures)} written in {folder}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["dashboard"]:
            tyro.cli(dashboard, args=sys.argv[2:], prog="results.py dashboard")
        else:
            tyro.cli(main)
    except (ValueError, OSError, wandb.Error) as error:
        print(f"results.py: {error}", file=sys.stderr)
        sys.exit(2)
