"""splice.py against hooks written by hand with dense formulas, in float64, on a two-layer model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from analysis.splice import splice
from config import Config
from evaluation import HeldOut, evaluate
from language_model import check_model, load_model, record, replacing
from sae import SAE_TYPES, BaseAutoencoder, build_sae

EOS = 0
START, PRE, Z = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"
NORM = pytest.mark.parametrize("input_unit_norm", [True, False], ids=["norm", "raw"])


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path) -> Config:
    return check_model(Config(model_name=str(tiny_gpt2), layer=1, dict_size=64, target_l0=4, seq_len=12, device="cpu"))


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
    """Make SAEs in float64, none of whose parameters is where it starts: thresholds, biases and encoders have moved."""

    def sae(**changes: object) -> BaseAutoencoder:
        sae = build_sae(Config(**cfg.to_dict() | changes)).double()
        x, y = (at_hook(model, tokens, hook).flatten(0, 1) for hook in (sae.cfg.hook_name, sae.cfg.writes[0]))
        sae.initialise_from(x, y)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            sae.b_enc += 0.1 * torch.randn(sae.b_enc.shape, generator=rng, dtype=torch.float64)
            sae.W_enc *= 1.3
        if sae.cfg.sae_type == "batchtopk":
            sae.threshold.fill_(0.5)
        return sae.eval()

    return sae


def at_hook(model: TransformerBridge, tokens: Tensor, hook: str) -> Tensor:
    return record(model, tokens, [hook])[hook]


def dense(sae: BaseAutoencoder, x: Tensor, factors: Tensor | float, error_term: bool) -> tuple[Tensor, Tensor]:
    """Compute scaled latents and what replaces rows x [row, act_size]: sae.py's docstring, written again."""
    mean, std, z = 0.0, 1.0, x
    if sae.cfg.input_unit_norm:
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        z = (x - mean) / (std + 1e-5)
    pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.cfg.sae_type == "vanilla":
        f = pre.clamp(min=0)
    elif sae.cfg.sae_type == "topk":
        f = pre.clamp(min=0) * (pre >= pre.topk(sae.cfg.target_l0).values[:, -1:])
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
    factors: Mapping[str, Tensor] = {},
    steer: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute logits and latents [ordinary position, dict_size], with `steer` added after each SAE."""
    kept, here = {}, tokens != EOS

    def replace(acts: Tensor, hook: object, sae: BaseAutoencoder) -> Tensor:
        name, new = sae.cfg.hook_name, acts.clone()
        kept[name], out = dense(sae, acts[here].flatten(1), factors.get(name, 1.0), error_term)
        new[here] = (out + steer).view_as(acts[here])
        return new

    with model.hooks(fwd_hooks=[(sae.cfg.hook_name, partial(replace, sae=sae)) for sae in saes]):
        return model(tokens), kept


# ---- what the model computes, and its gradients ----


@NORM
@pytest.mark.parametrize("error_term", [False, True], ids=["plain", "error"])
@pytest.mark.parametrize("sae_type", list(SAE_TYPES))
def test_logits_latents_and_all_gradients_are_those_by_hand(
    make: Callable, model: TransformerBridge, tokens: Tensor, sae_type: str, input_unit_norm: bool, error_term: bool
) -> None:
    sae = make(sae_type=sae_type, input_unit_norm=input_unit_norm)
    factors = torch.ones(64, dtype=torch.float64)
    factors[:8], factors[8:16], factors[16:24] = 0.0, 2.0, -0.5
    scale = {(PRE, j): factor for j, factor in enumerate(factors.tolist())}
    start = at_hook(model, tokens, START).requires_grad_()
    with model.hooks(fwd_hooks=[(START, lambda acts, hook: start)]):
        expected, kept = by_hand(model, tokens, [sae], error_term, {PRE: factors})
        with splice(model, sae, error_term=error_term) as unscaled:
            plain = model(tokens)
        with splice(model, sae, error_term=error_term, scale=scale) as latents:
            found = model(tokens)
    assert_close(found, expected)
    assert (found - plain).abs().max() > 1e-3
    assert latents[PRE].shape == (4, 12, 64) and not latents[PRE][tokens == EOS].any()
    assert_close(latents[PRE], unscaled[PRE] * factors)

    assert_close(latents[PRE][tokens != EOS], kept[PRE])
    (grad,) = torch.autograd.grad(found[:, -1, 9].sum(), latents[PRE], retain_graph=True)
    (grad_by_hand,) = torch.autograd.grad(expected[:, -1, 9].sum(), kept[PRE], retain_graph=True)
    assert_close(grad[tokens != EOS], grad_by_hand)
    assert grad.abs().max() > 1e-4 and not grad[tokens == EOS].any()
    wanted = [start, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    assert_close(*(torch.autograd.grad(logits[:, -1, 9].sum(), wanted) for logits in (found, expected)))


def test_error_term_alone_changes_neither_logits_nor_earlier_gradients(
    make: Callable, model: TransformerBridge, tokens: Tensor
) -> None:
    start = at_hook(model, tokens, START).requires_grad_()
    with model.hooks(fwd_hooks=[(START, lambda acts, hook: start)]):
        clean = model(tokens)
        with splice(model, make(), make(site="z", layer=0), error_term=True):
            found = model(tokens)
        with splice(model, make()):
            assert (model(tokens) - clean).abs().max() > 0.1
    assert torch.equal(found, clean)
    assert_close(*(torch.autograd.grad(logits[:, -1, 9].sum(), start) for logits in (found, clean)))


@NORM
def test_add_is_in_the_units_of_the_activations(
    make: Callable, model: TransformerBridge, tokens: Tensor, input_unit_norm: bool
) -> None:
    """The shift does not depend on a token's std or on whether the latents fire."""
    sae, add = make(input_unit_norm=input_unit_norm), {(PRE, 3): 2.5, (PRE, 60): -4.0}
    steer = 2.5 * sae.W_dec[3] - 4.0 * sae.W_dec[60]
    for error_term in (True, False):
        with splice(model, sae, error_term=error_term, add=add):
            moved, logits = at_hook(model, tokens, PRE), model(tokens)
        assert_close(logits, by_hand(model, tokens, [sae], error_term, steer=steer)[0])
        if error_term:
            assert_close(moved - at_hook(model, tokens, PRE), steer * (tokens != EOS)[..., None])


