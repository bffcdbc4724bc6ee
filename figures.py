"""All figures, in one style: tables and arrays in, matplotlib figures out. Nothing here reads a disk or runs a model.

A colour is a type of SAE. In the Pareto plot all types share the panels; in the others each type has its own, where
darker is a later SAE of the table: the denser, as results.load_results sorts them.
"""

import math
from collections.abc import Sequence
from itertools import cycle, zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from config import NOT_USED_BY, result_fields, setting

TYPES = {  # sae_type -> name, and colour (Okabe and Ito's, for colour-blind eyes); in the order of tables and legends
    "vanilla": ("Vanilla", "#CC79A7"),
    "topk": ("TopK", "#0072B2"),
    "batchtopk": ("BatchTopK", "#D55E00"),
    "jumprelu": ("JumpReLU", "#009E73"),
}
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")
WIDTH = 7.5  # inches: two columns of a paper
BINS = 40  # of cosines
BINS_PER_DECADE = 3  # of densities: wider than a factor of 2, so that none is empty between once and twice
LEGEND_LETTERS = 26  # that fit below a panel at 7 points
SETTINGS = ("top_k", "l1_coeff")
FORMATS = {  # of fields in a label, which has those in which SAEs of its type differ
    "run": "{}", "model_name": "{}", "layer": "layer {}", "site": "{}", "dict_size": "dict {}", "lr": "lr {:g}",
    "batch_size": "batch {}", "num_tokens": "{:g} tokens", "input_unit_norm": "norm {}", "seed": "seed {}",
}  # fmt: skip


class Panels(NamedTuple):
    """A figure, and its panels from the top down, by type."""

    figure: Figure
    axes: dict[str, list[Axes]]


def plot_pareto(df: pd.DataFrame) -> Figure:
    """Explained variance, and the share of cross-entropy recovered, against L0; lines join what may be compared: SAEs
    that differ in their setting alone.

    Colours are types; markers and dashes are dict_sizes where there are several, the most frequent one solid.
    SAEs without an evaluation, with numbers that are not finite or with an L0 of 0 are left out. Raises ValueError when
    none remains.
    """
    panels = {"explained_variance": "Explained variance (share)", "ce_recovered": "CE recovered (share)"}
    df = _evaluated(df).sort_values("l0")
    if df.empty:
        raise ValueError("nothing to plot: no SAE has an evaluation with finite numbers and an L0 above 0")
    alike = _told_apart(df, but=["run", "dict_size"])
    widths = sorted(df["dict_size"].unique())
    several = len(widths) > 1
    markers = dict(zip(widths if several else TYPES, cycle(MARKERS)))
    dashes = _dashes(df)
    look = dict(linewidth=1.4, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels.items()):
        for (sae_type, width, *_), saes in df.groupby(["sae_type", "dict_size", *alike], dropna=False):
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
        _style(axes)

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


