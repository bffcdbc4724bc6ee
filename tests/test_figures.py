"""figures.py: what is drawn where; every number here was worked out on paper."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import (
    kinds_of,
    plot_cosines,
    plot_density,
    plot_kinds,
    plot_layers,
    plot_pareto,
    plot_training,
    row_labels,
    save_figure,
    save_figures,
    wrapped,
)
from config import TYPES, SaeType


def frame(*saes: tuple[str, int, float, float, float]) -> pd.DataFrame:
    """Make a table as load_results gives it, of (sae_type, dict_size, l0, explained_variance, ce_recovered)."""
    df = pd.DataFrame(saes, columns=["sae_type", "dict_size", "l0", "explained_variance", "ce_recovered"])
    names = [f"sae-{i}" for i in range(len(df))]
    return df.assign(run="sweep", name=names, target_l0=df["l0"], l1_coeff=0.1 / df["l0"], lr=1e-3, seed=0)


def many(count: int) -> pd.DataFrame:
    """Make a table of all types, in turn, at several widths."""
    kinds = itertools.product((16, 32, 64), (1024, 2048, 4096), TYPES)
    df = frame(*((t, F, k, 0.5, 0.6) for k, F, t in itertools.islice(kinds, count)))
    return df.sort_values("sae_type", key=lambda types: types.map(list(TYPES).index), ignore_index=True, kind="stable")


def history_of(df: pd.DataFrame) -> pd.DataFrame:
    """Make two training lines for each SAE, then an evaluation; numbers differ between SAEs."""
    rows = []
    for i, name in enumerate(df["name"]):
        for step in (1, 2):
            metrics = dict(loss=0.5 / step + i, explained_variance=0.1 * step, l0=100 / step + i, dead_share=0.01 * i)
            rows.append({"step": step, "tokens": 1000.0 * step} | {f"train/{m}": v for m, v in metrics.items()})
        rows.append({"step": 2, "tokens": 2000.0, "eval/l0": 50.0 + i, "eval/explained_variance": 0.25})
        for row in rows[-3:]:
            row |= {"run": "sweep", "name": name}
    return pd.DataFrame(rows)


def panels(figure: Figure) -> list:
    """List the panels of one type, from the top down, then those of the next."""
    types = sum(not axes.axison for axes in figure.axes)  # a legend each
    return [axes for column in range(types) for axes in figure.axes[column::types] if axes.axison]


def legends(figure: Figure) -> dict[str, list[str]]:
    """Read the labels below each type's panels."""
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    below = [axes.get_legend() for axes in figure.axes if not axes.axison]
    return {title: [text.get_text() for text in legend.get_texts()] for title, legend in zip(titles, below)}


# ---- kinds ----


def several_kinds() -> pd.DataFrame:
    """An SAE, a transcoder, one with a skip connection, and a crosscoder of three layers."""
    df = frame(*(("topk", 64, l0, ev, 0.9) for l0, ev in ((8, 0.5), (16, 0.6), (32, 0.7), (24, 0.8))))
    layers = pd.Series([2, 1, 1, (0, 1, 2)], dtype=object)
    sites, sizes = [None, "mlp_out", "mlp_out", None], [np.nan, 20, 20, np.nan]
    return df.assign(layer=layers, site="mlp_in", target_site=sites, act_size=10, target_size=sizes, skip=[0, 0, 1, 0])


def test_kinds_are_compared_by_three_measures_of_sparsity() -> None:
    df = several_kinds()
    df["skip"] = df["skip"].astype(bool)
    assert kinds_of(df) == ["SAE", "transcoder", "skip transcoder", "crosscoder"] and kinds_of(many(2)) == ["SAE"] * 2
    figure = plot_kinds(df)
    found = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]
    assert found == [[8, 16, 32, 24], [8, 16, 32, 8], [8 * 20, 16 * 30, 32 * 30 + 200, 24 * 60]]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [0.5, 0.6, 0.7, 0.8]
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 4
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["TopK", "SAE", "transcoder", "skip transcoder", "crosscoder"]


def test_a_crosscoder_s_latents_are_ordered_by_layer(tmp_path: Path) -> None:
    norms = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.8, 0.6, 0.0]])
    df = several_kinds().iloc[3:]
    figure = plot_layers(df, [norms])
    (image,) = figure.axes[0].images
    assert np.array_equal(image.get_array(), norms[[1, 3, 2, 0]].T)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="give one array for each row"):
        plot_layers(df, [])
    df = several_kinds().assign(skip=False)
    names = {path.name for path in save_figures(df, tmp_path, norms=[None, None, None, norms])}
    assert names == {f"{name}.{kind}" for name in ("pareto", "kinds", "layers") for kind in ("png", "pdf")}