def test_several_saes_and_heads(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    """The second reads what the first has changed."""
    first, second = make(site="z", layer=0, sae_type="vanilla", dict_size=48), make(sae_type="topk")
    factors = torch.arange(48, dtype=torch.float64) / 24
    scale = {(Z, j): factor for j, factor in enumerate(factors.tolist())}
    expected, kept = by_hand(model, tokens, [first, second], factors={Z: factors})
    with splice(model, second, first, scale=scale) as latents:
        assert_close(model(tokens), expected)
    assert list(latents) == [Z, PRE] and latents[Z].shape == (4, 12, 48)
    for name, found in latents.items():
        assert_close(found[tokens != EOS], kept[name])


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_stands_in_for_what_it_reconstructs(
    make: Callable, model: TransformerBridge, tokens: Tensor, skip: bool, error_term: bool
) -> None:
    """And reads what is there in the same forward pass; computed by hand from both hooks."""
    sae = make(sae_type="topk", site="mlp_in", target_site="mlp_out", target_size=16, skip=skip)
    if skip:
        sae.W_skip.data.fill_(0.03)
    read, written = sae.cfg.reads[0], sae.cfg.writes[0]
    x, y = at_hook(model, tokens, read), at_hook(model, tokens, written)
    pre = x @ sae.W_enc + sae.b_enc
    f = pre.relu() * (pre >= pre.topk(4, dim=-1).values[..., -1:])
    scale = torch.ones(64, dtype=torch.float64)
    scale[int(f[0, 3].argmax())] = 0
    out = y + ((scale * f - f) @ sae.W_dec)
    if not error_term:
        out = (scale * f) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip if skip else 0)
    ordinary = (tokens != EOS) & (torch.arange(12) > 0)
    out = torch.where(ordinary[..., None], out, y)
    with replacing(model, {written: lambda acts: out}):
        expected = model(tokens)
    ablated = {(read, int(f[0, 3].argmax())): 0.0}
    with splice(model, sae, error_term=error_term, scale=ablated) as latents:
        assert_close(model(tokens), expected)
        assert_close(model(tokens), expected)  # nothing is left over from the first
    assert_close(latents[read], scale * f * ordinary[..., None])


def test_a_crosscoder_cannot_be_spliced(make: Callable, cfg: Config, model: TransformerBridge) -> None:
    sae = build_sae(replace(cfg, layer=(0, 1)))
    with pytest.raises(ValueError, match=r"layers \(0, 1\): a crosscoder cannot be spliced"), splice(model, sae):
        pass


def test_cross_entropy_is_that_of_evaluate(cfg: Config, make: Callable, tokens: Tensor) -> None:
    model, sae = load_model(cfg), make().float().train()
    (metrics,) = evaluate(HeldOut(model, tokens), [sae])
    with torch.no_grad(), splice(model, sae):
        logits = model(tokens)
    counted = tokens[:, :-1] != EOS
    ce = F.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted])
    assert ce.item() == pytest.approx(metrics["ce"], rel=1e-5)


def test_latents_have_gradients_where_no_parameter_does(
    make: Callable, model: TransformerBridge, tokens: Tensor
) -> None:
    grads = []
    for trained in (True, False):
        with splice(model, make().requires_grad_(trained), error_term=True) as latents:
            logit = model(tokens)[:, -1, 9].sum()
        grads += torch.autograd.grad(logit, latents[PRE])
    assert_close(*grads)


# ---- where it is spliced ----


