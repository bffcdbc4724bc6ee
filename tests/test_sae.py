"""sae.py against the dense float64 reference, and each mistake that other SAE libraries have shipped."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import jaxtyping
import pytest
import torch
from reference import Reference, auxk, largest, reference
from torch import Tensor
from torch.testing import assert_close

from config import TYPES, Config
from kernels import choose, sparse
from kernels.sparse import GradientMemory, SparseLatents
from sae import SAE_TYPES, BaseAutoencoder, Lent, TopKSAE, build_sae

B, D, F = 8, 6, 40
DEAD = [0, 5, 11, 17, 23, 30, 38, 39]
PARAMETERS = ["W_enc", "b_enc", "W_dec", "b_dec"]
EXACT = dict(rtol=1e-9, atol=1e-11)

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))
chosen_types = pytest.mark.parametrize(
    "sae_type", [name for name, row in TYPES.items() if "l1_coeff" not in row.fields]
)
auxk_types = pytest.mark.parametrize("sae_type", [name for name, row in TYPES.items() if "aux_penalty" in row.fields])


@pytest.fixture(params=[1.0, 0.0], ids=["sparse", "dense"])
def density(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Take the sparse way always, or the dense one wherever a type may, in chunks that come out uneven."""
    monkeypatch.setattr(choose, "MAX_DENSITY", request.param)
    monkeypatch.setattr(choose, "CPU_CHUNK_ROWS", 3)
    monkeypatch.setattr(choose, "CPU_CHUNK_LATENTS", 9)
    return request.param


def config(sae_type: str = "topk", **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, target_l0=3, prefixes=(0.1, 0.5, 1.0), bandwidth=0.6, top_k_aux=3,
        aux_penalty=1 / 32, dead_after_tokens=100, device="cpu",
    )  # fmt: skip
    return Config(sae_type=sae_type, **(small | changes))


def make_sae(sae_type: str, dead: Sequence[int] = (), **changes: object) -> BaseAutoencoder:
    """Build a float64 SAE whose parameters are all random (decoder norms too), with some latents already dead."""
    sae = build_sae(config(sae_type, **changes)).double()
    rng = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    with torch.no_grad():
        sae.W_enc += 0.3 * random(*sae.W_enc.t().shape).t()
        sae.W_dec *= 0.5 + random(F, 1).abs()
        sae.b_enc.copy_(0.3 * random(F))
        sae.b_dec.copy_(random(*sae.b_dec.shape))
        sae.input_scale.fill_(1.7)
        if not sae.y_is_x:
            sae.input_scale.fill_(0.6)
            sae.target_scale.fill_(1.7)
        if sae.cfg.skip:
            sae.W_skip.copy_(0.3 * random(*sae.W_skip.shape))
        if len(sae.cfg.layers) > 1:
            sae.hook_scales.copy_(torch.tensor([0.5, 2.0]))
        if sae_type == "jumprelu":
            sae.threshold.copy_(0.2 + 0.5 * random(F).abs())
        if sae_type == "vanilla":
            sae.steering.copy_(torch.tensor([0.7, -0.2]))
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
        sae.tokens_since_fired[list(dead)] = sae.cfg.dead_after
    return sae


def rows(*shape: int, seed: int = 0, mean: float = 0.5) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def reference_of(sae: BaseAutoencoder, x: Tensor, y: Tensor | None = None) -> Reference:
    cfg, params = sae.cfg, dict(sae.named_parameters())
    params |= {name: buffer for name, buffer in sae.named_buffers() if name in ("threshold", "steering")}
    same = ("input_unit_norm", "target_l0", "l1_coeff", "aux_penalty", "top_k_aux")
    options = {field: getattr(cfg, field) for field in same}
    options |= dict(eps=cfg.bandwidth * 1.7, dead=sae.dead, widths=[round(share * F) for share in cfg.prefixes])
    options["scale"] = 1.7
    options["hook_scales"] = sae.hook_scales if len(cfg.layers) > 1 else None
    return reference(cfg.sae_type, params, x, y, training=sae.training, **options)


