"""sae.py against the dense float64 reference, and every mistake of DESIGN section 9 that an SAE can make."""

import copy
import math
from collections.abc import Sequence
from typing import get_args

import jaxtyping
import pytest
import torch
from reference import Reference, reference
from torch import Tensor
from torch.testing import assert_close

import choose
from config import Config, SaeType
from sae import SAE_TYPES, BaseAutoencoder, SAEOutput, build_sae
from sparse import SparseLatents

B, D, F = 8, 6, 40
DEAD = [0, 5, 11, 17, 23, 30, 38, 39]
PARAMETERS = ["W_enc", "b_enc", "W_dec", "b_dec"]

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))
auxk_types = pytest.mark.parametrize("sae_type", ["topk", "batchtopk"])
sparse_and_dense = pytest.mark.parametrize("density", [1.0, 0.0], ids=["sparse", "dense"])


def config(sae_type: str = "topk", **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, top_k=3, l1_coeff=0.1, bandwidth=0.6, threshold_init=0.5, top_k_aux=3,
        aux_penalty=1 / 32, dead_after_tokens=100, input_unit_norm=False, device="cpu",
    )  # fmt: skip
    return Config(sae_type=sae_type, **(small | changes))


def make_sae(sae_type: str, dead: Sequence[int] = (), **changes: object) -> BaseAutoencoder:
    """A float64 SAE whose parameters are all random (decoder norms too), with some latents already dead."""
    sae = build_sae(config(sae_type, **changes)).double()
    rng = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    with torch.no_grad():
        sae.W_enc += 0.3 * random(F, D).t()
        sae.W_dec *= 0.5 + random(F, 1).abs()
        sae.b_enc.copy_(0.3 * random(F))
        sae.b_dec.copy_(random(D))
        sae.input_scale.fill_(1.7)
        if sae_type == "jumprelu":
            sae.threshold.copy_(0.2 + 0.5 * random(F).abs())
        if sae_type == "batchtopk":
            sae.threshold.fill_(0.4)
        sae.tokens_since_fired[list(dead)] = sae.cfg.dead_after_tokens
    return sae


def rows(*shape: int, seed: int = 0, mean: float = 0.5) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def reference_of(sae: BaseAutoencoder, x: Tensor) -> Reference:
    params = dict(sae.named_parameters())
    if sae.cfg.sae_type == "batchtopk":
        params["threshold"] = sae.threshold
    return reference(
        sae.cfg.sae_type,
        params,
        x,
        training=sae.training,
        input_unit_norm=sae.cfg.input_unit_norm,
        top_k=sae.cfg.top_k,
        l1_coeff=sae.cfg.l1_coeff,
        eps=sae.cfg.bandwidth * 1.7,
        aux_penalty=sae.cfg.aux_penalty,
        top_k_aux=sae.cfg.top_k_aux,
        dead=sae.tokens_since_fired >= sae.cfg.dead_after_tokens,
    )


