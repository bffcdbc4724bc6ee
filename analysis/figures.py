"""Draw all figures, in one style: tables and arrays in, matplotlib figures out, without a disk or a model.

A colour is a type of SAE. In the Pareto plot all types share the panels; in the others each type has its own, where
darker lines are later rows of the table: the denser SAEs, as results.load_results sorts them.
"""

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from config import RESULT_FIELDS, TYPES, Config, SaeType, setting, unused_by
from runtime.checks import require

MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")
WIDTH, COLUMN_WIDTH = 7.5, 1.875  # inches: two columns of a paper, and the panels of one type
BINS_PER_DECADE = 3  # of densities: wider than a factor of 2, so that none is empty between once and twice
LEGEND_LETTERS, LEGEND_WIDTH = 26, 120  # that fit below a panel at 7 points, and below a figure at 8
LONGEST = 20  # letters of a value in a label
SETTINGS = {"target_l0", "l1_coeff"}  # the fields that decide an SAE's L0
WIDTHS = ("act_size", "target_size")  # which the sites decide
FORMATS = {  # field -> how a label shows it, if the SAEs of a type differ in it
    "run": "{}", "model_name": "{}", "layer": "layer {}", "site": "{}", "target_site": "to {}", "dict_size": "dict {}",
    "lr": "lr {:g}",
    "batch_size": "batch {}", "num_tokens": "{:g} tokens", "input_unit_norm": "norm {}", "seed": "seed {}",
}  # fmt: skip
STYLE = {
    "axes.labelsize": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
TICKS = dict(labelsize=8, grid_color="0.9", grid_linewidth=0.6)  # which are made late, without STYLE


@matplotlib.rc_context(STYLE)
def plot_pareto(df: pd.DataFrame) -> Figure:
    """Plot explained variance, and the share of cross-entropy recovered, against L0.

    Lines join SAEs that differ in their setting alone, which may be compared; each has an entry in the legend. Colours
    are types, from light to dark where a type has several lines; markers and dashes are dict_sizes where there are
    several, the most frequent one solid. SAEs that differ in their seed alone are one point, their mean, with bars of a
    standard deviation. SAEs without an evaluation, with numbers that are not finite or with an L0 of 0 are left out.
    Raises ValueError when none remains.
    """
    metrics = {"explained_variance": "Explained variance", "ce_recovered": "CE recovered"}
    df = over_seeds(_evaluated(df), ["l0", *metrics]).sort_values("l0")
    require(len(df), "nothing to plot: no SAE has an evaluation with finite numbers and an L0 above 0")
    order = {sae_type: place for place, sae_type in enumerate(TYPES)}
    several = df["dict_size"].nunique() > 1
    markers = dict(zip(sorted(df["dict_size"].unique()) if several else TYPES, cycle(MARKERS)))
    low, high = df["l0"].min(), df["l0"].max()
    margin = max(1.2, 2 * math.sqrt(low / high))  # at least two octaves in sight, so two powers of 2
    joined = ["sae_type", "dict_size", *_told_apart(df, but=["run", "dict_size"])]
    groups = [saes for _, saes in df.groupby(joined, dropna=False, sort=False)]
    groups.sort(key=lambda saes: (order[saes["sae_type"].iloc[0]], saes["dict_size"].iloc[0], saes.index.min()))
    first = pd.concat([saes.head(1) for saes in groups])
    looks = dict(linewidth=1.4, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)
    styles = [
        line | looks | dict(marker=markers[sae.dict_size if several else sae.sae_type])
        for sae, line in zip(first.itertuples(), _lines(first))
    ]

    labels = [
        ", ".join([TYPES[sae_type].label, *differing])
        for sae_type, differing in zip(first["sae_type"], _differing(first, ["run"], lambda _: 0))  # in the whole table
    ]
    entries = [Line2D([], [], label=label, **style) for label, style in zip(labels, styles)]
    columns = max(1, min(len(entries), LEGEND_WIDTH // (max(map(len, labels)) + 7)))

    figure = Figure(figsize=(WIDTH, 3.2 + 0.18 * math.ceil(len(entries) / columns)), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), metrics.items()):
        for saes, style in zip(groups, styles):
            axes.plot(saes["l0"], saes[metric], **style)
            spread = saes[saes["seeds"] > 1]
            of_seeds = dict(xerr=spread["l0_std"], yerr=spread[f"{metric}_std"], ecolor=style["color"])
            axes.errorbar(spread["l0"], spread[metric], fmt="none", elinewidth=1, **of_seeds)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlim=(low / margin, high * margin), xlabel="L0 (latents active per token)", ylabel=f"{label} (share)")
        axes.tick_params(**TICKS)

    figure.legend(handles=entries, loc="outside lower center", fontsize=8, ncols=columns, handlelength=2.4)
    return figure


def plot_training(df: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Plot loss, explained variance, L0 and, if any died, dead latents over training, for each SAE of a table.

    history: rows of run, name, tokens and metrics, as results.load_history gives them. Lines are training batches, dots
    held-out text. Explained variance below 0 is not shown. Raises ValueError when no SAE of the table has a row.
    """
    metrics = {"loss": "Loss", "explained_variance": "Expl. variance", "l0": "L0"}
    if (history.filter(like="/dead_share") > 0).any(axis=None):
        metrics["dead_share"] = "Dead latents"
    figure = _over_training(df, history, metrics)
    rows = np.reshape(figure.axes, (len(metrics) + 1, -1))[:-1]  # without the legends
    (loss, *_), (variance, *_), (l0, *_), *dead = rows
    highest_loss, highest_variance, highest_l0, *_ = (max(axes.dataLim.y1 for axes in row) for row in rows)
    if highest_loss > 0:
        loss.set_yscale("log")
        loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=6), minor_locator=NullLocator())
        loss.yaxis.set_major_formatter("{x:g}")
    if min(axes.dataLim.y0 for axes in rows[1]) < 0 < highest_variance:
        variance.set_ylim(0, 1.05 * highest_variance)
    if highest_l0 > 0:
        l0.set_yscale("log", base=2)
        l0.yaxis.set_major_formatter("{x:g}")
    for axes, *_ in dead:
        axes.yaxis.set_major_formatter(_percent)
    return figure


def plot_density(df: pd.DataFrame, densities: Sequence[Float[np.ndarray, "dict_size"]]) -> Figure:
    """Draw histograms of how often latents fire: one array for each row of the table, from latents.feature_density.

    A latent's density is the share of tokens at which it fires; latents that never do have no place on the axis, so the
    legend says how many they are. Raises ValueError when no latent fires, or there is not one array for each row.
    """
    _check_one_each(df, densities)
    fired = np.concatenate([d[d > 0] for d in densities])
    require(len(fired), "nothing to plot: no latent fires")
    decades = max(1, -math.floor(math.log10(fired.min())))
    edges = np.logspace(-decades, 0, BINS_PER_DECADE * decades + 1)
    labels = [f"{label}, {(d == 0).mean():.0%} never" for label, d in zip(row_labels(df), densities)]
    figure = _histograms(df, densities, edges, labels, "Density")
    figure.axes[0].set_xscale("log")
    figure.axes[0].xaxis.set(major_locator=LogLocator(numticks=3), minor_locator=NullLocator())
    figure.axes[0].xaxis.set_major_formatter(_percent)  # as in the dashboard
    return figure


def plot_cosines(df: pd.DataFrame, cosines: Sequence[Float[np.ndarray, "latents"]]) -> Figure:
    """Draw histograms of the cosine between each latent's decoder row and the nearest other one.

    cosines: one array for each row of the table, from latents.nearest_cosines. Two latents at 1 are one direction,
    learnt twice. Raises ValueError when there is not one array for each row.
    """
    _check_one_each(df, cosines)
    edges = np.linspace(min(0.0, *(c.min() for c in cosines)), 1, 41)
    return _histograms(df, cosines, edges, row_labels(df), "Cosine to nearest")


@matplotlib.rc_context(STYLE)
def plot_kinds(df: pd.DataFrame) -> Figure:
    """Plot explained variance against three measures of sparsity, as no single one is fair to all kinds.

    They are the latents that fire per token; the same per reconstructed hook, as a crosscoder's latents serve several;
    and the parameters in use: encoder and decoder rows of the latents that fire, and a skip connection. Colours are
    types, markers kinds. Raises ValueError when no row has an evaluation.
    """
    df = _evaluated(df)
    require(len(df), "nothing to plot: no SAE has an evaluation with finite numbers and an L0 above 0")
    hooks = _hooks(df)
    d_in, d_out = df["act_size"] * hooks, df["target_size"].fillna(df["act_size"]).astype(float) * hooks
    sparsity = {
        "L0": df["l0"],
        "L0 per reconstructed hook": df["l0"] / hooks,
        "Parameters in use": df["l0"] * (d_in + d_out) + df["skip"].eq(True) * d_in * d_out,
    }
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    kinds = kinds_of(df)
    markers = dict(zip(dict.fromkeys(kinds), MARKERS))
    for axes, (label, x) in zip(figure.subplots(1, 3, sharey=True), sparsity.items()):
        for sae_type, kind, at, value in zip(df["sae_type"], kinds, x, df["explained_variance"]):
            axes.plot(at, value, color=TYPES[sae_type].colour, marker=markers[kind], markersize=5)
        axes.set_xscale("log")
        ticks = LogLocator(subs=(1, 2, 5), numticks=9)
        axes.xaxis.set(major_locator=ticks, major_formatter=EngFormatter(sep=""), minor_locator=NullLocator())
        axes.set_xlabel(label)
        axes.tick_params(**TICKS)
    figure.axes[0].set_ylabel("Explained variance")
    entry = partial(Line2D, [], [], linestyle="")
    types = [entry(label=row.label, color=row.colour, marker="s") for row in _types(df).values()]
    shapes = [entry(label=kind, color="0.4", marker=marker) for kind, marker in markers.items()]
    figure.legend(handles=[*types, *shapes], loc="outside lower center", fontsize=8, ncols=6)
    return figure


@matplotlib.rc_context(STYLE)
def plot_layers(df: pd.DataFrame, norms: Sequence[Float[np.ndarray, "dict_size layers"]]) -> Figure:
    """Show in which layers each latent of a crosscoder is decoded: an image for each, its latents from early to late.

    norms: one array for each row of the table, from latents.norms_by_layer. Raises ValueError when there are fewer.
    """
    _check_one_each(df, norms)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.2 * len(df)), layout="constrained")
    panels, most = figure.subplots(len(df), 1, squeeze=False)[:, 0], max(of_latents.max() for of_latents in norms)
    for axes, of_latents, layers, label, sae_type in zip(panels, norms, df["layer"], row_labels(df), df["sae_type"]):
        place = np.square(of_latents) @ np.arange(len(layers))
        look = dict(aspect="auto", origin="lower", cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        image = axes.imshow(of_latents[place.argsort()].T, **look)
        axes.set_title(f"{TYPES[sae_type].label}, {label}")
        axes.set(yticks=range(len(layers)), yticklabels=layers, ylabel="Layer")
        axes.grid(False)
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel("Latents, in the order of the layer where they are decoded")
    figure.colorbar(image, ax=list(panels), label="Decoder norm")
    return figure


def save_figures(
    df: pd.DataFrame,
    folder: str | Path,
    history: pd.DataFrame | None = None,
    cosines: Sequence[Float[np.ndarray, "latents"] | None] = (),
    norms: Sequence[Float[np.ndarray, "dict_size layers"] | None] = (),
) -> list[Path]:
    """Write pareto, training (which needs a history), cosines, kinds (where there are several) and layers (of
    crosscoders) as .png and .pdf; return their paths.

    cosines, norms: one array for each row of df, None where there is no checkpoint, or no crosscoder. Empty figures are
    left out.
    """
    evaluated = _evaluated(df)
    figures = {} if evaluated.empty else {"pareto": plot_pareto(df)}
    if len({*kinds_of(evaluated)}) > 1:
        figures["kinds"] = plot_kinds(df)
    if known := [i for i, n in enumerate(norms) if n is not None]:
        figures["layers"] = plot_layers(df.iloc[known], [norms[i] for i in known])
    if history is not None and not df[["run", "name"]].merge(history).empty:
        figures["training"] = plot_training(df, history)
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


def over_seeds(df: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Make one row, their mean, of SAEs that differ in their seed alone.

    Adds seeds, the number of them, and for each metric its standard deviation over them, <metric>_std; NaN for one.
    """
    df = df.reset_index(drop=True)
    by = [field for field in RESULT_FIELDS if field in df and field != "seed"]
    alike = df.groupby(by, dropna=False, sort=False)
    spread = alike[metrics].transform("std").add_suffix("_std").assign(seeds=alike["run"].transform("size"))
    of_all = df.drop(columns=[*metrics, "seed"], errors="ignore").join([alike[metrics].transform("mean"), spread])
    return of_all[~df.duplicated(by)]


def kinds_of(df: pd.DataFrame) -> list[str]:
    """Name the kind of each row, as Config.kind does."""
    known = df[[field for field in ("layer", "site", "target_site", "skip") if field in df]]
    fields = known.astype(object).where(known.notna(), None).to_dict("records")
    return [Config(**{field: value for field, value in of_row.items() if value is not None}).kind for of_row in fields]


# ---- the style ----


def _percent(share: float, place: int | None) -> str:
    return f"{100 * share:.4g}%"


def _hooks(df: pd.DataFrame) -> Int[np.ndarray, "saes"]:
    """Count the hooks that each row reconstructs."""
    return np.array([len(layer) if isinstance(layer, tuple) else 1 for layer in df["layer"]])


def _evaluated(df: pd.DataFrame) -> pd.DataFrame:
    """Select the rows whose evaluation has a place in the Pareto plot."""
    metrics = ["l0", "explained_variance", "ce_recovered"]
    return df[np.isfinite(df[metrics]).all(axis=1) & (df["l0"] > 0)]


def _types(df: pd.DataFrame) -> dict[str, SaeType]:
    """Select the types in a table, in the order of legends."""
    return {sae_type: row for sae_type, row in TYPES.items() if sae_type in set(df["sae_type"])}


def _check_one_each(df: pd.DataFrame, arrays: Sequence[np.ndarray]) -> None:
    said = f"df = {len(df)} rows, and {len(arrays)} arrays: give one array for each row, and at least one"
    require(len(df) == len(arrays) > 0, said)


def _dashes(df: pd.DataFrame) -> dict[int, str]:
    """Choose the dashes of each dict_size: the most frequent one is solid."""
    return dict(zip(df["dict_size"].value_counts().index, cycle(DASHES)))


def _told_apart(df: pd.DataFrame, but: Sequence[str]) -> list[str]:
    """List the columns, except `but`, that tell apart SAEs of one type and setting."""
    return [f for f in ("run", *RESULT_FIELDS) if f in df and f not in ("sae_type", *SETTINGS, *WIDTHS, *but)]


def row_labels(df: pd.DataFrame, but: Sequence[str] = ()) -> list[str]:
    """Name each row: its setting, and the fields, except `but`, in which the rows of its type differ."""
    told = _differing(df, but, "sae_type")
    return [", ".join([setting(sae), *fields]) for sae, fields in zip(df.itertuples(), told)]


def _differing(df: pd.DataFrame, but: Sequence[str], among: str | Callable[[int], int]) -> list[list[str]]:
    """Write, for each row, the fields, except its setting and `but`, in which the rows of its group differ."""
    fields = _told_apart(df, but)
    values = df.groupby(among)[fields].transform("nunique", dropna=False).to_dict("records")
    return [
        [_told(f, getattr(sae, f)) for f in fields if several[f] > 1 and f not in unused_by(sae.sae_type)]
        for sae, several in zip(df.itertuples(), values)
    ]


def wrapped(label: str, width: int) -> list[str]:
    """Break a label into lines of at most `width` letters, or of one field and its value, which are never broken."""
    whole = label.replace(" ", "\0").replace(",\0", ", ")
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _told(field: str, value: object) -> str:
    is_default = value is None or value != value  # NaN in a column of numbers
    value = ",".join(map(str, value)) if field == "layer" and isinstance(value, tuple) else value
    if isinstance(value, str) and len(value) > LONGEST:
        value = f"...{value[-LONGEST:]}"  # where paths and names of sweeps differ
    return f"{field} default" if is_default else FORMATS.get(field, f"{field} {{}}").format(value)


def _lines(df: pd.DataFrame) -> list[dict]:
    """Choose colour and dashes of each row: a type's rows go from light to dark, through its own colour."""
    by_type, dashes = df.groupby("sae_type")["sae_type"], _dashes(df)
    amounts = by_type.cumcount() / (by_type.transform("size") - 1) - 0.5  # nan where a type has one row
    lines = []
    for sae_type, width, amount in zip(df["sae_type"], df["dict_size"], amounts.fillna(0)):
        colour = np.array(to_rgb(TYPES[sae_type].colour))
        mixed = colour + abs(amount) * ((amount < 0) - colour)  # white is 1, black 0
        lines.append(dict(color=tuple(mixed), linestyle=dashes[width], linewidth=1.2))
    return lines


@matplotlib.rc_context(STYLE)
def _panels(
    df: pd.DataFrame, y_labels: Collection[str], x_label: str, labels: Sequence[str], height: float
) -> tuple[Figure, dict[str, Sequence[Axes]]]:
    """Lay out a column of panels for each type in the table: a panel for each y label, and the legend of its SAEs.

    height: of a panel, in inches. Axes are shared along rows and columns, so figure.axes[0] sets those of its row.
    """
    types = _types(df)
    labels = [wrapped(label, LEGEND_LETTERS) for label in labels]
    lines = pd.Series(map(len, labels)).groupby(df["sae_type"].array).sum().max()
    heights = [height] * len(y_labels) + [0.05 + 0.15 * lines]
    figure = Figure(figsize=(COLUMN_WIDTH * max(2, len(types)), sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(heights), len(types), sharex=True, sharey="row", squeeze=False, height_ratios=heights)
    for axes in grid[:-1].flat:
        axes.tick_params(**TICKS)
    for axes, y_label in zip(grid[:, 0], y_labels):
        axes.set_ylabel(y_label)
    figure.align_ylabels()
    letters = 7 * min(1, LEGEND_LETTERS / max(len(line) for label in labels for line in label))
    layout = dict(fontsize=letters, handlelength=2, borderpad=0, labelspacing=0.3, borderaxespad=0)
    entries = list(zip(df["sae_type"], map("\n".join, labels), _lines(df)))
    for (sae_type, row), (*panels, below) in zip(types.items(), grid.T):
        panels[0].set_title(row.label, color=row.colour)
        panels[-1].set_xlabel(x_label)
        panels[-1].tick_params(labelbottom=True)
        handles = [Line2D([], [], label=label, **line) for of, label, line in entries if of == sae_type]
        below.legend(handles=handles, loc="upper center", **layout)
        below.set_axis_off()
    return figure, dict(zip(types, grid.T))


def _over_training(df: pd.DataFrame, history: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """Draw a panel for each metric (name -> y label): "train/..." as lines, "eval/..." as dots."""
    df = df.merge(history[["run", "name"]].drop_duplicates())
    require(len(df), "nothing to plot: no SAE of the table has a line of metrics")
    figure, panels = _panels(df, metrics.values(), "Training activations", row_labels(df), 1.3)
    curves = history.groupby(["run", "name"])
    dots = dict(linestyle="", marker="o", markersize=3)
    for sae, line in zip(df.itertuples(), _lines(df)):
        curve = curves.get_group((sae.run, sae.name))
        for metric, axes in zip(metrics, panels[sae.sae_type]):
            for key, look in ((f"train/{metric}", line), (f"eval/{metric}", line | dots)):
                if key in curve:
                    known = curve[np.isfinite(curve[key])]
                    axes.plot(known["tokens"], known[key], **look)
    figure.axes[0].xaxis.set(major_locator=MaxNLocator(4), major_formatter=EngFormatter(sep=""))
    figure.axes[0].set_xlim(left=0)
    grey = partial(Line2D, [], [], color="0.4")
    kinds = [grey(label="training batches", linewidth=1.2), grey(label="held-out text", **dots)]
    figure.legend(handles=kinds, loc="outside lower center", fontsize=7, frameon=False, ncols=2)
    return figure


def _histograms(
    df: pd.DataFrame, values: Sequence[np.ndarray], edges: np.ndarray, labels: Sequence[str], x_label: str
) -> Figure:
    """Draw a panel for each type, in it the outline of each SAE's histogram, in shares of all its values."""
    figure, panels = _panels(df, ["Share of latents"], x_label, labels, 1.7)
    for sae_type, value, line in zip(df["sae_type"], values, _lines(df)):
        counts, _ = np.histogram(value, edges)
        panels[sae_type][0].stairs(counts / len(value), edges, **line)
    figure.axes[0].set_xlim(edges[0], edges[-1])
    figure.axes[0].yaxis.set(major_locator=MaxNLocator(5, steps=(1, 2, 5, 10)), major_formatter=_percent)
    return figure
