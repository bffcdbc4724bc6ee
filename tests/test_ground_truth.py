"""benchmarks/ground_truth.py: its activations are distributed as stated, its metrics are as worked out by hand."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

import config
from sae import build_sae

sys.path.append(str(Path(config.__file__).parent / "benchmarks"))  # last: it has a sweep.py, too

import ground_truth
from ground_truth import WORLD_SEED, Run, World, cells, coefficient_for, cosines, firing, matched, mcc, measure, row

ROWS = 20_000


@pytest.fixture(scope="module")
def world() -> World:
    return World(64, 1)


@pytest.fixture(scope="module")
def batch(world: World) -> tuple[Tensor, Tensor]:
    return world.batch(torch.Generator().manual_seed(0), ROWS)


# ---- activations ----


def test_directions_are_unit_vectors_of_the_seed(world: World) -> None:
    assert world.directions.shape == (256, 64)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(256))
    assert torch.equal(World(64, 1).directions, world.directions)
    assert not torch.equal(World(64, 2).directions, world.directions)


@pytest.mark.parametrize("act_size, l0", [(64, 6), (256, 12)])
def test_probabilities_follow_zipf_and_add_up_to_l0(act_size: int, l0: int) -> None:
    p = World(act_size, 0).probabilities
    assert World(act_size, 0).l0 == l0 and p.sum().item() == pytest.approx(l0, rel=1e-5)
    n = 4 * act_size
    assert (p[0] / p[-1]).item() == pytest.approx((n + n / 32) / (1 + n / 32), rel=1e-5)
    assert (p[1] / p[3]).item() == pytest.approx((4 + n / 32) / (2 + n / 32), rel=1e-5)


def test_features_fire_as_often_as_they_should(world: World, batch: tuple[Tensor, Tensor]) -> None:
    often, p = (batch[1] > 0).float().mean(dim=0), world.probabilities
    assert ((often - p).abs() < 4.5 * (p / ROWS).sqrt()).all()
    assert often.sum().item() == pytest.approx(6, abs=0.1)


def test_children_fire_only_where_their_parents_do(batch: tuple[Tensor, Tensor]) -> None:
    fires = batch[1] > 0
    for child in range(64, 128):
        assert not (fires[:, child] & ~fires[:, child % 16]).any()
    assert (fires[:, :16] & ~fires[:, 64:80]).any()  # not the other way round


def test_features_are_correlated_by_a_gaussian_copula(world: World, batch: tuple[Tensor, Tensor]) -> None:
    """The pairs of frequent features that should fire together most and least often do."""
    u = world.loadings[:, :32]
    products = (u.t() @ u).fill_diagonal_(0)
    assert (u.norm(dim=0) ** 2).tolist() == pytest.approx([0.3] * 32)
    for at in (products.argmax(), products.argmin()):
        i, j = divmod(int(at), 32)
        correlation, together = products[i, j].item(), (batch[1][:, [i, j]] > 0).all(dim=1).float().mean().item()
        covariance = [[1, correlation], [correlation, 1]]
        expected = multivariate_normal.cdf([-world.thresholds[i].item(), -world.thresholds[j].item()], cov=covariance)
        assert abs(correlation) > 0.2 and together == pytest.approx(expected, abs=4.5 * math.sqrt(expected / ROWS))


def test_magnitudes_and_noise(world: World, batch: tuple[Tensor, Tensor]) -> None:
    x, truth = batch
    magnitudes, noise = truth[truth > 0], x - truth @ world.directions
    assert truth.min() == 0
    assert (magnitudes.mean().item(), magnitudes.std().item()) == pytest.approx((1, 0.3), abs=0.005)
    assert noise.mean(dim=0).abs().max() < 4.5 * 0.05 / math.sqrt(ROWS)
    assert noise.std(dim=0).tolist() == pytest.approx([0.05] * 64, rel=0.02)
    assert (noise.t() @ noise / ROWS).fill_diagonal_(0).abs().max() < 4.5 * 0.05**2 / math.sqrt(ROWS)


def test_rows_are_of_the_generator(world: World, batch: tuple[Tensor, Tensor]) -> None:
    again, other = (world.batch(torch.Generator().manual_seed(seed), 50) for seed in (3, 4))
    assert torch.equal(again[0], world.batch(torch.Generator().manual_seed(3), 50)[0])
    assert not torch.equal(again[0], other[0])


@pytest.mark.parametrize("seed", range(3))
def test_no_sae_starts_at_the_features(seed: int) -> None:
    cfg = config.Config(act_size=64, dict_size=256, seed=seed, device="cpu")
    assert mcc(cosines(build_sae(cfg).W_dec.detach(), World(64, WORLD_SEED).directions)) < 0.5


# ---- metrics ----


def test_matching_is_the_best_of_all_and_signed() -> None:
    greedy_is_worse = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    assert matched(greedy_is_worse) == [1, 0] and mcc(greedy_is_worse) == pytest.approx(0.75)
    assert mcc(torch.tensor([[-1.0, 0.1], [0.2, -1.0]])) == pytest.approx(0.15)


def test_cosines_do_not_depend_on_norms() -> None:
    latents, features = torch.tensor([[3.0, 4.0], [0.0, -2.0], [5.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(cosines(latents, features), torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))


def test_firing() -> None:
    """Features: found in 3 rows, of which 2 are right, of 4; never found; always right; one that does not occur."""
    true = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    found = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    precision, recall, f1 = firing(found, true)
    assert precision == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert recall == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert f1 == pytest.approx((2 * 2 / (3 + 4) + 0 + 1) / 3)


def test_uniqueness_and_dead() -> None:
    nearest = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.0, 0.1, 0.3], [0.1, 0.0, 0.9]])
    assert ground_truth.uniqueness(nearest) == 2 / 4
    assert ground_truth.dead(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])) == 2 / 4


def test_shrinkage_is_the_best_divisor_and_removes_no_mean() -> None:
    x, x_hat = torch.tensor([[3.0, 1.0], [5.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    assert ground_truth.shrinkage(x, x_hat) == pytest.approx((4 + 9 + 1) / (6 + 15 + 1))
    assert ground_truth.shrinkage(x, 0.5 * x) == pytest.approx(0.5)


def test_explained_variance_is_about_the_mean() -> None:
    x = torch.tensor([[11.0, 0.0], [9.0, 2.0]])
    assert ground_truth.explained_variance(x, torch.tensor([[11.0, 1.0], [9.0, 2.0]])) == pytest.approx(1 - 1 / 4)
    assert ground_truth.explained_variance(x, x.mean(dim=0).expand(2, 2)) == 0


def test_the_true_features_score_one(world: World, batch: tuple[Tensor, Tensor]) -> None:
    """In another order, and with decoder rows of another norm."""
    x, truth = (rows[:10_000] for rows in batch)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    W_dec = 3 * world.directions[order]
    perfect = SimpleNamespace(W_dec=W_dec, encode=lambda x: truth[:, order] / 3, decode=lambda acts: acts @ W_dec)
    found = measure(perfect, world, x, truth)
    power = (x - x.mean(dim=0)).square().sum(dim=1).mean().item()
    ones = ("mcc", "precision", "recall", "f1", "uniqueness")
    assert [found[metric] for metric in ones] == pytest.approx([1] * 5)
    assert found["dead"] == 0 and found["l0"] == pytest.approx(6, abs=0.15)
    assert found["shrinkage"] == pytest.approx(1, abs=0.002)
    assert found["explained_variance"] == pytest.approx(1 - 64 * 0.05**2 / power, abs=0.001)


# ---- training and tables ----


def test_saes_that_share_batches_are_trained_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "HELD_OUT", 200)
    runs = [Run(16, 0, 2, "ours", None, sae_type, 2) for sae_type in config.TYPES]
    together = ground_truth.train(5 * 1024, runs)
    assert [result["sae_type"] for result in together] == list(config.TYPES)
    assert ground_truth.train(5 * 1024, runs[1:2]) == together[1:2]


def test_coefficients_are_interpolated_by_logarithms() -> None:
    l0s = [2.0**power for power in (9, 8, 8, 7, 6, 5, 4, 2, 1, 0, -1)] + [0.0]  # of 1/4, 1/4 sqrt(2), ...
    assert coefficient_for(64, l0s) == pytest.approx(1)
    assert coefficient_for(8, l0s) == pytest.approx(2**1.25)


def test_the_best_rate_of_all_seeds_is_shown() -> None:
    metrics = dict.fromkeys(ground_truth.METRICS, 0.5)
    run = {"act_size": 64, "target_l0": 6, "sae_type": "topk", "library": "sae_lens"}
    scores = {0.1: (0.9, 0.1), 0.2: (0.6, 0.7), 0.3: (0.5, 0.5)}
    results = [run | metrics | {"lr": lr, "mcc": mcc} for lr, by_seed in scores.items() for mcc in by_seed]
    (best,) = cells(results)
    assert best.lr == 0.2 and best.values["mcc"] == [0.6, 0.7]
    assert row(best)["MCC"] == ".65±.07" and row(best)["dead"] == ".50" and row(best)[""] == "sae_lens 0.2"
