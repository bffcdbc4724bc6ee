"""Draw all figures, in one style: tables and arrays in, matplotlib figures out, without a disk or a model.

A colour is a type of SAE. In the Pareto plot all types share the panels; in the others each type has its own, where
darker lines are later rows of the table: the denser SAEs, as results.load_results sorts them.
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

from config import RESULT_FIELDS, TYPES, setting, unused_by
from runtime.checks import require

MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")
WIDTH, COLUMN_WIDTH = 7.5, 1.875  # inches: two columns of a paper, and the panels of one type
BINS = 40  # of cosines
BINS_PER_DECADE = 3  # of densities: wider than a factor of 2, so that none is empty between once and twice
LEGEND_LETTERS = 26  # that fit below a panel at 7 points
SETTINGS = {row.sparsity for row in TYPES.values()}  # the fields that decide an SAE's L0
FORMATS = {  # field -> how a label shows it, if the SAEs of a type differ in it
    "run": "{}", "model_name": "{}", "layer": "layer {}", "site": "{}", "dict_size": "dict {}", "lr": "lr {:g}",
    "batch_size": "batch {}", "num_tokens": "{:g} tokens", "input_unit_norm": "norm {}", "seed": "seed {}",
}  # fmt: skip


class Panels(NamedTuple):
    """A figure, and its panels from the top down, by type."""

    figure: Figure
    axes: dict[str, list[Axes]]

    @property
    def first(self) -> list[Axes]:
        return next(iter(self.axes.values()))


def plot_pareto(df: pd.DataFrame) -> Figure:
    """Plot explained variance, and the share of cross-entropy recovered, against L0.

    Lines join SAEs that differ in their setting alone, which may be compared. Colours are types; markers and dashes are
    dict_sizes where there are several, the most frequent one solid. SAEs without an evaluation, with numbers that are
    not finite or with an L0 of 0 are left out. Raises ValueError when none remains.
    """
    panels = {"explained_variance": "Explained variance (share)", "ce_recovered": "CE recovered (share)"}
    df = _evaluated(df).sort_values("l0")
    require(len(df), "nothing to plot: no SAE has an evaluation with finite numbers and an L0 above 0")
    alike = _told_apart(df, but=["run", "dict_size"])
    widths = sorted(df["dict_size"].unique())
    several = len(widths) > 1
    markers = dict(zip(widths if several else TYPES, cycle(MARKERS)))
    dashes = _dashes(df)
    look = dict(linewidth=1.4, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels.items()):
        for (sae_type, width, *_), saes in df.groupby(["sae_type", "dict_size", *alike], dropna=False):
            row, marker = TYPES[sae_type], markers[width if several else sae_type]
            style = dict(color=row.colour, marker=marker, linestyle=dashes[width])
            axes.plot(saes["l0"], saes[metric], label=f"{row.label} {width}", **style, **look)
        low, high = df["l0"].min(), df["l0"].max()
        margin = max(1.2, 2 * math.sqrt(low / high))  # at least two octaves in sight, so two powers of 2
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("L0 (latents active per token)", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        _style(axes)

    colours = [
        Line2D([], [], label=row.label, color=row.colour, marker="" if several else markers[sae_type], **look)
        for sae_type, row in TYPES.items()
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
    """Plot loss, explained variance and L0 over training, for each SAE of a table.

    history: rows of run, name, tokens and metrics, as results.load_history gives them. Lines are training batches, dots
    held-out text. Explained variance below 0 is not shown. Raises ValueError when no SAE of the table has a row.
    """
    metrics = {"loss": "Loss", "explained_variance": "Expl. variance", "l0": "L0"}
    panels = _over_training(df, history, metrics)
    loss, variance, l0 = panels.first
    highest_loss, highest_variance, highest_l0 = (max(a.dataLim.y1 for a in row) for row in zip(*panels.axes.values()))
    if highest_loss > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        loss.yaxis.set_minor_locator(NullLocator())
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if min(axes.dataLim.y0 for _, axes, _ in panels.axes.values()) < 0 < highest_variance:
        variance.set_ylim(0, 1.05 * highest_variance)
    if highest_l0 > 0:
        l0.set_yscale("log", base=2)
        l0.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return panels.figure


def plot_dead(df: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Plot the share of dead latents over training, for each SAE of a table; see `plot_training`."""
    panels = _over_training(df, history, {"dead_share": "Dead latents"})
    highest = max(0.01, *(axes.dataLim.y1 for (axes,) in panels.axes.values()))
    panels.first[0].set_ylim(-0.03 * highest, 1.06 * highest)
    panels.first[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return panels.figure


def plot_density(df: pd.DataFrame, densities: Sequence[Float[np.ndarray, "dict_size"]]) -> Figure:
    """Draw histograms of how often latents fire: one array for each row of the table, from evaluation.feature_density.

    A latent's density is the share of tokens at which it fires; latents that never do have no place on the axis, so the
    legend says how many they are. Raises ValueError when no latent fires, or there is not one array for each row.
    """
    _check_one_each(df, densities)
    fired = np.concatenate([d[d > 0] for d in densities])
    require(len(fired), "nothing to plot: no latent fires")
    decades = max(1, -math.floor(math.log10(fired.min())))
    edges = np.logspace(-decades, 0, BINS_PER_DECADE * decades + 1)
    labels = [f"{label}, {(d == 0).mean():.0%} never" for label, d in zip(row_labels(df), densities)]
    panels = _histograms(df, densities, edges, labels, "Share of tokens")
    panels.first[0].set_xscale("log")
    panels.first[0].xaxis.set_major_locator(LogLocator(numticks=5))
    panels.first[0].xaxis.set_minor_locator(NullLocator())
    return panels.figure


def plot_cosines(df: pd.DataFrame, cosines: Sequence[Float[np.ndarray, "latents"]]) -> Figure:
    """Draw histograms of the cosine between each latent's decoder row and the nearest other one.

    cosines: one array for each row of the table, from latents.nearest_cosines. Two latents at 1 are one direction,
    learnt twice. Raises ValueError when there is not one array for each row.
    """
    _check_one_each(df, cosines)
    edges = np.linspace(min(0.0, *(c.min() for c in cosines)), 1, BINS + 1)
    return _histograms(df, cosines, edges, row_labels(df), "Cosine to nearest").figure


def save_figures(
    df: pd.DataFrame,
    folder: str | Path,
    history: pd.DataFrame | None = None,
    cosines: Sequence[Float[np.ndarray, "latents"] | None] = (),
) -> list[Path]:
    """Write pareto, training and dead (which need a history) and cosines, as .png and .pdf; return their paths.

    cosines: one array for each row of df, None for an SAE without a checkpoint. The folder must exist. Figures that
    would be empty are left out.
    """
    figures = {} if _evaluated(df).empty else {"pareto": plot_pareto(df)}
    if history is not None and not _with_history(df, history).empty:
        figures |= {"training": plot_training(df, history), "dead": plot_dead(df, history)}
    if known := [i for i, c in enumerate(cosines) if c is not None and len(c)]:
        figures["cosines"] = plot_cosines(df.iloc[known], [cosines[i] for i in known])
    return [path for name, figure in figures.items() for path in save_figure(figure, folder, name)]


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write a figure as name.png and name.pdf into a folder that exists; return the two paths."""
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
    """Select the rows whose evaluation has a place in the Pareto plot."""
    metrics = ["l0", "explained_variance", "ce_recovered"]
    return df[np.isfinite(df[metrics]).all(axis=1) & (df["l0"] > 0)]


def _with_history(df: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Select the rows that have a line of metrics."""
    known = set(zip(history["run"], history["name"]))
    return df[[key in known for key in zip(df["run"], df["name"])]]


def _check_one_each(df: pd.DataFrame, arrays: Sequence[np.ndarray]) -> None:
    said = f"df = {len(df)} rows, and {len(arrays)} arrays: give one array for each row, and at least one"
    require(len(df) == len(arrays) > 0, said)


def _dashes(df: pd.DataFrame) -> dict[int, str]:
    """Choose the dashes of each dict_size: the most frequent one is solid."""
    return dict(zip(df["dict_size"].value_counts().index, cycle(DASHES)))


def _told_apart(df: pd.DataFrame, but: Sequence[str]) -> list[str]:
    """List the columns, except `but`, that tell apart SAEs of one type and setting."""
    return [f for f in ("run", *RESULT_FIELDS) if f in df and f not in ("sae_type", *SETTINGS, *but)]


def row_labels(df: pd.DataFrame, but: Sequence[str] = ()) -> list[str]:
    """Name each row: its setting, and the fields, except `but`, in which the rows of its type differ."""
    fields = _told_apart(df, but)
    values = df.groupby("sae_type")[fields].nunique(dropna=False)
    labels = []
    for sae in df.itertuples():
        differ = [f for f in fields if values.at[sae.sae_type, f] > 1 and f not in unused_by(sae.sae_type)]
        labels.append(", ".join([setting(sae), *(FORMATS.get(f, f"{f} {{}}").format(getattr(sae, f)) for f in differ)]))
    return labels


def _lines(df: pd.DataFrame) -> list[dict]:
    """Choose colour and dashes of each row: from light to dark within a type."""
    shades = {t: iter(_shades(TYPES[t].colour, count)) for t, count in df["sae_type"].value_counts().items()}
    dashes = _dashes(df)
    both = zip(df["sae_type"], df["dict_size"])
    return [dict(color=next(shades[t]), linestyle=dashes[width], linewidth=1.2) for t, width in both]


def _shades(colour: str, count: int) -> list[tuple[float, ...]]:
    """Mix a colour with less and less white, then with more and more black; one shade is the colour itself."""
    base = np.array(to_rgb(colour))
    amounts = np.linspace(-0.5, 0.5, count) if count > 1 else [0.0]
    return [tuple(base + abs(amount) * ((amount < 0) - base)) for amount in amounts]


def _panels(df: pd.DataFrame, y_labels: Sequence[str], x_label: str, labels: Sequence[str], height: float) -> Panels:
    """Lay out a column of panels for each type in the table: a panel for each y label, and the legend of its SAEs.

    height: of a panel, in inches. Axes are shared along rows and columns.
    """
    types = [sae_type for sae_type in TYPES if sae_type in set(df["sae_type"])]
    entries: dict[str, list[Line2D]] = {sae_type: [] for sae_type in types}
    for sae_type, label, line in zip(df["sae_type"], labels, _lines(df)):
        entries[sae_type].append(Line2D([], [], label=label, **line))
    legend_height = 0.05 + 0.15 * max(map(len, entries.values()))
    size = COLUMN_WIDTH * max(2, len(types)), height * len(y_labels) + 0.6 + legend_height
    figure = Figure(figsize=size, layout="constrained")
    letters = 7 * min(1, LEGEND_LETTERS / max(map(len, labels)))
    heights = [*(height for _ in y_labels), legend_height]
    grid = figure.add_gridspec(len(heights), len(types), height_ratios=heights)
    panels: dict[str, list[Axes]] = {sae_type: [] for sae_type in types}
    for column, sae_type in enumerate(types):
        for row, y_label in enumerate(y_labels):
            above, left = (panels[sae_type] or [None])[0], panels[types[0]][row] if column else None
            axes = figure.add_subplot(grid[row, column], sharex=above or left, sharey=left)
            panels[sae_type].append(axes)
            _style(axes)
            axes.tick_params(labelleft=column == 0, labelbottom=row == len(y_labels) - 1)
            if column == 0:
                axes.set_ylabel(y_label, fontsize=9)
        panels[sae_type][0].set_title(
            TYPES[sae_type].label, fontsize=9, color=TYPES[sae_type].colour, fontweight="bold"
        )
        panels[sae_type][-1].set_xlabel(x_label, fontsize=9)
        below = figure.add_subplot(grid[-1, column])
        below.set_axis_off()
        layout = dict(handlelength=2, borderpad=0, labelspacing=0.3, borderaxespad=0)
        below.legend(handles=entries[sae_type], loc="upper center", fontsize=letters, frameon=False, **layout)
    figure.align_ylabels()
    return Panels(figure, panels)


def _over_training(df: pd.DataFrame, history: pd.DataFrame, metrics: dict[str, str]) -> Panels:
    """Draw a panel for each metric (name -> y label): "train/..." as lines, "eval/..." as dots."""
    curves = dict(list(history.groupby(["run", "name"])))
    df = _with_history(df, history)
    require(len(df), "nothing to plot: no SAE of the table has a line of metrics")
    panels = _panels(df, list(metrics.values()), "Training activations", row_labels(df), 1.3)
    dots = dict(linestyle="", marker="o", markersize=3)
    for sae, line in zip(df.itertuples(), _lines(df)):
        curve = curves[sae.run, sae.name]
        for metric, axes in zip(metrics, panels.axes[sae.sae_type]):
            for key, look in ((f"train/{metric}", line), (f"eval/{metric}", line | dots)):
                if key in curve:
                    known = curve[np.isfinite(curve[key])]
                    axes.plot(known["tokens"], known[key], **look)
    panels.first[0].xaxis.set_major_locator(MaxNLocator(4))
    panels.first[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels.first[0].set_xlim(left=0)
    kinds = [
        Line2D([], [], color="0.4", linewidth=1.2, label="training batches"),
        Line2D([], [], color="0.4", label="held-out text", **dots),
    ]
    panels.figure.legend(handles=kinds, loc="outside lower center", fontsize=7, frameon=False, ncols=2)
    return panels


def _histograms(
    df: pd.DataFrame, values: Sequence[np.ndarray], edges: np.ndarray, labels: Sequence[str], x_label: str
) -> Panels:
    """Draw a panel for each type, in it the outline of each SAE's histogram, in shares of all its values."""
    panels = _panels(df, ["Share of latents"], x_label, labels, 1.7)
    for sae_type, value, line in zip(df["sae_type"], values, _lines(df)):
        counts, _ = np.histogram(value, edges)
        panels.axes[sae_type][0].stairs(counts / len(value), edges, **line)
    panels.first[0].set_xlim(edges[0], edges[-1])
    panels.first[0].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    return panels