def gradients(sae: BaseAutoencoder, losses: dict[str, Tensor], x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Map each term to the gradients of every parameter, and of x where it wants one, by name."""
    leaves = dict(sae.named_parameters()) | ({"x": x} if x.requires_grad else {})
    return {
        term: dict(zip(leaves, torch.autograd.grad(l, leaves.values(), retain_graph=True, materialize_grads=True)))
        for term, l in losses.items()
    }


def across(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Remove from each row of a gradient what is along the same row of W_dec."""
    W = W_dec.detach() / W_dec.detach().norm(dim=1, keepdim=True)
    return gradient - (gradient * W).sum(dim=1, keepdim=True) * W


# ---- the whole computation ----


def check_against_the_reference(sae: BaseAutoencoder, density: float, x: Tensor, y: Tensor | None = None) -> None:
    expected, row = reference_of(sae, x, y), sae.cfg.type
    always_sparse = "l1_coeff" not in row.fields and (sae.training or row.sae_lens == "topk")
    for given in (x, x.clone().requires_grad_()):
        out = sae(given, y)
        assert (out.latents.support is None) == (density == 0.0 and not always_sparse)
        assert_close(out.sae_out, expected.sae_out, **EXACT)
        assert_close(out.latents.to_dense(), expected.latents, **EXACT)
        assert_close(out.losses, expected.losses, **EXACT)
        assert_close(out.loss, sum(expected.losses.values()), **EXACT)
        found = gradients(sae, out.losses, given)
        for term, grads in found.items():
            assert_close(grads, {name: expected.grads[term][name] for name in grads}, **EXACT)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("l1_coeff", [None, 0.1], ids=["steered", "fixed"])
@pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])
@all_types
def test_outputs_losses_and_all_gradients_equal_the_reference(
    density: float, sae_type: str, input_unit_norm: bool, l1_coeff: float | None, training: bool
) -> None:
    sae = make_sae(sae_type, dead=DEAD, input_unit_norm=input_unit_norm, l1_coeff=l1_coeff).train(training)
    check_against_the_reference(sae, density, rows(B))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@all_types
