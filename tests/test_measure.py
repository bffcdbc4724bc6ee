"""analysis/measure.py: intervals against a bootstrap written out, tables by hand, the command on saved SAEs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import results
from analysis.measure import ENDS, RESAMPLES, format_measured, measure, resampled
from checkpoint import save_checkpoint
from config import Config
from evaluation import HeldOut, evaluate, tally
from language_model import check_model, load_model, record
from sae import BaseAutoencoder, build_sae
from text import held_out_windows

WINDOWS = 12


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path, tiny_text: Path) -> Config:
    paths = dict(model_name=str(tiny_gpt2), dataset_path=str(tiny_text))
    return check_model(Config(**paths, layer=1, dict_size=64, target_l0=4, seq_len=24, eval_windows=5, device="cpu"))


@pytest.fixture(scope="module")
def held_out(cfg: Config) -> HeldOut:
    model = load_model(cfg)
    return HeldOut(model, held_out_windows(cfg, model.tokenizer, WINDOWS))


@pytest.fixture(scope="module")
def make(cfg: Config, held_out: HeldOut) -> Callable[..., BaseAutoencoder]:
    def make(**changes: object) -> BaseAutoencoder:
        sae = build_sae(Config(**cfg.to_dict() | changes)).eval()
        hook = sae.cfg.hook_name
        sae.initialise_from(record(held_out.model, held_out.batches[0].tokens, [hook])[hook])
        return sae

    return make


@pytest.fixture(scope="module")
def folders(make: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A TopK SAE, one of another hook, and again one of the first hook, with half of the first's decoder rows."""
    saes = [make(sae_type="topk"), make(sae_type="topk", layer=0), make(sae_type="jumprelu", seed=1)]
    saes[2].W_dec.data[:32] = saes[0].W_dec.data[32:]
    paths = [tmp_path_factory.mktemp("sae") / "step-1" for _ in saes]
    for sae, path in zip(saes, paths):
        save_checkpoint(sae, path)
    return [str(path) for path in paths]


# ---- the bootstrap ----


def drawn_windows() -> Tensor:
    return torch.randint(WINDOWS, (RESAMPLES, WINDOWS), generator=torch.Generator().manual_seed(0))


def test_a_resample_is_a_text_of_the_windows_drawn(held_out: HeldOut, make: Callable) -> None:
    """Compared with evaluations of these windows alone."""
    sae = make(sae_type="topk")
    (found,) = tally(held_out, [sae])
    metrics = resampled(found)
    for resample in (0, 7):
        tokens = torch.cat([batch.tokens for batch in held_out.batches])[drawn_windows()[resample]]
        text = HeldOut(held_out.model, tokens)
        text._of_hooks[sae.cfg.writes] = text.of(sae.cfg)._replace(
            mean=held_out.of(sae.cfg).mean
        )  # of which the resamples keep the whole text's
        (expected,) = evaluate(text, [sae])
        for name in metrics.keys() - {"ce_mean", "ce_recovered_mean"}:
            assert metrics[name][resample].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_intervals_are_of_the_given_share_of_resamples(held_out: HeldOut, make: Callable) -> None:
    (found,) = tally(held_out, [make(sae_type="jumprelu")])
    counts, rows = (found.sums[name].numpy() for name in ("l0", "_rows"))
    ratios = [counts[drawn].sum() / rows[drawn].sum() for drawn in drawn_windows().numpy()]
    assert resampled(found)["l0"].quantile(ENDS).tolist() == pytest.approx(np.percentile(ratios, [2.5, 97.5]).tolist())
    assert not torch.equal(resampled(found)["l0"], resampled(found, seed=1)["l0"])


def test_a_difference_leaves_out_what_both_have_in_common(held_out: HeldOut, make: Callable) -> None:
    one, other = make(sae_type="topk"), make(sae_type="topk")
    other.b_dec.data += 0.01
    first, second = (resampled(found) for found in tally(held_out, [one, other]))
    for name in ("ce", "explained_variance", "ce_recovered"):
        assert (second[name] - first[name]).std() < first[name].std() / 4


# ---- what is measured ----


