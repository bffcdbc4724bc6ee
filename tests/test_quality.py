"""benchmarks/activations.py against evaluation.py, and what benchmarks/quality.py concludes from results."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # whose files run as scripts

import findings
import quality
from activations import Activations
from peers import Coder

from activation_store import ActivationsStore
from config import Config
from evaluation import HeldOut, evaluate
from sae import build_sae


@pytest.fixture(scope="module")
def activations(tiny_gpt2: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Activations:
    cfg = Config(
        model_name=str(tiny_gpt2), layer=1, dataset_path=str(tiny_text), seq_len=24, model_batch_size=4,
        batch_size=128, num_tokens=640, eval_windows=6, dict_size=64, target_l0=4, device="cpu",
    )  # fmt: skip
    return Activations(cfg, tmp_path_factory.mktemp("cache"))


def test_metrics_are_those_of_evaluation(activations: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.MAX_LOGITS", 20_000)  # two windows at a time
    cfg, batch = activations.cfg, next(iter(activations))
    sae = build_sae(cfg).eval()
    sae.initialise_from(batch)
    sae.b_enc.data[:8] = -1e3
    found = activations.measure(Coder(sae.encode, lambda x: sae(x).sae_out))
    (expected,) = evaluate(HeldOut(activations.model, activations.tokens), [sae])
    for name in ("explained_variance", "ce_recovered", "l0", "relative_bias"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert 1 - sum(found["errors"]) / sum(found["powers"]) == pytest.approx(found["explained_variance"], rel=1e-5)
    assert found["silent"] == 8 / 64


def test_batches_are_those_of_the_store_and_written_once(activations: Activations) -> None:
    cfg, (file,) = activations.cfg, activations.cache.iterdir()
    store = ActivationsStore(activations.model, [cfg])
    batches = list(activations)
    assert len(batches) == cfg.num_steps == 5
    for batch in batches:
        torch.testing.assert_close(batch, store.next_batch()[cfg.hook_name], rtol=1e-3, atol=1e-4)
    written = file.stat().st_mtime_ns
    assert all(map(torch.equal, Activations(cfg, activations.cache), batches))
    assert file.stat().st_mtime_ns == written


def result(library: str = "ours", lr: float | None = None, seed: int = 0, **metrics: object) -> dict:
    """A line of a results file."""
    found = {"explained_variance": 0.9, "ce_recovered": 0.9, "l0": 32.0, "silent": 0.1, "seconds": 1.0}
    run = dict(num_tokens=4096, dict_size=2048, k=32, sae_type="topk", library=library, lr=lr, seed=seed)
    return run | found | {"errors": [1.0, 1.0], "powers": [10.0, 10.0]} | metrics


def test_the_best_rate_explains_most_without_a_higher_l0() -> None:
    rates = {None: (0.5, 32), 1e-3: (0.7, 34), 3e-3: (0.8, 30), 6e-3: (0.6, 32), 1e-2: (0.9, 36)}
    theirs = [result("sae_lens", lr, explained_variance=ev, l0=l0) for lr, (ev, l0) in rates.items()]
    picked = [*quality.contenders([*theirs, result()], k=32)]
    expected = [("best", theirs[2:3]), ("recommended", theirs[:1])]
    assert picked == [("ours", "best", [result()]), *(("sae_lens", which, runs) for which, runs in expected)]
    assert [quality.row("sae_lens", runs, [result()])["rate"] for _, runs in expected] == ["0.003", "own"]


def test_the_interval_is_of_paired_differences() -> None:
    """Of which the same seeds and windows differ little, however much the windows vary."""
    rng = np.random.default_rng(1)
    powers = rng.uniform(5, 50, 64)
    errors = powers * rng.uniform(0.05, 0.4, (3, 64))
    ours = [result(seed=s, errors=[*errors[s]], powers=[*powers]) for s in (0, 1, 2)]
    worse = [result("sae_lens", seed=s, errors=[*(errors[s] + 0.01 * powers)], powers=[*powers]) for s in (2, 1, 0)]
    assert quality.ahead(ours, worse) == pytest.approx((0.01, 0.01))
    low, high = quality.ahead(ours, [result("sae_lens", errors=[*(errors[0] * rng.uniform(0.9, 1.1, 64))])])
    assert low < 0 < high and 0.002 < high - low < 0.02


def test_runs_in_the_results_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ours run at one rate only, and types only where a library has them."""
    what = ["--tokens", "4096", "--k", "32", "--types", "topk", "batchtopk", "--seeds", "0", "--rates", "own", "0.003"]
    options = quality.parse([*what, "--results", str(tmp_path / "results.jsonl")])
    trained = []

    def train(run: dict, activations: None) -> dict:
        trained.append(run)
        return result() | run

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "Activations", lambda *_: None)
    options.results.write_text(json.dumps(result("sparsify", 0.003)) + "\n")
    quality.train_all(quality.plan(options), options.results, tmp_path)
    assert len(trained) == 2 + 4 + 4 + 2 - 1
    assert not any(run["library"] == "sparsify" and run["lr"] for run in trained)
    quality.train_all(quality.plan(options), options.results, tmp_path)
    assert len(trained) == 11


def test_codes_without_training_are_the_best_in_a_basis_and_least_squares_in_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, x = torch.randn(8, generator=rng), torch.randn(2000, 8, generator=rng)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=rng)).Q
    smallest = ((x - mean) @ basis.T).square().sort().values[:, :-3].sum()
    coder = findings.in_basis(basis, mean, k=3)
    torch.testing.assert_close((x - coder.reconstruct(x)).square().sum(), smallest)
    directions = torch.nn.functional.normalize(torch.randn(40, 8, generator=rng))
    chosen = ((x - mean) @ directions.T).abs().topk(3).indices
    for found in (coder.encode(x), (coder := findings.in_directions(directions, mean, k=3)).encode(x)):
        assert ((found > 0).sum(dim=1) == 3).all()
    error = x - coder.reconstruct(x)
    torch.testing.assert_close((directions[chosen] @ error[:, :, None]).amax(), torch.tensor(0.0), atol=1e-3, rtol=0)
    assert error.square().sum() < (x - mean).square().sum()