def test_a_transcoder_equals_the_reference(density: float, sae_type: str, skip: bool, training: bool) -> None:
    """y is wider than x, and of another scale."""
    sae = make_sae(sae_type, dead=DEAD, target_site="mlp_out", target_size=D + 3, skip=skip).train(training)
    y = 5 * torch.cat([rows(B, seed=1), rows(B, seed=2)], dim=1)[:, : D + 3]
    check_against_the_reference(sae, density, rows(B), y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@all_types
def test_a_crosscoder_equals_the_reference(density: float, sae_type: str, training: bool) -> None:
    sae = make_sae(sae_type, dead=DEAD, layer=(0, 2)).train(training)
    check_against_the_reference(sae, density, torch.cat([rows(B), 4 * rows(B, seed=1)], dim=1))


@all_types
def test_the_output_of_a_transcoder_does_not_depend_on_y(sae_type: str) -> None:
    sae = make_sae(sae_type, target_site="mlp_out", target_size=4).eval()
    x, y = rows(B), rows(B, seed=1)[:, :4]
    outs = [sae(x, y), sae(x, 100 * y), sae(x)]
    assert all(torch.equal(out.sae_out, outs[0].sae_out) for out in outs)
    assert outs[0].loss < outs[1].loss and not outs[2].losses


@all_types
def test_a_new_transcoder_starts_at_the_mean_of_y_with_small_latents_in_its_units(sae_type: str) -> None:
    sae = build_sae(config(sae_type, target_site="mlp_out", target_size=4, skip=True)).double()
    x, y = 0.1 * rows(500), 50 * rows(500, seed=1)[:, :4]
    sae.initialise_from(x, y)
    assert_close(sae.b_dec, y.mean(dim=0), check_dtype=False)
    for scale, acts in ((sae.input_scale, x), (sae.target_scale, y)):
        assert_close(scale, (acts - acts.mean(dim=0)).square().mean().sqrt(), check_dtype=False)
    pre = x @ sae.W_enc + (sae.b_enc + 0 if sae_type != "vanilla" else -x.mean(dim=0) @ sae.W_enc)
    assert_close(pre.mean(dim=0), torch.zeros(F, dtype=pre.dtype), atol=1e-9, rtol=0)
    assert 0.07 < pre.std() / sae.target_scale < 0.13
    assert not sae.W_skip.any()


def test_a_crosscoder_scales_its_hooks_to_the_same_standard_deviation() -> None:
    sae = build_sae(config(layer=(0, 1, 2))).double()
    parts = [rows(500), 3 * rows(500, seed=1), 0.2 * rows(500, seed=2)]
    x = torch.cat(parts, dim=1)
    sae.initialise_from(x)
    z, std, mean = sae.normalise(x)
    stds = [(part - part.mean(dim=0)).square().mean().sqrt() for part in z.split(D, dim=1)]
    assert_close(stds, [sae.input_scale.double()] * 3)
    assert_close(z * std + mean, x)
    assert_close(sae.scale.double().square(), torch.stack([p.var(dim=0, correction=0).mean() for p in parts]).mean())


@pytest.mark.parametrize(
    "sae_type, term, reached",
    [
        ("vanilla", "l1", PARAMETERS),
        ("topk", "auxk", PARAMETERS),
        ("batchtopk", "auxk", PARAMETERS),
        ("matryoshka", "auxk", PARAMETERS),
        ("jumprelu", "l0", ["threshold"]),
        ("jumprelu", "auxk", PARAMETERS),
    ],
)
def test_a_loss_term_reaches_these_parameters_and_no_other(sae_type: str, term: str, reached: list[str]) -> None:
    sae, x = make_sae(sae_type, dead=DEAD), rows(B).requires_grad_()
    losses = sae(x).losses
    assert term in losses and next(iter(losses)) == "mse"
    found = gradients(sae, losses, x)
    assert {name for name, grad in found[term].items() if grad.any()} - {"x"} == set(reached)
    assert all(grad.any() for grad in found["mse"].values())


@all_types
def test_gradient_of_W_enc_is_stored_latent_by_latent(density: float, sae_type: str) -> None:
    sae = make_sae(sae_type, dead=DEAD)
    loss = sae(rows(B)).loss
    (made,) = torch.autograd.grad(loss, sae.W_enc, retain_graph=True)
    loss.backward()
    assert sae.W_enc.stride() == made.stride() == sae.W_enc.grad.stride() == (1, D)


@chosen_types
def test_nothing_of_batch_times_dict_size_is_saved_for_backward(sae_type: str) -> None:
    sae, sizes = make_sae(sae_type, dead=DEAD), []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = sae(rows(64))
    assert "auxk" in out.losses and sizes and max(sizes) < 64 * F


@pytest.mark.parametrize("input_unit_norm", [True, False])
@all_types
def test_encode_and_forward_change_nothing_in_either_mode(density: float, sae_type: str, input_unit_norm: bool) -> None:
    sae = make_sae(sae_type, dead=DEAD, input_unit_norm=input_unit_norm)
    before = copy.deepcopy(sae.state_dict())
    for training in (True, False):
        sae.train(training)(rows(B))
        sae.encode(rows(B))
        assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


class Twice(TopKSAE):
    """Decode each row's latents a second time, at half strength, and compare both reconstructions with y."""

    def reconstruct(self, code: SparseLatents, W_dec: Tensor) -> Tensor:
        acts = (code.acts / 2, code.acts)
        return torch.stack([sparse.decode(a, code.support, W_dec, self.lent.memory) + self.b_dec for a in acts])


@pytest.mark.parametrize("dead", [[], DEAD], ids=["all alive", "some dead"])
def test_two_decodings_and_two_backward_passes_share_gradient_memory(dead: list[int]) -> None:
    """Memory that is lent twice would have the second gradient written over the first."""
    sae = Twice(config()).double()
    sae.load_state_dict(make_sae("topk", dead=dead).state_dict())
    memory = GradientMemory(W_enc=torch.empty_like(sae.W_dec), W_dec=torch.empty_like(sae.W_dec))
    sae.lent = Lent(memory=memory)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    W_enc, b_enc, W_dec, b_dec = (leaves[name] for name in PARAMETERS)
    for seed in range(3):
        x = rows(B, seed=seed)
        sae(x).loss.backward()
        pre = (x - b_dec) @ W_enc + b_enc
        acts = torch.relu(pre) * torch.stack([largest(row, sae.cfg.target_l0) for row in pre])
        y_hats = torch.stack([acts / 2, acts]) @ W_dec + b_dec
        loss = ((y_hats - x).pow(2).mean(dim=2) / x.var(dim=1, correction=0).clamp(min=1.7**2 / 10)).mean()
        if dead:
            loss = loss + auxk(pre[:, dead], W_dec[dead], (x - y_hats[1]).detach(), sae.cfg.top_k_aux) / 32
        loss.backward()
        for name, p in sae.named_parameters():  # never cleared, so they add up
            assert_close(p.grad, leaves[name].grad, **EXACT, msg=f"{name} after {seed + 1}")


@all_types
def test_rows_near_a_constant_do_not_outweigh_all_others(sae_type: str) -> None:
    """The unit of a row's squared error is its variance, here 4, but a tenth of s^2 at least; Vanilla's is s^2."""
    sae, row = make_sae(sae_type), torch.tensor([2.0, -2.0] * (D // 2), dtype=torch.float64)
    units = [1.7**2] * 3 if sae_type == "vanilla" else [4, 1.7**2 / 10, 1.7**2 / 10]
    found = sae.variance(torch.stack([row + 5, 0.01 * row + 5, 0 * row]))
    assert_close(found.expand(3), torch.tensor(units, dtype=torch.float64))


@all_types
def test_a_dictionary_and_its_latents_say_what_they_are(sae_type: str) -> None:
    sae = make_sae(sae_type, target_site="mlp_out", target_size=4).eval()
    assert (sae.d_in, sae.dict_size, sae.d_out) == (D, F, 4)
    latents = sae(rows(B)).latents
    l0 = float((sae.encode(rows(B)) > 0).sum()) / B
    assert repr(latents) == f"SparseLatents({B} rows, L0 {l0:.1f}; values, indices, offsets, to_dense())"


# ---- JumpReLU ----


def test_jumprelu_steps_on_pre_activations_within_an_open_window(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One latent with weight 1 and no bias, so that pre = x, and errors in units of 1: every number is exact."""
    monkeypatch.setattr("sae.LEAST_VARIANCE", 1)
    theta, eps, l1_coeff = 0.5, 0.25, 0.125
    pre = [0.375, 0.4375, 0.5, 0.5625, 0.625, 2.0, 0.0, -0.5]  # an edge, inside, threshold, inside, an edge, outside
    cfg = config("jumprelu", act_size=1, dict_size=1, target_l0=1, l1_coeff=l1_coeff, bandwidth=eps)
    sae = build_sae(cfg).double()
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.W_dec.fill_(1)
        sae.threshold.fill_(theta)
    out = sae(torch.tensor(pre, dtype=torch.float64)[:, None])
    assert out.latents.to_dense().flatten().tolist() == [0, 0, 0, 0.5625, 0.625, 2, 0, 0]
    assert out.losses["l0"] == l1_coeff * 3 / 8
    d_mse, d_l0 = (torch.autograd.grad(out.losses[t], sae.threshold, retain_graph=True)[0] for t in ("mse", "l0"))
    d_f = [2 * (0 - 0.4375) / 8, 2 * (0 - 0.5) / 8, 0.0]  # of the three inside; where f = pre it reconstructs exactly
    assert d_mse.item() == sum(d_f) * -(theta / eps)
    assert d_l0.item() == l1_coeff / 8 * 3 * -(1 / eps)


@pytest.mark.parametrize("input_unit_norm", [True, False])
@all_types
def test_initialise_from_sets_b_dec_the_scale_and_thresholds_above_which_twice_target_l0_fire(
    sae_type: str, input_unit_norm: bool
) -> None:
    sae = build_sae(config(sae_type, input_unit_norm=input_unit_norm)).double()
    assert sae.input_scale == 0
    x = 30 + 5 * rows(50) * torch.arange(1, D + 1)
    z = sae.normalise(x)[0]
    scale = (z - z.mean(dim=0)).square().mean().sqrt()
    sae.initialise_from(x.view(5, 10, D))
    assert_close(sae.b_dec.data, z.mean(dim=0))
    assert_close(sae.input_scale, scale)
    if "l1_coeff" in sae.cfg.type.fields:
        fired = (sae.eval()(x).latents.to_dense() > 0).sum().item()
        assert fired == pytest.approx(2 * 3 * 50, abs=1)  # one is at the floor itself
    if sae_type == "jumprelu":
        assert (sae.threshold == sae.threshold[0]).all() and not sae.b_enc.any()
        assert_close(sae.eps, 0.6 * scale)


# ---- AuxK and dead latents ----


@auxk_types
@pytest.mark.parametrize("top_k_aux", [3, len(DEAD), 100])
def test_auxk_reaches_dead_rows_only_and_its_target_is_detached(sae_type: str, top_k_aux: int) -> None:
    sae = make_sae(sae_type, dead=DEAD, top_k_aux=top_k_aux)
    sae.b_enc.data[DEAD] = 2.0  # each of them fires somewhere, as far as top_k_aux lets it
    x = rows(64).requires_grad_()
    grads = gradients(sae, sae(x).losses, x)["auxk"]
    assert_close(grads, reference_of(sae, x).grads["auxk"])
    for name, per_latent in (("W_enc", grads["W_enc"].t()), ("W_dec", grads["W_dec"]), ("b_enc", grads["b_enc"])):
        reached = per_latent.reshape(F, -1).any(dim=1).nonzero().flatten().tolist()
        assert set(reached) <= set(DEAD) and len(reached) >= min(top_k_aux, len(DEAD)), name


@pytest.mark.parametrize("scale", [1, 10])
@auxk_types
def test_auxk_is_the_unexplained_share_of_the_error_and_b_dec_is_no_part_of_it(sae_type: str, scale: float) -> None:
    """Live latents off, errors u and -u about b_dec: dead decoder rows of 0 explain nothing, exactly 1 of 1."""
    sae = make_sae(sae_type, dead=DEAD)
    u = scale * rows(4, mean=0.0)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)[DEAD] = 1.0
        sae.b_dec.fill_(3)
        sae.W_dec[DEAD] = 0
    losses = sae(torch.cat([3 + u, 3 - u])).losses
    variance = (u - u.mean(dim=1, keepdim=True)).square().mean(dim=1)
    assert_close(losses["mse"], (u.square().mean(dim=1) / variance.clamp(min=1.7**2 / 10)).mean())
    assert_close(losses["auxk"].item(), 1 / 32)


@auxk_types
def test_auxk_stays_bounded_for_one_row_and_for_no_error_at_all(sae_type: str) -> None:
    sae = make_sae(sae_type, dead=DEAD)
    assert sae(rows(1)).losses["auxk"] < 100
    sae.b_enc.data.fill_(-1)
    losses = sae(sae.b_dec.detach().expand(B, D)).losses
    assert losses["mse"] == losses["auxk"] == 0


@auxk_types
def test_auxk_trains_the_latents_that_have_been_dead_for_longest(sae_type: str) -> None:
    """Twice act_size of them, here 12 of the 20 that are dead."""
    sae = make_sae(sae_type, dead=range(20))
    longest = [2, 3, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19]
    sae.tokens_since_fired[longest] += torch.arange(1, 13)
    x = rows(B)
    (grad,) = torch.autograd.grad(sae(x).losses["auxk"], sae.W_dec)
    trained = {*grad.any(dim=1).nonzero().flatten().tolist()}
    assert trained and trained <= {*longest}
    params = {name: p.detach() for name, p in sae.named_parameters()}
    pre = ((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"])[:, longest]
    error = (x - reference_of(sae, x).sae_out).detach()
    assert_close(sae(x).losses["auxk"] * 32, auxk(pre, params["W_dec"][longest], error, 3))


@all_types
def test_auxk_is_absent_in_evaluation_and_without_dead_latents(sae_type: str) -> None:
    assert "auxk" not in make_sae(sae_type)(rows(B)).losses
    assert "auxk" not in make_sae(sae_type, dead=DEAD).eval()(rows(B)).losses


@all_types
def test_counters_count_training_tokens_and_restart_on_firing(density: float, sae_type: str) -> None:
    sae = make_sae(sae_type, dead_after_tokens=21)
    sae.b_enc.data[: F - 1] = -3.0  # few of these fire; TopK keeps some that do not
    expected = torch.zeros(F, dtype=torch.int64)
    for seed, shape in enumerate([(2, 3), (B,), (), (3, 1, 2)]):
        latents = sae(rows(*shape, seed=seed)).latents
        sae.after_step(latents)
        fired = (latents.to_dense() > 0).any(dim=0)
        expected = torch.where(fired, 0, expected + math.prod(shape))
        assert torch.equal(sae.state_dict()["tokens_since_fired"], expected)
    assert expected.unique().numel() > 2 and expected.max() == 21
    assert torch.equal(sae.dead, expected == 21)


# ---- BatchTopK's threshold ----


def smallest_kept(sae: BaseAutoencoder, x: Tensor) -> Tensor:
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach().flatten()
    return pre.sort(descending=True).values[sae.cfg.target_l0 * len(x) - 1]


def move_threshold(sae: BaseAutoencoder, x: Tensor) -> None:
    sae.after_step(sae(x).latents)


def fresh_batchtopk() -> BaseAutoencoder:
    sae = make_sae("batchtopk")
    sae.threshold.zero_()
    return sae


def test_batchtopk_threshold_is_a_running_mean_free_of_its_start() -> None:
    sae, kept = fresh_batchtopk(), []
    for seed in range(3):
        x = rows(B, seed=seed)
        kept.append(smallest_kept(sae, x))
        move_threshold(sae, x)
        weights = [0.9**age for age in reversed(range(len(kept)))]
        expected = sum(w * c for w, c in zip(weights, kept)) / sum(weights)
        assert_close(sae.threshold, expected, rtol=1e-5, atol=0)


def test_batchtopk_threshold_ignores_a_batch_in_which_nothing_fires() -> None:
    sae, x = fresh_batchtopk(), rows(B)
    b_enc = sae.b_enc.detach().clone()
    sae.b_enc.data.fill_(-1e6)
    move_threshold(sae, x)
    assert sae.threshold == 0
    sae.b_enc.data.copy_(b_enc)
    for _ in range(30):  # of constant batches the mean is that constant, from the first on
        move_threshold(sae, x)
        assert_close(sae.threshold, smallest_kept(sae, x), rtol=1e-5, atol=0)


def test_batchtopk_fires_k_latents_per_token_in_evaluation_too() -> None:
    sae = fresh_batchtopk()
    for seed in range(200):
        move_threshold(sae, rows(64, seed=seed))
    fired = (sae.encode(rows(4000, seed=999)) > 0).sum(dim=1).double().mean().item()
    assert fired == pytest.approx(sae.cfg.target_l0, rel=0.05)


@pytest.mark.parametrize("input_unit_norm", [True, False])
@all_types
def test_encode_gives_the_latents_of_evaluation_which_do_not_depend_on_the_batch(
    density: float, sae_type: str, input_unit_norm: bool
) -> None:
    sae, x = make_sae(sae_type, input_unit_norm=input_unit_norm), rows(2, 3)
    encoded = sae.encode(x)
    sae.eval()
    alone = torch.cat([sae(row).latents.to_dense() for row in x.view(-1, D)])
    assert alone.any() and encoded.shape == (2, 3, F)
    for found in (encoded, sae.encode(x), sae(x).latents.to_dense()):
        assert_close(found.view(-1, F), alone)


# ---- Matryoshka ----


def test_matryoshka_with_one_prefix_is_batchtopk(density: float) -> None:
    one, other = (make_sae(sae_type, dead=DEAD, prefixes=(1.0,)) for sae_type in ("matryoshka", "batchtopk"))
    for step in range(3):
        for sae in (one, other):
            sae.zero_grad()
            out = sae(rows(B, seed=step))
            out.loss.backward()
            sae.after_step(out.latents)
        assert_close([p.grad for p in one.parameters()], [p.grad for p in other.parameters()], **EXACT)
    x = rows(B, seed=9)
    assert_close(one.eval()(x).sae_out, other.eval()(x).sae_out, **EXACT)
    assert torch.equal(one.encode(x), other.encode(x)) and torch.equal(one.threshold, other.threshold)


# ---- parameters ----


@pytest.mark.parametrize("dict_size", [32, 512])
@all_types
def test_a_new_sae_has_a_tied_encoder_of_unit_scale_zero_biases_and_its_seeds_weights(
    sae_type: str, dict_size: int
) -> None:
    sae = build_sae(config(sae_type, dict_size=dict_size))
    assert_close(sae.W_dec.norm(dim=1), torch.ones(dict_size))
    assert torch.equal(sae.W_enc, sae.W_dec.t()) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert set(dict(sae.named_parameters())) == {*PARAMETERS, *(["threshold"] if sae_type == "jumprelu" else [])}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in sae.parameters())
    same, other = (build_sae(config(sae_type, dict_size=dict_size, seed=seed)).W_dec for seed in (0, 1))
    assert torch.equal(sae.W_dec, same) and not torch.equal(sae.W_dec, other)


@all_types
def test_constraints_after_and_before_a_step(sae_type: str) -> None:
    """Rows of W_dec keep norm 1, and their gradient has no part along them; thresholds stay at 0 or above."""
    sae = make_sae(sae_type)
    sae.constrain()
    sae(rows(64)).loss.backward()
    W, grad = sae.W_dec.detach().clone(), sae.W_dec.grad.clone()
    assert (grad * W).sum(dim=1).abs().max() > 1e-3
    sae.project_decoder_gradient()
    assert_close(sae.W_dec.grad, across(grad, W))
    with torch.no_grad():
        moved = sae.W_dec.sub_(sae.W_dec.grad).clone()
        if sae_type == "jumprelu":
            sae.threshold[:3] = torch.tensor([-0.1, 0.0, 0.1])
    sae.constrain()
    assert_close(sae.W_dec.data, moved / moved.square().sum(dim=1, keepdim=True).sqrt())
    if sae_type == "jumprelu":
        assert_close(sae.threshold[:3].tolist(), [0.0, 0.0, 0.1])


@pytest.mark.parametrize("sae_type", ["vanilla", "jumprelu"])
def test_folding_decoder_norms_keeps_the_output_and_every_loss(sae_type: str) -> None:
    sae, x = make_sae(sae_type).eval(), rows(B)
    before, norms = sae(x), sae.W_dec.detach().norm(dim=1)
    sae.fold_decoder_norms()
    after = sae(x)
    assert_close(sae.W_dec.norm(dim=1), torch.ones_like(norms))
    assert_close(after.latents.to_dense(), before.latents.to_dense() * norms)
    assert_close((after.sae_out, after.losses), (before.sae_out, before.losses))
    folded = copy.deepcopy(sae.state_dict())
    sae.fold_decoder_norms()
    assert all(torch.equal(value, folded[name]) for name, value in sae.state_dict().items())
    sae.W_dec.data[3] = 0
    with pytest.raises(ValueError, match=r"^W_dec has rows of zeros"):
        sae.fold_decoder_norms()


# ---- inputs and outputs ----


def test_input_unit_norm_uses_the_unbiased_std_and_maps_the_output_back() -> None:
    """No latent fires, so y_hat = b_dec; four numbers of mean 2, squared deviations 1 + 1 + 9 + 9 = 20."""
    sae = build_sae(config("vanilla", act_size=4, input_unit_norm=True)).double()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(torch.tensor([1.0, 0.0, -1.0, 2.0]))
    x = torch.tensor([[1.0, 3.0, -1.0, 5.0]], dtype=torch.float64)
    std = math.sqrt(20 / 3)
    out = sae(x)
    assert_close(out.sae_out, sae.b_dec.detach() * std + torch.full_like(x, 2), rtol=1e-5, atol=0)
    assert_close(out.losses["mse"], ((x - 2) / (std + 1e-5) - sae.b_dec.detach()).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@all_types
def test_any_leading_shape_and_float_type_goes_in_and_float32_comes_out(
    sae_type: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    sae = make_sae(sae_type, input_unit_norm=True).float()
    x = rows(*shape).to(dtype)
    out, acts = sae(x), sae.encode(x)
    assert out.sae_out.shape == x.shape and out.sae_out.dtype == out.loss.dtype == torch.float32
    assert out.loss.shape == () and out.latents.to_dense().shape == (math.prod(shape), F)
    assert acts.shape == (*shape, F) and sae.decode(acts).shape == x.shape
    assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)
    assert_close(sae(x.float()).sae_out, out.sae_out)


@all_types
def test_a_bfloat16_product_changes_the_numbers_a_little_and_their_type_not_at_all(
    density: float, sae_type: str
) -> None:
    x = rows(64).float()
    exact, rounded = (make_sae(sae_type, product_dtype=d).float() for d in ("float32", "bfloat16"))
    found, expected = rounded(x), exact(x)
    found.loss.backward()
    assert all(p.grad.dtype == found.loss.dtype == torch.float32 for p in rounded.parameters())
    difference = (found.sae_out - expected.sae_out).norm() / expected.sae_out.norm()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize("method", ["forward", "encode", "initialise_from"])
@pytest.mark.parametrize(
    "x, named",
    [
        (torch.zeros(3, D + 1), "[3, 7]"),
        (torch.zeros(3, D, dtype=torch.int64), "torch.int64"),
        (torch.zeros(0, D), "[0, 6]"),
        (torch.zeros(()), "[]"),
    ],
    ids=["width", "integers", "empty", "scalar"],
)
def test_a_bad_input_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, x: Tensor, named: str, method: str) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    with pytest.raises(ValueError) as error:
        getattr(build_sae(config()), method)(x)
    message = str(error.value)
    assert named in message and "[..., 6]" in message and "\n" not in message


def test_each_class_is_built_under_its_name_and_says_it_whatever_the_config() -> None:
    assert tuple(SAE_TYPES) == tuple(TYPES)
    for name, sae_class in SAE_TYPES.items():
        assert type(build_sae(config(name))) is sae_class
        assert {sae_class(config(other)).cfg.sae_type for other in SAE_TYPES} == {name}
    with pytest.raises(ValueError, match=r"^act_size = None: give [^\n]*$"):
        build_sae(config(act_size=None))


def test_an_sae_can_be_pickled(tmp_path: Path) -> None:
    sae = make_sae("batchtopk")
    torch.save(sae, tmp_path / "sae.pt")
    again = torch.load(tmp_path / "sae.pt", weights_only=False)
    assert torch.equal(again(rows(B)).sae_out, sae(rows(B)).sae_out)