def gradients(sae: BaseAutoencoder, out: SAEOutput, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """term -> name of a parameter, or "x" -> gradient."""
    leaves = {"x": x} | dict(sae.named_parameters())
    return {
        term: dict(zip(leaves, torch.autograd.grad(l, leaves.values(), retain_graph=True, materialize_grads=True)))
        for term, l in out.losses.items()
    }


# ---- the whole computation ----


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    "sae_type, density",
    [("vanilla", 1.0), ("vanilla", 0.0), ("topk", 1.0), ("topk", 0.0), ("batchtopk", 1.0), ("batchtopk", 0.0),
     ("jumprelu", 1.0), ("jumprelu", 0.0)],
)  # fmt: skip
def test_outputs_losses_and_all_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, density: float, input_unit_norm: bool, training: bool
) -> None:
    monkeypatch.setattr(choose, "MAX_DENSITY", density)
    monkeypatch.setattr(choose, "CPU_CHUNK_ROWS", 3)
    monkeypatch.setattr(choose, "CPU_CHUNK_LATENTS", 9)
    sae = make_sae(sae_type, dead=DEAD, input_unit_norm=input_unit_norm).train(training)
    x = rows(B).requires_grad_()
    expected = reference_of(sae, x)
    out = sae(x)
    if sae_type != "topk":
        always_sparse = sae_type == "batchtopk" and training
        assert isinstance(out.acts, SparseLatents) == (density == 1.0 or always_sparse)
    assert_close(out.sae_out, expected.sae_out, rtol=1e-9, atol=1e-11)
    assert_close(out.latents.to_dense(), expected.latents, rtol=1e-9, atol=1e-11)
    assert_close(out.losses, expected.losses, rtol=1e-9, atol=1e-11)
    assert_close(out.loss, sum(expected.losses.values()), rtol=1e-9, atol=1e-11)
    found = gradients(sae, out, x)
    assert set(found) == set(expected.grads)
    for term, grads in found.items():
        wanted = {name: expected.grads[term][name] for name in grads}
        assert_close(grads, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "sae_type, term, reached",
    [
        ("vanilla", "mse", PARAMETERS),
        ("vanilla", "l1", PARAMETERS),
        ("topk", "mse", PARAMETERS),
        ("topk", "auxk", PARAMETERS),
        ("batchtopk", "mse", PARAMETERS),
        ("batchtopk", "auxk", PARAMETERS),
        ("jumprelu", "mse", [*PARAMETERS, "threshold"]),
        ("jumprelu", "l0", ["threshold"]),
    ],
)
def test_a_loss_term_reaches_these_parameters_and_no_other(sae_type: str, term: str, reached: list[str]) -> None:
    sae = make_sae(sae_type, dead=DEAD)
    x = rows(B).requires_grad_()
    out = sae(x)
    assert len(out.losses) == 2
    grads = gradients(sae, out, x)[term]
    assert {name for name, grad in grads.items() if grad.any()} - {"x"} == set(reached)


@sparse_and_dense
@all_types
def test_gradient_of_W_enc_is_stored_latent_by_latent(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, density: float
) -> None:
    monkeypatch.setattr(choose, "MAX_DENSITY", density)
    sae = make_sae(sae_type, dead=DEAD)
    loss = sae(rows(B)).loss
    (made,) = torch.autograd.grad(loss, sae.W_enc, retain_graph=True)
    loss.backward()
    assert sae.W_enc.stride() == made.stride() == sae.W_enc.grad.stride() == (1, D)


@auxk_types
def test_nothing_of_batch_times_dict_size_is_saved_for_backward(sae_type: str) -> None:
    sae, sizes = make_sae(sae_type, dead=DEAD), []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = sae(rows(64))
    assert "auxk" in out.losses and sizes and max(sizes) < 64 * F


# ---- JumpReLU ----