# ---- plot_pareto ----


def test_plot_has_a_sorted_line_per_type() -> None:
    rows = [
        (sae_type, 2048, k + i, 0.5 + k / 200, 0.6 + k / 200)
        for i, sae_type in enumerate(("jumprelu", "batchtopk", "vanilla", "topk"))
        for k in (32, 64, 16)
    ]
    figure = plot_pareto(frame(*rows))
    for axes, intercept in zip(figure.axes, (0.5, 0.6)):
        legend = {entry.get_label(): entry for entry in figure.legends[0].legend_handles}
        assert list(legend) == ["Vanilla", "TopK", "BatchTopK", "JumpReLU"]
        for line, (name, entry), offset in zip(axes.lines, legend.items(), (2, 3, 1, 0), strict=True):
            assert line.get_color() == entry.get_color() == to_rgb(TYPES[name.lower()].colour)
            assert line.get_marker() == entry.get_marker()
            x, y = line.get_data()
            np.testing.assert_allclose(x, [16 + offset, 32 + offset, 64 + offset])
            np.testing.assert_allclose(y, [intercept + 0.08, intercept + 0.16, intercept + 0.32])
        assert len({line.get_marker() for line in axes.lines}) == 4


def looks(line: Line2D) -> tuple:
    return line.get_color(), line.get_marker(), line.get_linestyle()


def test_every_line_has_an_entry_of_its_own() -> None:
    df = frame(
        *(("topk", F, k, 0.5, 0.6) for F in (512, 2048, 12288) for k in (16.0, 32.0)), ("vanilla", 512, 9, 0.5, 0.6)
    )
    df["layer"], df["lr"] = [1, 1, 1, 1, 1, 2, 1], [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1]
    figure = plot_pareto(df)
    vanilla, *topk = lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [1, 2, 2, 1, 1]
    entries = figure.legends[0].legend_handles
    assert [looks(entry) for entry in entries] == [looks(line) for line in lines]
    assert len({*map(looks, lines)}) == 5
    assert [entry.get_label() for entry in entries] == [
        "Vanilla, layer 1, dict 512, lr 0.1",
        "TopK, layer 1, dict 512, lr 0.1",
        "TopK, layer 1, dict 2048, lr 0.1",
        "TopK, layer 1, dict 12288, lr 0.1",
        "TopK, layer 2, dict 12288, lr 0.2",
    ]
    assert len({line.get_marker() for line in topk}) == len({line.get_linestyle() for line in topk}) == 3
    assert vanilla.get_marker() == topk[0].get_marker()


def test_lines_join_what_differs_in_its_setting_alone() -> None:
    df = frame(*(("topk", 2048, k, 0.5, 0.6) for k in (16.0, 32.0, 17.0, 33.0, 18.0)))
    df["num_tokens"], df["dataset_path"] = [10, 10, 20, 20, 20], ["a", "a", "a", "a", "b"]
    df["run"] = list("abcde")  # of an agent each
    df["dataset_name"] = None
    found = [list(line.get_xdata()) for line in plot_pareto(df).axes[0].lines]
    assert sorted(found) == [[16, 32], [17, 33], [18]]


def test_a_field_that_is_left_to_a_rule_is_told_as_default() -> None:
    df = frame(("topk", 2048, 32.0, 0.9, 0.9), ("topk", 2048, 32.5, 0.9, 0.9)).assign(lr=[float("nan"), 0.003])
    assert [label.split(", ")[-1] for label in row_labels(df)] == ["lr default", "lr 0.003"]


def test_seeds_are_one_point_with_bars() -> None:
    rows = ((16.0, 0.5, 0.6), (18.0, 0.6, 0.7), (20.0, 0.7, 0.8), (40.0, 0.9, 0.9))
    df = frame(*(("topk", 2048, *row) for row in rows))
    df["target_l0"], df["l1_coeff"], df["seed"], df["run"] = [16, 16, 16, 32], None, [0, 1, 2, 2], list("abcd")
    for axes, metric in zip(plot_pareto(df).axes, (0.6, 0.7)):
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_xdata(), [18, 40])
        np.testing.assert_allclose(line.get_ydata(), [metric, 0.9])
        horizontal, vertical = (bars.get_segments() for bars in axes.collections)
        np.testing.assert_allclose(horizontal, [[[16, metric], [20, metric]]])
        np.testing.assert_allclose(vertical, [[[18, metric - 0.1], [18, metric + 0.1]]])