def plot_training(df: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Loss, explained variance and L0 over training, of each SAE of a table.

    history: rows of run, name, tokens and metrics, as results.load_history gives them. Lines are training batches, dots
    held-out text. Explained variance below 0 is not shown. Raises ValueError when no SAE of the table has a row.
    """
    metrics = {"loss": "Loss", "explained_variance": "Expl. variance", "l0": "L0"}
    figure, panels = _over_training(df, history, metrics)
    loss, variance, l0 = next(iter(panels.values()))
    if max(axes.dataLim.y1 for axes, *_ in panels.values()) > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        loss.yaxis.set_minor_locator(NullLocator())
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    shown = [axes.dataLim for _, axes, _ in panels.values()]
    lowest, highest = min(box.y0 for box in shown), max(box.y1 for box in shown)
    if lowest < 0 < highest:
        variance.set_ylim(0, 1.05 * highest)
    if max(axes.dataLim.y1 for *_, axes in panels.values()) > 0:
        l0.set_yscale("log", base=2)
        l0.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


def plot_dead(df: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """The share of dead latents over training, of each SAE of a table; see `plot_training`."""
    figure, panels = _over_training(df, history, {"dead_share": "Dead latents"})
    highest = max(0.01, *(axes.dataLim.y1 for (axes,) in panels.values()))
    axes = next(iter(panels.values()))[0]
    axes.set_ylim(-0.03 * highest, 1.06 * highest)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return figure


def plot_density(df: pd.DataFrame, densities: Sequence[Float[np.ndarray, "dict_size"]]) -> Figure:
    """Histograms of how often latents fire: one array for each row of the table, from evaluation.feature_density.

    A latent's density is the share of tokens at which it fires; those that never do have no place on the axis, so the
    legend gives their share of all. Raises ValueError when no latent fires, or there is not one array for each row.
    """
    _check_one_each(df, densities)
    lowest = min((d[d > 0].min() for d in densities if (d > 0).any()), default=None)
    if lowest is None:
        raise ValueError("nothing to plot: no latent fires")
    decades = max(1, -math.floor(math.log10(lowest)))
    edges = np.logspace(-decades, 0, BINS_PER_DECADE * decades + 1)
    labels = [f"{label}, {(d == 0).mean():.0%} never" for label, d in zip(row_labels(df), densities)]
    figure, panels = _histograms(df, densities, edges, labels, "Share of tokens")
    axes = next(iter(panels.values()))[0]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def plot_cosines(df: pd.DataFrame, cosines: Sequence[Float[np.ndarray, "latents"]]) -> Figure:
    """Histograms of the cosine between each latent's decoder row and the nearest other one.

    One array for each row of the table, from evaluation.nearest_cosines. Two latents at 1 are the same direction twice.
    Raises ValueError when there is not one for each.
    """
    _check_one_each(df, cosines)
    edges = np.linspace(min(0.0, *(c.min() for c in cosines)), 1, BINS + 1)
    figure, _ = _histograms(df, cosines, edges, row_labels(df), "Cosine to nearest")
    return figure


def save_figures(
    df: pd.DataFrame,
    folder: str | Path,
    history: pd.DataFrame | None = None,
    cosines: Sequence[Float[np.ndarray, "latents"] | None] = (),
) -> list[Path]:
    """Write pareto and, from a history, training and dead and, from cosines, cosines, as .png and .pdf; returns paths.

    cosines: one for each row of df, None for one without a checkpoint. The folder must exist. Figures in which there
    would be nothing yet are left out.
    """
    figures = {} if _evaluated(df).empty else {"pareto": plot_pareto(df)}
    if history is not None and not _with_history(df, history).empty:
        figures |= {"training": plot_training(df, history), "dead": plot_dead(df, history)}
    if known := [i for i, c in enumerate(cosines) if c is not None and len(c)]:
        figures["cosines"] = plot_cosines(df.iloc[known], [cosines[i] for i in known])
    return [path for name, figure in figures.items() for path in save_figure(figure, folder, name)]


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as name.png and name.pdf into a folder that exists; returns the two paths."""
    paths = [Path(folder) / f"{name}.png", Path(folder) / f"{name}.pdf"]
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: many publishers refuse the default, Type 3
        for path in paths:
            figure.savefig(path, dpi=150)
    return paths


# ---- the style ----


def _style(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _evaluated(df: pd.DataFrame) -> pd.DataFrame:
    """The rows with an evaluation that has a place among the Pareto fronts."""
    metrics = ["l0", "explained_variance", "ce_recovered"]
    return df[np.isfinite(df[metrics]).all(axis=1) & (df["l0"] > 0)]


def _with_history(df: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    known = set(zip(history["run"], history["name"]))
    return df[[key in known for key in zip(df["run"], df["name"])]]


def _check_one_each(df: pd.DataFrame, arrays: Sequence[np.ndarray]) -> None:
    if not len(df) == len(arrays) > 0:
        raise ValueError(f"df = {len(df)} rows, and {len(arrays)} arrays: give one array for each row, and some")


def _dashes(df: pd.DataFrame) -> dict[int, str]:
    """Of each dict_size, the most frequent one solid."""
    return dict(zip(df["dict_size"].value_counts().index, cycle(DASHES)))


def _told_apart(df: pd.DataFrame, but: Sequence[str]) -> list[str]:
    """The columns that tell SAEs of a type with one setting apart, without `but`."""
    return [f for f in ("run", *result_fields()) if f in df and f not in ("sae_type", *SETTINGS, *but)]


def row_labels(df: pd.DataFrame, but: Sequence[str] = ()) -> list[str]:
    """A name for each row, among those of its type: the setting, and the fields in which they differ, without `but`."""
    fields = _told_apart(df, but)
    values = df.groupby("sae_type")[fields].nunique(dropna=False)
    labels = []
    for sae in df.itertuples():
        differ = [f for f in fields if values.at[sae.sae_type, f] > 1 and f not in NOT_USED_BY[sae.sae_type]]
        labels.append(", ".join([setting(sae), *(FORMATS.get(f, f"{f} {{}}").format(getattr(sae, f)) for f in differ)]))
    return labels


def _lines(df: pd.DataFrame) -> list[dict]:
    """Colour and dashes of each row: within a type from light to dark."""
    shades = {t: iter(_shades(TYPES[t][1], count)) for t, count in df["sae_type"].value_counts().items()}
    dashes = _dashes(df)
    return [
        dict(color=next(shades[sae.sae_type]), linestyle=dashes[sae.dict_size], linewidth=1.2)
        for sae in df.itertuples()
    ]


def _shades(colour: str, count: int) -> list[tuple[float, ...]]:
    """The colour mixed with white, itself, mixed with black; itself alone where one is asked for."""
    base = np.array(to_rgb(colour))
    amounts = np.linspace(-0.5, 0.5, count) if count > 1 else [0.0]
    return [tuple(base + abs(amount) * ((amount < 0) - base)) for amount in amounts]


def _panels(df: pd.DataFrame, y_labels: Sequence[str], x_label: str, labels: Sequence[str], height: float) -> Panels:
    """A column of panels for each type in the table, a row for each y label, and the legend of its SAEs below it.

    height: of a panel, in inches. Axes are shared along rows and columns.
    """
    types = [sae_type for sae_type in TYPES if sae_type in set(df["sae_type"])]
    entries: dict[str, list[Line2D]] = {sae_type: [] for sae_type in types}
    for sae_type, label, line in zip(df["sae_type"], labels, _lines(df)):
        entries[sae_type].append(Line2D([], [], label=label, **line))
    legend_height = 0.05 + 0.15 * max(map(len, entries.values()))
    size = WIDTH * max(2, len(types)) / len(TYPES), height * len(y_labels) + 0.6 + legend_height
    figure = Figure(figsize=size, layout="constrained")
    letters = 7 * min(1, LEGEND_LETTERS / max(map(len, labels)))
    heights = [*(height for _ in y_labels), legend_height]
    grid = figure.add_gridspec(len(heights), len(types), height_ratios=heights)
    panels: dict[str, list[Axes]] = {sae_type: [] for sae_type in types}
    for column, sae_type in enumerate(types):
        name, colour = TYPES[sae_type]
        for row, y_label in enumerate(y_labels):
            above, left = (panels[sae_type] or [None])[0], panels[types[0]][row] if column else None
            axes = figure.add_subplot(grid[row, column], sharex=above or left, sharey=left)
            panels[sae_type].append(axes)
            _style(axes)
            axes.tick_params(labelleft=column == 0, labelbottom=row == len(y_labels) - 1)
            if column == 0:
                axes.set_ylabel(y_label, fontsize=9)
        panels[sae_type][0].set_title(name, fontsize=9, color=colour, fontweight="bold")
        panels[sae_type][-1].set_xlabel(x_label, fontsize=9)
        below = figure.add_subplot(grid[-1, column])
        below.set_axis_off()
        layout = dict(handlelength=2, borderpad=0, labelspacing=0.3, borderaxespad=0)
        below.legend(handles=entries[sae_type], loc="upper center", fontsize=letters, frameon=False, **layout)
    figure.align_ylabels()
    return Panels(figure, panels)


def _over_training(df: pd.DataFrame, history: pd.DataFrame, metrics: dict[str, str]) -> Panels:
    """Panels of metrics, name -> y label: "train/..." as lines, "eval/..." as dots."""
    curves = dict(list(history.groupby(["run", "name"])))
    df = _with_history(df, history)
    if df.empty:
        raise ValueError("nothing to plot: no SAE of the table has a line of metrics")
    figure, panels = _panels(df, list(metrics.values()), "Training activations", row_labels(df), 1.3)
    dots = dict(linestyle="", marker="o", markersize=3)
    for sae, line in zip(df.itertuples(), _lines(df)):
        curve = curves[sae.run, sae.name]
        for metric, axes in zip(metrics, panels[sae.sae_type]):
            for key, look in ((f"train/{metric}", line), (f"eval/{metric}", line | dots)):
                if key in curve:
                    known = curve[np.isfinite(curve[key])]
                    axes.plot(known["tokens"], known[key], **look)
    first = next(iter(panels.values()))[0]
    first.xaxis.set_major_locator(MaxNLocator(4))
    first.xaxis.set_major_formatter(EngFormatter(sep=""))
    first.set_xlim(left=0)
    kinds = [
        Line2D([], [], color="0.4", linewidth=1.2, label="training batches"),
        Line2D([], [], color="0.4", label="held-out text", **dots),
    ]
    figure.legend(handles=kinds, loc="outside lower center", fontsize=7, frameon=False, ncols=2)
    return Panels(figure, panels)


def _histograms(
    df: pd.DataFrame, values: Sequence[np.ndarray], edges: np.ndarray, labels: Sequence[str], x_label: str
) -> Panels:
    """A panel for each type, in it the outline of each SAE's histogram, in shares of all its values."""
    figure, panels = _panels(df, ["Share of latents"], x_label, labels, 1.7)
    for sae_type, value, line in zip(df["sae_type"], values, _lines(df)):
        counts, _ = np.histogram(value, edges)
        panels[sae_type][0].stairs(counts / len(value), edges, **line)
    first = next(iter(panels.values()))[0]
    first.set_xlim(edges[0], edges[-1])
    first.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    return Panels(figure, panels)