@sparse_and_dense
def test_jumprelu_steps_on_pre_activations_within_an_open_window(
    monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    """One latent with weight 1 and no bias, so that pre = x: every number is exact."""
    monkeypatch.setattr(choose, "MAX_DENSITY", density)
    theta, eps, l1_coeff = 0.5, 0.25, 0.125
    pre = [0.375, 0.4375, 0.5, 0.5625, 0.625, 2.0, 0.0, -0.5]  # an edge, inside, threshold, inside, an edge, outside
    cfg = config("jumprelu", act_size=1, dict_size=1, top_k=1, l1_coeff=l1_coeff, bandwidth=eps, threshold_init=theta)
    sae = build_sae(cfg).double()
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.W_dec.fill_(1)
    x = torch.tensor(pre, dtype=torch.float64)[:, None]
    out = sae(x)
    assert out.latents.to_dense().flatten().tolist() == [0, 0, 0, 0.5625, 0.625, 2, 0, 0]
    assert out.losses["l0"] == l1_coeff * 3 / 8
    d_mse, d_l0 = (torch.autograd.grad(out.losses[t], sae.threshold, retain_graph=True)[0] for t in ("mse", "l0"))
    d_f = [2 * (0 - 0.4375) / 8, 2 * (0 - 0.5) / 8, 0.0]  # of the three inside; where f = pre it reconstructs exactly
    assert d_mse.item() == sum(d_f) * -(theta / eps)
    assert d_l0.item() == l1_coeff / 8 * 3 * -(1 / eps)


def test_jumprelu_threshold_and_window_scale_with_the_input_and_constrain_keeps_the_threshold_from_below_0() -> None:
    sae = make_sae("jumprelu")
    x = 30 + 5 * rows(50)
    sae.initialise_from(x)
    scale = (x - x.mean(dim=0)).norm(dim=1).square().mean().sqrt()
    assert_close(sae.b_dec.data, x.mean(dim=0))
    assert_close(sae.threshold.data, (0.5 * scale).expand(F))
    assert_close(sae.eps, 0.6 * scale)
    with torch.no_grad():
        sae.threshold[:3] = torch.tensor([-0.1, 0.0, 0.1])
    sae.constrain()
    assert_close(sae.threshold[:3].tolist(), [0.0, 0.0, 0.1])


# ---- AuxK and dead latents ----


@auxk_types
@pytest.mark.parametrize("top_k_aux", [3, len(DEAD), 100])
def test_auxk_reaches_dead_rows_only_and_its_target_is_detached(sae_type: str, top_k_aux: int) -> None:
    sae = make_sae(sae_type, dead=DEAD, top_k_aux=top_k_aux)
    sae.b_enc.data[DEAD] = 2.0  # each of them fires somewhere, as far as top_k_aux lets it
    x = rows(64).requires_grad_()
    expected = reference_of(sae, x).grads["auxk"]
    grads = gradients(sae, sae(x), x)["auxk"]
    assert_close(grads, expected)
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
    x = torch.cat([3 + u, 3 - u])
    out = sae(x)
    assert_close(out.losses["mse"], u.square().mean())
    assert_close(out.losses["auxk"].item(), 1 / 32)


@auxk_types
def test_auxk_of_a_batch_of_one_row_stays_bounded(sae_type: str) -> None:
    assert make_sae(sae_type, dead=DEAD)(rows(1)).losses.get("auxk", torch.zeros(())) < 100


@all_types
def test_auxk_is_absent_in_evaluation_and_without_dead_latents(sae_type: str) -> None:
    assert "auxk" not in make_sae(sae_type)(rows(B)).losses
    assert "auxk" not in make_sae(sae_type, dead=DEAD).eval()(rows(B)).losses


@sparse_and_dense
@all_types
def test_counters_count_training_tokens_and_restart_on_firing(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, density: float
) -> None:
    monkeypatch.setattr(choose, "MAX_DENSITY", density)
    sae = make_sae(sae_type, dead_after_tokens=21)
    sae.b_enc.data[: F - 1] = -3.0  # few of these fire; TopK keeps some that do not
    expected = torch.zeros(F, dtype=torch.int64)
    for seed, shape in enumerate([(2, 3), (B,), (), (3, 1, 2)]):
        fired = (sae(rows(*shape, seed=seed)).latents.to_dense() > 0).any(dim=0)
        expected = torch.where(fired, 0, expected + math.prod(shape))
        assert torch.equal(sae.state_dict()["tokens_since_fired"], expected)
    assert expected.unique().numel() > 2 and expected.max() == 21
    assert torch.equal(sae.dead, expected == 21)


@pytest.mark.parametrize("input_unit_norm", [True, False])
@all_types
def test_forward_changes_no_parameter_and_evaluation_changes_nothing(sae_type: str, input_unit_norm: bool) -> None:
    sae = make_sae(sae_type, dead=DEAD, input_unit_norm=input_unit_norm)
    before = copy.deepcopy(sae.state_dict())
    sae.encode(rows(B))
    sae.eval()(rows(B))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    sae.train()(rows(B))
    assert all(torch.equal(value, before[name]) for name, value in sae.named_parameters())
    assert not torch.equal(sae.tokens_since_fired, before["tokens_since_fired"])


# ---- BatchTopK's threshold ----


def smallest_kept(sae: BaseAutoencoder, x: Tensor) -> Tensor:
    pre = sae.dense_pre_activations(x).detach().flatten()
    return pre.sort(descending=True).values[sae.cfg.top_k * len(x) - 1]


def fresh_batchtopk() -> BaseAutoencoder:
    sae = make_sae("batchtopk")
    sae.threshold.zero_()
    return sae


def test_batchtopk_threshold_is_a_running_mean_free_of_its_start() -> None:
    sae, kept = fresh_batchtopk(), []
    for seed in range(3):
        x = rows(B, seed=seed)
        kept.append(smallest_kept(sae, x))
        sae(x)
        weights = [0.9**age for age in reversed(range(len(kept)))]
        expected = sum(w * c for w, c in zip(weights, kept)) / sum(weights)
        assert_close(sae.threshold, expected, rtol=1e-5, atol=0)


def test_batchtopk_threshold_of_constant_batches_is_that_constant_from_the_first_on() -> None:
    sae, x = fresh_batchtopk(), rows(B)
    for _ in range(30):
        sae(x)
        assert_close(sae.threshold, smallest_kept(sae, x), rtol=1e-5, atol=0)


def test_batchtopk_threshold_ignores_a_batch_in_which_nothing_fires() -> None:
    sae, x = fresh_batchtopk(), rows(B)
    b_enc = sae.b_enc.detach().clone()
    sae.b_enc.data.fill_(-1e6)
    sae(x)
    assert sae.threshold == 0
    sae.b_enc.data.copy_(b_enc)
    sae(x)
    assert_close(sae.threshold, smallest_kept(sae, x), rtol=1e-5, atol=0)


@sparse_and_dense
def test_batchtopk_evaluates_with_its_threshold(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    monkeypatch.setattr(choose, "MAX_DENSITY", density)
    sae, x = make_sae("batchtopk"), rows(B)
    pre = sae.dense_pre_activations(x)
    assert_close(sae.encode(x), pre * (pre > 0.4))
    assert_close(sae.eval()(x).latents.to_dense(), pre * (pre > 0.4))


def test_batchtopk_fires_k_latents_per_token_in_evaluation_too() -> None:
    sae = fresh_batchtopk()
    for seed in range(200):
        sae(rows(64, seed=seed))
    fired = (sae.encode(rows(4000, seed=999)) > 0).sum(dim=1).double().mean().item()
    assert fired == pytest.approx(sae.cfg.top_k, rel=0.05)


@all_types
def test_latents_of_a_token_do_not_depend_on_its_batch_in_evaluation(sae_type: str) -> None:
    sae, x = make_sae(sae_type).eval(), rows(B)
    alone = torch.cat([sae(row).latents.to_dense() for row in x])
    assert alone.any()
    assert_close(sae(x).latents.to_dense(), alone)


@all_types
def test_encode_gives_the_latents_of_evaluation_in_either_mode(sae_type: str) -> None:
    sae, x = make_sae(sae_type, input_unit_norm=True), rows(2, 3)
    in_training = sae.encode(x)
    assert_close(in_training, sae.eval().encode(x))
    assert_close(in_training.view(-1, F), sae(x).latents.to_dense())


# ---- parameters ----


@pytest.mark.parametrize("dict_size", [32, 512])
@all_types
def test_a_new_sae_has_a_tied_encoder_of_unit_scale_and_zero_biases(sae_type: str, dict_size: int) -> None:
    sae = build_sae(config(sae_type, dict_size=dict_size))
    assert_close(sae.W_dec.norm(dim=1), torch.ones(dict_size))
    assert torch.equal(sae.W_enc, sae.W_dec.t()) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert set(dict(sae.named_parameters())) == {*PARAMETERS, *(["threshold"] if sae_type == "jumprelu" else [])}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in sae.parameters())


@all_types
def test_initial_weights_follow_the_configs_seed_alone(sae_type: str) -> None:
    torch.manual_seed(1)
    first = build_sae(config(sae_type, seed=3))
    torch.manual_seed(2)
    assert torch.equal(first.W_dec, build_sae(config(sae_type, seed=3)).W_dec)
    assert not torch.equal(first.W_dec, build_sae(config(sae_type, seed=4)).W_dec)


@all_types
def test_decoder_gradient_loses_its_parallel_part_and_constrain_restores_unit_rows(sae_type: str) -> None:
    sae = make_sae(sae_type)
    sae.constrain()
    sae(rows(64)).loss.backward()
    W, grad = sae.W_dec.detach().clone(), sae.W_dec.grad.clone()
    parallel = (grad * W).sum(dim=1, keepdim=True)
    assert parallel.abs().max() > 1e-3
    sae.project_decoder_gradient()
    assert_close(sae.W_dec.grad, grad - parallel * W)
    assert_close((sae.W_dec.grad * W).sum(dim=1), torch.zeros(F, dtype=torch.float64))
    with torch.no_grad():
        sae.W_dec -= sae.W_dec.grad
        moved = sae.W_dec.detach().clone()
    sae.constrain()
    assert_close(sae.W_dec.data, moved / moved.square().sum(dim=1, keepdim=True).sqrt())


# ---- inputs and outputs ----


def test_input_unit_norm_uses_the_unbiased_std_and_maps_the_output_back() -> None:
    """No latent fires, so z_hat = b_dec; four numbers of mean 2, squared deviations 1 + 1 + 9 + 9 = 20."""
    sae = build_sae(config("vanilla", act_size=4, input_unit_norm=True)).double()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(torch.tensor([1.0, 0.0, -1.0, 2.0]))
    x = torch.tensor([[1.0, 3.0, -1.0, 5.0]], dtype=torch.float64)
    std = math.sqrt(20 / 3)
    out = sae(x)
    assert_close(out.sae_out, sae.b_dec.detach() * std + torch.full_like(x, 2))
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


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_size", None), ("act_size", 0), ("dict_size", 0), ("top_k", 0), ("top_k", F + 1), ("top_k_aux", 0),
        ("aux_penalty", -1.0), ("l1_coeff", -1.0), ("bandwidth", 0.0), ("threshold_init", -1.0),
        ("dead_after_tokens", 0), ("seed", -1), ("sae_type", "top-k"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_in_one_line(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        build_sae(config(**{field: value}))
    assert str(error.value).startswith(f"{field} = {value!r}: ") and "\n" not in str(error.value)


def test_build_sae_builds_the_named_type() -> None:
    assert tuple(SAE_TYPES) == get_args(SaeType)
    assert all(type(build_sae(config(name))) is cls for name, cls in SAE_TYPES.items())


@all_types
def test_a_class_says_its_own_type_whatever_the_config(sae_type: str) -> None:
    for other in SAE_TYPES:
        assert SAE_TYPES[sae_type](Config(act_size=8, dict_size=64, sae_type=other)).cfg.sae_type == sae_type


@all_types
def test_parameters_get_the_same_gradient_whether_or_not_x_does(sae_type: str) -> None:
    sae, x = make_sae(sae_type, dead=DEAD), rows(B)
    grads = []
    for wanted in (True, False):
        loss = sae(x.clone().requires_grad_(wanted)).loss
        grads.append(torch.autograd.grad(loss, list(sae.parameters())))
        sae.tokens_since_fired[list(DEAD)] = sae.cfg.dead_after
    assert_close(*grads, rtol=1e-9, atol=1e-12)
