"""splice.py against hooks written by hand with dense formulas, in float64, on a two-layer model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from activation_store import check_model, load_model, record
from config import Config
from evaluation import cross_entropy, evaluate
from sae import SAE_TYPES, BaseAutoencoder, build_sae
from splice import splice

EOS = 0
PRE, Z = "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"
TYPES = pytest.mark.parametrize("sae_type", list(SAE_TYPES))
NORM = pytest.mark.parametrize("input_unit_norm", [True, False], ids=["norm", "raw"])


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path) -> Config:
    return check_model(Config(model_name=str(tiny_gpt2), layer=1, dict_size=64, top_k=4, seq_len=12, device="cpu"))


@pytest.fixture(scope="module")
def model(cfg: Config) -> TransformerBridge:
    return load_model(cfg).to(torch.float64)


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge, windows_of: Callable[..., Tensor]) -> Tensor:
    """Four windows: BOS, text, and in one of them an EOS."""
    tokens = windows_of(model.tokenizer, 4, 12)
    tokens[1, 5] = EOS
    return tokens


@pytest.fixture(scope="module")
def make(cfg: Config, model: TransformerBridge, tokens: Tensor) -> Callable[..., BaseAutoencoder]:
    """SAEs in float64 on the model, of which no parameter is at its start: with thresholds, biases, longer encoders."""

    def sae(**changes: object) -> BaseAutoencoder:
        sae = build_sae(Config(**cfg.to_dict() | {"threshold_init": 0.1} | changes)).double()
        sae.initialise_from(record(model, tokens, sae.cfg.hook_point).flatten(0, 1))
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            sae.b_enc += 0.1 * torch.randn(sae.b_enc.shape, generator=rng, dtype=torch.float64)
            sae.W_enc *= 1.3
        if sae.cfg.sae_type == "batchtopk":
            sae.threshold.fill_(0.5)
        return sae.eval()

    return sae


def dense(sae: BaseAutoencoder, x: Tensor, factors: Tensor, error_term: bool) -> tuple[Tensor, Tensor]:
    """Scaled latents and what replaces one row x [act_size]: sae.py's docstring, written again."""
    cfg = sae.cfg
    mean, std = (x.mean(), x.std() + 0.0) if cfg.input_unit_norm else (0.0, 1.0)
    z = (x - mean) / (std + 1e-5) if cfg.input_unit_norm else x
    pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    if cfg.sae_type == "vanilla":
        f = pre.clamp(min=0)
    elif cfg.sae_type == "topk":
        f = torch.zeros_like(pre).index_add(0, pre.topk(cfg.top_k).indices, pre.topk(cfg.top_k).values.clamp(min=0))
    else:
        f = torch.where(pre > sae.threshold, pre, 0)
    error = x - ((f @ sae.W_dec + sae.b_dec) * std + mean) if error_term else 0
    f = f * factors
    return f, (f @ sae.W_dec + sae.b_dec) * std + mean + error


def by_hand(
    model: TransformerBridge,
    tokens: Tensor,
    saes: list[BaseAutoencoder],
    error_term: bool = False,
    factors: dict[str, Tensor] | None = None,
    steer: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, dict[tuple[int, int], Tensor]]]:
    """Logits and latents, position by position, `steer` added behind each SAE."""
    kept: dict[str, dict[tuple[int, int], Tensor]] = {sae.cfg.hook_point: {} for sae in saes}

    def hook_of(sae: BaseAutoencoder) -> tuple[str, Callable]:
        name = sae.cfg.hook_point
        factor = (factors or {}).get(name, torch.ones(sae.cfg.dict_size, dtype=torch.float64))

        def hook(acts: Tensor, hook: object) -> Tensor:
            new = acts.clone()
            for w, p in (tokens != EOS).nonzero().tolist():
                f, out = dense(sae, acts[w, p].flatten(), factor, error_term)
                kept[name][w, p] = f
                new[w, p] = (out + steer).view_as(acts[w, p])
            return new

        return name, hook

    with model.hooks(fwd_hooks=[hook_of(sae) for sae in saes]):
        return model(tokens), kept


def edits(sae: BaseAutoencoder, kept: dict[tuple[int, int], Tensor]) -> tuple[dict, Tensor]:
    """Three latents that fire, scaled: as splice takes it and as a vector."""
    often = torch.stack(list(kept.values())).detach().gt(0).sum(dim=0).topk(3).indices.tolist()
    factors = torch.ones(sae.cfg.dict_size, dtype=torch.float64)
    factors[often] = torch.tensor([0.0, 3.0, -0.5], dtype=torch.float64)
    return {(sae.cfg.hook_point, j): factors[j].item() for j in often}, factors