def test_labels_name_every_field_that_the_result_depends_on() -> None:
    df = frame(("topk", 2048, 8, 0.5, 0.6), ("topk", 2048, 8, 0.5, 0.6), ("vanilla", 512, 8, 0.5, 0.6))
    df["top_k_aux"], df["dataset_path"], df["log_freq"] = [256, 512, 128], ["a", "b", "a"], [1, 2, 3]
    assert row_labels(df) == [
        "L0=8, dataset_path a, top_k_aux 256",
        "L0=8, dataset_path b, top_k_aux 512",
        "l1=0.0125",
    ]


def test_a_long_label_is_broken_between_fields() -> None:
    assert wrapped("L0=16, layer 1, lr 0.0001, seed 3", 15) == ["L0=16, layer 1,", "lr 0.0001,", "seed 3"]
    assert wrapped("L0=16, EleutherAI/pythia-160m", 14) == ["L0=16,", "EleutherAI/pythia-160m"]
    df = frame(*(("topk", 2048, 16.0, 0.5, 0.6) for _ in range(2))).assign(
        layer=[1, 2], lr=[0.0001, 0.0002], num_tokens=[1000, 2000], seed=[3, 4]
    )
    (legend,) = legends(plot_training(df, history_of(df))).values()
    assert legend[0] == "L0=16, 1000 tokens,\nlayer 1, seed 3, lr 0.0001"
    assert {
        text.get_fontsize()
        for axes in plot_training(df, history_of(df)).axes
        if axes.get_legend()
        for text in axes.get_legend().get_texts()
    } == {7}


def test_figures_that_would_be_empty_are_not_saved(tmp_path: Path) -> None:
    """From W&B no history and no cosines come, one latent has no cosine, and some runs were never evaluated."""
    one = frame(("topk", 1, 1.0, 0.5, 0.6))
    nothing_logged = history_of(one).iloc[:0]
    assert save_figures(one, tmp_path) == [tmp_path / "pareto.png", tmp_path / "pareto.pdf"]
    assert len(save_figures(one, tmp_path, nothing_logged, [np.empty(0, np.float32)])) == 2
    assert save_figures(one.assign(l0=math.nan), tmp_path) == []


def test_arrays_must_be_one_for_each_row() -> None:
    df = frame(("topk", 2048, 9.0, 0.5, 0.6))
    for plot in (plot_density, plot_cosines):
        for rows, arrays in ((df, []), (df.iloc[:0], [np.ones(3)]), (df.iloc[:0], [])):
            with pytest.raises(ValueError, match=rf"^df = {len(rows)} rows, and {len(arrays)} arrays: give one array"):
                plot(rows, arrays)


def test_plot_axes() -> None:
    figure = plot_pareto(frame(("topk", 2048, 9.0, 0.5, 0.6), ("topk", 2048, 120.0, 0.9, 0.95)))
    figure.draw_without_rendering()
    for axes, y_label in zip(figure.axes, ("Explained variance (share)", "CE recovered (share)")):
        assert axes.get_xlabel() == "L0 (latents active per token)"
        assert axes.get_ylabel() == y_label
        assert axes.get_xscale() == "log"
        low, high = axes.get_xlim()
        shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert shown == ["8", "16", "32", "64", "128"]


@pytest.mark.parametrize("l0s", [(30.8,), (33.0, 36.0), (16.5, 31.0)])
def test_plot_of_a_narrow_range_shows_two_ticks(l0s: tuple[float, ...]) -> None:
    axes = plot_pareto(frame(*(("topk", 2048, l0, 0.5, 0.6) for l0 in l0s))).axes[0]
    low, high = axes.get_xlim()
    assert sum(low <= 2**i <= high for i in range(12)) >= 2
    assert low < min(l0s) and max(l0s) < high