def test_all_is_that_of_each_sae_on_its_own_text(folders: list[str], held_out: HeldOut, make: Callable) -> None:
    measured = measure(folders, WINDOWS)
    assert [row["checkpoint"] for row in measured] == folders
    saes = [make(sae_type="topk"), make(sae_type="topk", layer=0)]
    for row, sae in zip(measured, saes):
        tokens = torch.cat([batch.tokens for batch in held_out.batches])
        (expected,) = evaluate(HeldOut(held_out.model, tokens), [sae])
        assert row["metrics"] == pytest.approx(expected) and row["config"] == sae.cfg.to_dict()
        for name, (low, high) in row["intervals"].items():
            assert low <= row["metrics"][name] <= high or row["metrics"][name] == pytest.approx(low, rel=1e-9)
        assert sum(row["log10_density"]["counts"]) == round(64 * (1 - expected["silent_share"]))
        assert row["encoder_alignment"]["mean"] == pytest.approx(1) and row["encoder_alignment"]["counts"][-1] == 64
        assert 0 < row["nearest_cosine"]["mean"] < 1 and sum(row["nearest_cosine"]["counts"]) == 64
    first, other_hook, third = measured
    assert "compared_with" not in other_hook and third["compared_with"] == folders[0]
    assert third["differences"]["kl"][0] == third["metrics"]["kl"] - first["metrics"]["kl"]
    assert third["differences"]["ce_clean"] == [0, 0, 0]
    assert 0.5 < third["matched_cosine"] < 0.95
    assert [len(row["log10_density"]["edges"]) for row in measured] == [41] * 3
    assert measure(folders[:1])[0]["metrics"] != first["metrics"], "on eval_windows"


def test_densities_are_counted_in_their_decades(held_out: HeldOut, make: Callable, tmp_path: Path) -> None:
    """A latent that always fires, and one that fires at about a hundredth of the tokens; the others never do."""
    sae = make(sae_type="vanilla")
    hook = sae.cfg.hook_name
    x = torch.cat([held_out.predict(batch, (hook,))[1][hook] for batch in held_out.batches])
    sae.b_enc.data[:] = -1e6
    sae.b_enc.data[0] = 1e6
    along = (x - sae.b_dec) @ sae.W_enc[:, 1]
    sae.b_enc.data[1] = -along.sort().values[-3:-1].mean()  # two tokens are above it
    save_checkpoint(sae, tmp_path / "step-1")
    (row,) = measure([str(tmp_path / "step-1")], WINDOWS)
    edges, counts = row["log10_density"]["edges"], row["log10_density"]["counts"]
    found = [(edges[i], edges[i + 1]) for i, count in enumerate(counts) if count]
    assert sum(counts) == 2 and found[1][1] == pytest.approx(0, abs=1e-9)
    assert found[0][0] <= np.log10(2 / len(x)) <= found[0][1]
    assert row["metrics"]["silent_share"] == 62 / 64 and row["metrics"]["dense_share"] == 1 / 64


# ---- the table and the command ----


def test_table_by_hand() -> None:
    cfg = Config(sae_type="topk", target_l0=16)
    names = ("l0", "explained_variance", "ce_recovered")
    first = {
        "checkpoint": "a", "config": cfg.to_dict(), "metrics": dict(zip(names, (16, 0.9234, 0.98))),
        "intervals": dict(zip(names, ([16, 16], [0.921, 0.925], [0.97, 0.99]))),
    }  # fmt: skip
    second = first | {
        "checkpoint": "b", "compared_with": "a", "config": Config(dict_size=65536).to_dict(),
        "differences": dict(zip(names, ([12.34, 10, 14.5], [-0.0015, -0.0025, -0.0005], [0, 0, 0]))),
    }  # fmt: skip
    assert format_measured([first, second]).splitlines() == [
        "   type        dict  setting          L0    expl. var.  CE recovered",
        "1  topk        2048  L0=16      16.0 ±.0   0.923 ±.002   0.980 ±.010",
        "2  batchtopk  65536  L0=32      16.0 ±.0   0.923 ±.002   0.980 ±.010",
        "     less 1                   +12.3 ±2.2  -0.002 ±.001  +0.000 ±.000",
        "",
        "1  a",
        "2  b",
    ]


def test_command(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "all.json"
    results.main(["evaluate", *folders, "--windows", "4", "--json", str(file)])
    table = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written == measure(folders, 4)
    assert format_measured(written) in table and all(len(line) <= 80 for line in table.splitlines()[:5])
    assert table.endswith(f"all metrics  {file}\n")


def test_mistakes_are_one_line(folders: list[str], tmp_path: Path) -> None:
    words = {"windows = 0: give 1": [*folders, "--windows", "0"], "gone": [str(tmp_path / "gone")], "CHECKPOINT": []}
    for said, given in words.items():
        with pytest.raises(ValueError, match=said) as error:
            results.main(["evaluate", *given])
        assert "\n" not in str(error.value)