# ---- what the model computes ----


@TYPES
@NORM
@pytest.mark.parametrize("error_term", [False, True], ids=["plain", "error"])
def test_scaled_latents_as_by_hand(
    make: Callable, model: TransformerBridge, tokens: Tensor, sae_type: str, input_unit_norm: bool, error_term: bool
) -> None:
    sae = make(sae_type=sae_type, input_unit_norm=input_unit_norm)
    plain, kept = by_hand(model, tokens, [sae], error_term)
    with splice(model, sae, error_term=error_term) as latents:
        assert_close(model(tokens), plain)
    before = latents[PRE]
    scale, factors = edits(sae, kept[PRE])
    expected, kept = by_hand(model, tokens, [sae], error_term, {PRE: factors})
    with splice(model, sae, error_term=error_term, scale=scale) as latents:
        assert_close(model(tokens), expected)
    assert (expected - plain).abs().max() > 1e-3
    assert latents[PRE].shape == (4, 12, 64)
    assert_close(latents[PRE], before * factors)
    for (w, p), f in kept[PRE].items():
        assert_close(latents[PRE][w, p], f)
    assert not latents[PRE][tokens == EOS].any()


def test_error_term_alone_changes_nothing(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    clean = model(tokens)
    with splice(model, make(), make(site="z", layer=0), error_term=True):
        assert torch.equal(model(tokens), clean)
    with splice(model, make()):
        assert (model(tokens) - clean).abs().max() > 0.1


@NORM
def test_add_is_in_the_units_of_the_activations(
    make: Callable, model: TransformerBridge, tokens: Tensor, input_unit_norm: bool
) -> None:
    """By as much as `add` says, whatever a token's std, and for a latent that may not fire."""
    sae = make(input_unit_norm=input_unit_norm)
    steer = 2.5 * sae.W_dec[3] - 4.0 * sae.W_dec[60]
    seen: list[Tensor] = []
    with splice(model, sae, error_term=True, add={(PRE, 3): 2.5, (PRE, 60): -4.0}):
        logits = model(tokens)
        with model.hooks(fwd_hooks=[(PRE, lambda acts, hook: seen.append(acts))]):
            model(tokens)
    moved = seen[0] - record(model, tokens, PRE)
    assert_close(moved, steer.expand_as(moved) * (tokens != EOS)[..., None])
    assert_close(logits, by_hand(model, tokens, [sae], True, steer=steer)[0])
    with splice(model, sae, add={(PRE, 3): 2.5, (PRE, 60): -4.0}):
        logits = model(tokens)
    assert_close(logits, by_hand(model, tokens, [sae], steer=steer)[0])


def test_several_saes_and_heads(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    """The second reads what the first has changed."""
    first, second = make(site="z", layer=0, sae_type="vanilla", dict_size=48), make(sae_type="topk")
    kept = by_hand(model, tokens, [first, second])[1]
    scale, factors = edits(first, kept[Z])
    expected, kept = by_hand(model, tokens, [first, second], factors={Z: factors})
    with splice(model, second, first, scale=scale) as latents:
        assert_close(model(tokens), expected)
    assert list(latents) == [Z, PRE] and latents[Z].shape == (4, 12, 48)
    for name, found in latents.items():
        assert_close(found[2, 7], kept[name][2, 7])


@TYPES
def test_cross_entropy_is_that_of_evaluate(cfg: Config, make: Callable, tokens: Tensor, sae_type: str) -> None:
    model, sae = load_model(cfg), make(sae_type=sae_type).float().train()
    (metrics,) = evaluate(model, [sae], tokens, torch.zeros(16))
    with torch.no_grad(), splice(model, sae):
        ce = cross_entropy(model(tokens), tokens, tokens != EOS)
    assert ce.item() == pytest.approx(metrics["ce"], rel=1e-5)


def test_chosen_positions(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    sae, here = make(), torch.zeros_like(tokens, dtype=torch.bool)
    here[0, 0] = here[2, 4] = True
    seen: list[Tensor] = []
    with (
        splice(model, sae, positions=here) as latents,
        model.hooks(fwd_hooks=[(PRE, lambda acts, hook: seen.append(acts))]),
    ):
        model(tokens)
    clean = record(model, tokens, PRE)
    assert torch.equal((seen[0] != clean).any(dim=-1), here)
    assert_close(seen[0][here], sae(clean[here]).sae_out)
    assert torch.equal(latents[PRE].any(dim=-1), here)
    with (
        splice(model, sae, positions=here[:2]),
        pytest.raises(ValueError, match=r"positions = \[2, 12\]: .* \[4, 12\]"),
    ):
        model(tokens)


def test_special_tokens_alone_are_left_alone(make: Callable, model: TransformerBridge) -> None:
    bos = torch.tensor([[EOS]])
    clean = model(bos)
    with splice(model, make()) as latents:
        assert torch.equal(model(bos), clean)
    assert latents[PRE].shape == (1, 1, 64) and not latents[PRE].any()


def test_generated_text_is_spliced_with_and_without_a_cache(make: Callable, model: TransformerBridge) -> None:
    """A token read behind cached ones is the only one of its forward pass, and yet no window starts there."""
    prompt = model.tokenizer("The grey owl", return_tensors="pt")["input_ids"]
    prompt = torch.cat([torch.tensor([[EOS]]), prompt], dim=1)
    how = dict(max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    sae = make()
    plain = model.generate(prompt, **how)
    with splice(model, sae, error_term=True, add={(PRE, 5): 30.0}):
        cached = model.generate(prompt, **how)
        again = model.generate(prompt, use_past_kv_cache=False, **how)
    assert torch.equal(cached, again) and not torch.equal(cached, plain)
    tokens = prompt
    for _ in range(6):
        logits = by_hand(model, tokens, [sae], True, steer=30 * sae.W_dec[5])[0]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, tokens)


def test_an_empty_cache_is_the_start_of_a_window(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    sae, text = make(), tokens[2:, 1:]  # no special token starts it
    with splice(model, sae) as latents:
        model.original_model(text, past_key_values=DynamicCache())
    assert torch.equal(latents[PRE].any(dim=-1), torch.arange(11).expand(2, -1) > 0)


def test_text_and_numbers_of_half_the_size(cfg: Config, make: Callable) -> None:
    """A model in bfloat16 beside an SAE in float32: given a string, it goes on in its own format."""
    model = load_model(Config(**cfg.to_dict() | {"dtype": "bfloat16"}))
    with splice(model, make().float()) as latents:
        assert model("The grey owl hoots").dtype == torch.bfloat16
    assert latents[PRE].dtype == torch.float32


# ---- gradients ----


@TYPES
@NORM
@pytest.mark.parametrize("error_term", [False, True], ids=["plain", "error"])
def test_gradients_of_latents_parameters_and_what_came_before(
    make: Callable, model: TransformerBridge, tokens: Tensor, sae_type: str, input_unit_norm: bool, error_term: bool
) -> None:
    sae = make(sae_type=sae_type, input_unit_norm=input_unit_norm)
    factors = torch.ones(64, dtype=torch.float64)
    factors[:8], factors[8:16] = 0.0, 2.0
    scale = {(PRE, j): factor for j, factor in enumerate(factors.tolist())}
    start = record(model, tokens, "blocks.0.hook_resid_pre").requires_grad_()

    def begin(acts: Tensor, hook: object) -> Tensor:
        return start

    wanted = [start, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", begin)]):
        expected, kept = by_hand(model, tokens, [sae], error_term, {PRE: factors})
        with splice(model, sae, error_term=error_term, scale=scale) as latents:
            found = model(tokens)
    positions = list(kept[PRE])
    of_latents = torch.autograd.grad(expected[:, -1, 9].sum(), [kept[PRE][at] for at in positions], retain_graph=True)
    (grad,) = torch.autograd.grad(found[:, -1, 9].sum(), latents[PRE], retain_graph=True)
    for (w, p), g in zip(positions, of_latents):
        assert_close(grad[w, p], g)
    assert grad.abs().max() > 1e-4 and not grad[tokens == EOS].any()
    expected_grads = torch.autograd.grad(expected[:, -1, 9].sum(), wanted)
    for found_grad, expected_grad in zip(torch.autograd.grad(found[:, -1, 9].sum(), wanted), expected_grads):
        assert_close(found_grad, expected_grad)


def test_gradient_of_a_latent_is_the_slope_of_its_scale(
    make: Callable, model: TransformerBridge, tokens: Tensor
) -> None:
    """By finite differences, without any parameter that needs a gradient: d logit / d scale = sum f d logit / d f."""
    sae = make(sae_type="vanilla").requires_grad_(False)
    with splice(model, sae, error_term=True) as latents:
        logit = model(tokens)[:, -1, 9].sum()
    f = latents[PRE]
    (grad,) = torch.autograd.grad(logit, f)
    j = int((f * grad).sum(dim=(0, 1)).abs().argmax())

    def at(factor: float) -> Tensor:
        with torch.no_grad(), splice(model, sae, error_term=True, scale={(PRE, j): factor}):
            return model(tokens)[:, -1, 9].sum()

    slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    assert_close((f * grad).sum(dim=(0, 1))[j], slope, rtol=1e-6, atol=0)
    assert slope.abs() > 1e-3


def test_error_term_leaves_earlier_gradients_as_they_were(
    make: Callable, model: TransformerBridge, tokens: Tensor
) -> None:
    start = record(model, tokens, "blocks.0.hook_resid_pre").requires_grad_()
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda acts, hook: start)]):
        (clean,) = torch.autograd.grad(model(tokens)[:, -1, 9].sum(), start)
        with splice(model, make(), error_term=True):
            (found,) = torch.autograd.grad(model(tokens)[:, -1, 9].sum(), start)
    assert_close(found, clean)


# ---- it leaves nothing behind ----


def hooks(model: TransformerBridge) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_all_is_as_it_was_also_after_exceptions(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    sae = make().train()
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    clean, before = model(tokens), hooks(model)

    def fail(acts: Tensor, hook: object) -> None:
        raise RuntimeError("in the forward pass")

    with pytest.raises(RuntimeError, match="of the user"), splice(model, sae):
        assert hooks(model) > before
        model(tokens)
        raise RuntimeError("of the user")
    assert hooks(model) == before
    with pytest.raises(RuntimeError), splice(model, sae), model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]):
        model(tokens)
    assert hooks(model) == before
    wide = build_sae(Config(layer=1, act_size=24, dict_size=64, top_k=4, device="cpu"))
    with splice(model, wide), pytest.raises(ValueError, match=r"give floating-point activations \[..., 24\]"):
        model(tokens)
    assert hooks(model) == before and torch.equal(model(tokens), clean)
    assert sae.training and all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


def test_hooks_of_the_user_stay(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    seen, sae = [], make()
    with model.hooks(fwd_hooks=[(PRE, lambda acts, hook: seen.append(1))]):
        with splice(model, sae):
            model(tokens)
        model(tokens)
    assert len(seen) == 2


def test_latents_are_of_the_latest_pass(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    with splice(model, make()) as latents:
        assert latents == {}
        model(tokens)
        model(tokens[:2, :7])
        assert latents[PRE].shape == (2, 7, 64)
        record(model, tokens, "blocks.0.hook_resid_pre")  # ends before the SAE
        assert latents == {}


# ---- what is refused ----


def test_errors_of_the_user(make: Callable, model: TransformerBridge) -> None:
    sae, other = make(), make(sae_type="topk")
    with pytest.raises(ValueError, match=f"two of them read {PRE}"), splice(model, sae, other):
        pass
    for field in ("scale", "add"):
        with (
            pytest.raises(ValueError, match=rf"{field} = '{Z}': no SAE .*{PRE}"),
            splice(model, sae, **{field: {(Z, 0): 1.0}}),
        ):
            pass
        for latent in (64, -1):
            edit = {field: {(PRE, latent): 1.0}}
            with pytest.raises(ValueError, match=f"{latent}: .*0 to 63"), splice(model, sae, **edit):
                pass
    far = build_sae(Config(layer=7, act_size=16, dict_size=64, device="cpu"))
    with pytest.raises(ValueError, match=r"^saes: a list is none; give splice\(model, sae\)"), splice(model, [sae]):
        pass
    for field in ("scale", "add"):
        with pytest.raises(ValueError, match=rf"^{field} = 17: no latent; give \(hook, number\)"):
            splice(model, sae, **{field: {17: 0.0}}).__enter__()
        with pytest.raises(ValueError, match=rf"^{field} = .*17\): nan; give a finite number"):
            splice(model, sae, **{field: {(PRE, 17): float("nan")}}).__enter__()
    with pytest.raises(ValueError, match=r"no hook blocks\.7\.hook_resid_pre"), splice(model, far):
        pass