def test_plot_leaves_out_what_has_no_place() -> None:
    df = frame(
        ("topk", 2048, 32.0, 0.8, 0.9),
        ("topk", 2048, 16.0, math.nan, 0.9),
        ("topk", 2048, 17.0, 0.8, -math.inf),
        ("vanilla", 2048, 0.0, 0.0, 0.0),
        ("jumprelu", 512, math.nan, math.nan, math.nan),
    )
    figure = plot_pareto(df)
    for axes in figure.axes:
        assert [list(line.get_xdata()) for line in axes.lines] == [[32.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["TopK"]


@pytest.mark.parametrize("widths", [(2048,), (3072, 6144, 12288, 24576), (1024, 2048, 4096, 8192, 16384, 32768)])
def test_legend_lies_on_the_figure_and_off_the_panels(widths: tuple[int, ...]) -> None:
    figure = plot_pareto(frame(*((t, F, k, 0.5, 0.6) for t in TYPES for F in widths for k in (16.0, 32.0))))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert all(axes.get_window_extent().height > 2 * figure.dpi for axes in figure.axes)
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and figure.bbox.y0 <= legend.y0


# ---- over training ----


def test_training_curves_are_lines_and_evaluations_dots() -> None:
    df = frame(("topk", 2048, 16, 0.5, 0.6), ("topk", 2048, 32, 0.5, 0.6), ("jumprelu", 2048, 20, 0.5, 0.6))
    figure = plot_training(df, history_of(df).sample(frac=1, random_state=0).sort_values("step"))
    topk, jumprelu = panels(figure)[:4], panels(figure)[4:]
    assert [axes.get_ylabel() for axes in topk] == ["Loss", "Expl. variance", "L0", "Dead latents"]
    loss = [line.get_xydata().tolist() for line in topk[0].lines]
    assert loss == [[[1000, 0.5], [2000, 0.25]], [[1000, 1.5], [2000, 1.25]]]
    assert jumprelu[0].lines[0].get_ydata().tolist() == [2.5, 2.25]
    first, dot, *_ = topk[2].lines
    assert (first.get_ydata().tolist(), dot.get_xydata().tolist()) == ([100, 50], [[2000, 50]])
    assert (first.get_linestyle(), dot.get_linestyle(), dot.get_marker()) == ("-", "None", "o")
    assert first.get_color() == dot.get_color() != topk[2].lines[2].get_color()
    assert legends(figure) == {"TopK": ["L0=16", "L0=32"], "JumpReLU": ["l0=0.005"]}


def test_a_run_too_short_to_log_has_dots() -> None:
    df = frame(("topk", 2048, 16, 0.5, 0.6))
    known = {"run": ["sweep"], "name": ["sae-0"], "tokens": [9], "eval/l0": [15.0], "eval/dead_share": 0.5}
    history = pd.DataFrame(known)
    assert panels(plot_training(df, history))[2].lines[0].get_xydata().tolist() == [[9, 15]]
    assert panels(plot_training(df, history))[3].lines[0].get_xydata().tolist() == [[9, 0.5]]
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training(df, history.assign(name="another"))


def test_explained_variance_below_zero_is_off_the_panel() -> None:
    df = frame(("topk", 2048, 16, 0.5, 0.6))
    history = history_of(df)
    history.loc[0, "train/explained_variance"] = -40.0
    variance = panels(plot_training(df, history))[1]
    assert variance.get_ylim()[0] == 0 and 0.2 < variance.get_ylim()[1] < 1.5 * 0.25


def test_dead_latents_have_a_panel_once_one_died() -> None:
    df = many(12)
    dead = panels(plot_training(df, history_of(df)))[3::4]
    assert {axes.get_ylim() for axes in dead} == {dead[0].get_ylim()} and 0.11 < dead[0].get_ylim()[1] < 0.12
    assert dead[0].get_yticklabels()[0].get_text().endswith("%")
    alive = history_of(df).assign(**{"train/dead_share": 0.0})
    assert len(panels(plot_training(df, alive))) == 3 * df["sae_type"].nunique()


# ---- histograms ----


def test_density_counts_the_latents_of_each_decade() -> None:
    """Count 10 latents: two never fire, three at 1.5e-3, four at 0.3, one always."""
    densities = np.array([0, 0, *[1.5e-3] * 3, *[0.3] * 4, 1.0])
    figure = plot_density(frame(("vanilla", 2048, 20, 0.5, 0.6)), [densities])
    (axes,) = panels(figure)
    values, edges, _ = axes.patches[0].get_data()
    assert (edges[0], edges[-1], axes.get_xscale()) == (pytest.approx(1e-3), 1, "log")
    found = {round(math.log10(edges[i]), 1): values[i] for i in values.nonzero()[0]}
    assert found == {-3.0: 0.3, -0.7: 0.4, -0.3: 0.1}
    assert [axes.xaxis.get_major_formatter()(share, None) for share in (1e-5, 0.1, 1)] == ["0.001%", "10%", "100%"]
    assert legends(figure) == {"Vanilla": ["l1=0.005, 20% never"]}
    with pytest.raises(ValueError, match="no latent fires"):
        plot_density(frame(("vanilla", 2048, 20, 0.5, 0.6)), [np.zeros(4)])


def test_cosines_lie_in_the_panel_of_their_type() -> None:
    df = frame(("topk", 2048, 16, 0.5, 0.6), ("batchtopk", 2048, 16, 0.5, 0.6))
    figure = plot_cosines(df, [np.array([0.51, 0.51, 0.26, 1.0]), np.array([-0.1, 0.9])])
    left, right = panels(figure)
    assert (left.get_title(), right.get_title()) == ("TopK", "BatchTopK")
    for axes, expected in ((left, {0.51: 0.5, 0.26: 0.25, 1.0: 0.25}), (right, {-0.1: 0.5, 0.9: 0.5})):
        values, edges, _ = axes.patches[0].get_data()
        assert values.sum() == pytest.approx(1)
        for cosine, share in expected.items():
            bin_ = min(np.searchsorted(edges, cosine, side="right") - 1, len(values) - 1)
            assert values[bin_] == share
        assert axes.get_xlim() == (edges[0], edges[-1]) == (pytest.approx(-0.1), 1)


# ---- the style ----


def test_within_a_type_from_light_to_dark_and_dashed_by_width() -> None:
    df = frame(*(("topk", F, k, 0.5, 0.6) for F in (512, 2048) for k in (16, 32, 64)), ("vanilla", 512, 9, 0.5, 0.6))
    topk, vanilla = panels(plot_training(df, history_of(df)))[::-4]
    lines = topk.lines[::2] if topk.lines[1].get_linestyle() == "None" else topk.lines
    brightness = [sum(to_rgb(line.get_color())) for line in lines]
    assert len(lines) == 6 and brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 6
    assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 3
    assert to_rgb(vanilla.lines[0].get_color()) == to_rgb(TYPES["vanilla"][1])


def test_labels_name_what_differs_within_a_type() -> None:
    """The types have other learning rates here, and TopK two seeds."""
    df = frame(*((t, 2048, 16, 0.5, 0.6) for t in ("topk", "topk", "vanilla")))
    df["lr"], df["seed"] = [1e-3, 1e-3, 3e-3], [0, 1, 0]
    assert legends(plot_training(df, history_of(df))) == {
        "TopK": ["L0=16, seed 0", "L0=16, seed 1"],
        "Vanilla": ["l1=0.00625"],
    }


@pytest.mark.parametrize("count, new_types", [(1, 0), (30, 0), (15, 1)])
def test_nothing_overlaps(count: int, new_types: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legends lie on the figure, off the panels and off each other, and panels stay wide, whatever the types."""
    for i in range(new_types):
        monkeypatch.setitem(TYPES, f"new{i}", SaeType("New", "#000000", (), "topk"))
    df = many(count)
    values = [np.linspace(0.01, 0.9, 50)] * count
    for figure in (plot_training(df, history_of(df)), plot_cosines(df, values), plot_density(df, values)):
        figure.draw_without_rendering()
        boxes = [axes.get_legend().get_window_extent() for axes in figure.axes if not axes.axison]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for box, other in itertools.combinations(boxes, 2):
            assert not box.overlaps(other)
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
            assert not any(box.overlaps(axes.get_tightbbox()) for axes in panels(figure))
        assert all(axes.get_window_extent().width > 1.3 * figure.dpi for axes in panels(figure))


def test_long_labels_leave_the_panels_wide() -> None:
    df = many(12)
    df["run"] = [f"a-sweep-with-a-name-20261124-0041{i}" for i in range(10, 22)]
    figure = plot_cosines(df, [np.linspace(0.01, 0.9, 50)] * 12)
    figure.draw_without_rendering()
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes if not axes.axison]
    assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
    assert all(axes.get_window_extent().width > 1.3 * figure.dpi for axes in panels(figure))


def test_saved_as_png_and_pdf(tmp_path: Path) -> None:
    df = many(2)
    cosines = [None, np.linspace(0, 1, 9)]
    paths = save_figures(df, tmp_path, history_of(df), cosines)
    names = ("pareto", "training", "cosines")
    assert paths == [tmp_path / f"{name}.{kind}" for name in names for kind in ("png", "pdf")]
    header = paths[0].read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") == 7.5 * 150
    for path in paths[1::2]:
        assert path.read_bytes().startswith(b"%PDF") and b"/Type3" not in path.read_bytes()
    assert save_figure(Figure(), str(tmp_path), "a") == [tmp_path / "a.png", tmp_path / "a.pdf"]