def test_chosen_positions(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    sae, here = make(), torch.zeros_like(tokens, dtype=torch.bool)
    here[0, 0] = here[2, 4] = True
    clean = at_hook(model, tokens, PRE)
    with splice(model, sae, positions=here) as latents:
        seen = at_hook(model, tokens, PRE)
    assert torch.equal((seen != clean).any(dim=-1), here)
    assert_close(seen[here], sae(clean[here]).sae_out)
    assert torch.equal(latents[PRE].any(dim=-1), here)
    refused = pytest.raises(ValueError, match=r"^positions = \[2, 12\]: the tokens are \[4, 12\]; give the same shape$")
    with splice(model, sae, positions=here[:2]), refused:
        model(tokens)


def test_generated_text_is_spliced_with_and_without_a_cache(make: Callable, model: TransformerBridge) -> None:
    """A token read after cached ones is the only one of its forward pass, and yet no window begins there."""
    prompt = model.tokenizer("The grey owl", return_tensors="pt")["input_ids"]
    tokens = prompt = torch.cat([torch.tensor([[EOS]]), prompt], dim=1)
    how = dict(max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    sae = make()
    plain = model.generate(prompt, **how)
    with splice(model, sae, error_term=True, add={(PRE, 5): 30.0}):
        cached = model.generate(prompt, **how)
        again = model.generate(prompt, use_past_kv_cache=False, **how)
    assert torch.equal(cached, again) and not torch.equal(cached, plain)
    for _ in range(6):
        logits = by_hand(model, tokens, [sae], True, steer=30 * sae.W_dec[5])[0]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, tokens)


def test_where_a_window_begins(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    """At a special token, at any other, and where the cache is empty."""
    text = tokens[2:, 1:]  # no special token begins it
    with splice(model, make()) as latents:
        model.original_model(text, past_key_values=DynamicCache())
        assert torch.equal(latents[PRE].any(dim=-1), torch.arange(11).expand(2, -1) > 0)
        logits = model(tokens[:, :1])
    assert torch.equal(logits, model(tokens[:, :1])) and latents[PRE].shape == (4, 1, 64) and not latents[PRE].any()


def test_a_bfloat16_model_given_a_string_stays_in_bfloat16(cfg: Config, make: Callable) -> None:
    model = load_model(Config(**cfg.to_dict() | {"dtype": "bfloat16"}))
    with splice(model, make().float()) as latents:
        assert model("The grey owl hoots").dtype == torch.bfloat16
    assert latents[PRE].dtype == torch.float32


# ---- it leaves nothing behind ----


def hooks(model: TransformerBridge) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_all_is_as_it_was_also_after_exceptions(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    sae = make().train()
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    clean, before, seen = model(tokens), hooks(model), []

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
    wide = build_sae(Config(layer=1, act_size=24, dict_size=64, target_l0=4, device="cpu"))
    with splice(model, wide), pytest.raises(ValueError, match=r"give floating-point activations \[..., 24\]"):
        model(tokens)
    with model.hooks(fwd_hooks=[(PRE, lambda acts, hook: seen.append(1))]):  # the user's own hook stays
        with splice(model, sae):
            model(tokens)
        model(tokens)
    assert len(seen) == 2
    assert hooks(model) == before and torch.equal(model(tokens), clean)
    assert sae.training and all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


def test_latents_are_those_of_the_latest_pass(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    with splice(model, make()) as latents:
        assert latents == {}
        model(tokens)
        model(tokens[:2, :7])
        assert latents[PRE].shape == (2, 7, 64)
        record(model, tokens, [START])  # ends before the SAE
        assert latents == {}


# ---- what is refused ----


@pytest.mark.parametrize("field", ["scale", "add"])
def test_latents_that_cannot_be_edited(make: Callable, model: TransformerBridge, field: str) -> None:
    for latent, number, message in [
        ((Z, 0), 1.0, f"no SAE here reads {Z}; give one of {PRE}"),
        ((PRE, 64), 1.0, "the SAE there has latents 0 to 63"),
        ((PRE, -1), 1.0, "the SAE there has latents 0 to 63"),
        *(((PRE, odd), 0.0, "give a latent's number, or a tuple of them") for odd in (1.5, "3", True, ())),
        ((PRE, 17), float("nan"), "give a finite number"),
        (17, 0.0, "give latents as (hook, number), such as ('blocks.2.hook_mlp_out', 17)"),
    ]:
        with pytest.raises(ValueError) as refused:
            splice(model, make(), **{field: {latent: number}}).__enter__()
        assert str(refused.value) == f"{field} = {{{latent!r}: {number}}}: {message}"


def test_saes_that_cannot_be_spliced(make: Callable, model: TransformerBridge) -> None:
    far = build_sae(Config(layer=7, act_size=16, dict_size=64, device="cpu"))
    for saes, message in [
        ((make(), make(sae_type="topk")), f"two of them read {PRE}; give one per hook"),
        (([make()],), "a list is not an SAE; give splice(model, sae)"),
        ((far,), "the model has no hook blocks.7.hook_resid_pre; give an SAE that was trained on it"),
    ]:
        with pytest.raises(ValueError) as refused:
            splice(model, *saes).__enter__()
        assert str(refused.value) == f"saes: {message}"
