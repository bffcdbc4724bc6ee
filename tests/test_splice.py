"""splice.py against hooks written by hand with dense formulas, in float64, on a two-layer model."""

from collections.abc import Callable
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
from evaluation import evaluate
from language_model import check_model, load_model, record
from sae import SAE_TYPES, BaseAutoencoder, build_sae

EOS = 0
START, PRE, Z = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"
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
    """Make SAEs in float64, none of whose parameters is where it starts: thresholds, biases and encoders have moved."""

    def sae(**changes: object) -> BaseAutoencoder:
        sae = build_sae(Config(**cfg.to_dict() | {"threshold_init": 0.1} | changes)).double()
        sae.initialise_from(at_hook(model, tokens, sae.cfg.hook_name).flatten(0, 1))
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


def dense(sae: BaseAutoencoder, x: Tensor, factors: Tensor, error_term: bool) -> tuple[Tensor, Tensor]:
    """Compute scaled latents and what replaces one row x [act_size]: sae.py's docstring, written again."""
    cfg = sae.cfg
    mean, std = (x.mean(), x.std()) if cfg.input_unit_norm else (0.0, 1.0)
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
    """Compute logits and latents, position by position, with `steer` added after each SAE."""
    kept: dict[str, dict[tuple[int, int], Tensor]] = {sae.cfg.hook_name: {} for sae in saes}

    def hook_of(sae: BaseAutoencoder) -> tuple[str, Callable]:
        name = sae.cfg.hook_name
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

    (grad,) = torch.autograd.grad(found[:, -1, 9].sum(), latents[PRE], retain_graph=True)
    grads_by_hand = torch.autograd.grad(expected[:, -1, 9].sum(), list(kept[PRE].values()), retain_graph=True)
    for (w, p), expected_grad in zip(kept[PRE], grads_by_hand):
        assert_close(latents[PRE][w, p], kept[PRE][w, p])
        assert_close(grad[w, p], expected_grad)
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
    with splice(model, sae, error_term=True, add=add):
        moved, logits = at_hook(model, tokens, PRE), model(tokens)
    assert_close(moved - at_hook(model, tokens, PRE), steer * (tokens != EOS)[..., None])
    assert_close(logits, by_hand(model, tokens, [sae], True, steer=steer)[0])
    with splice(model, sae, add=add):
        logits = model(tokens)
    assert_close(logits, by_hand(model, tokens, [sae], steer=steer)[0])


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
        assert_close(found[2, 7], kept[name][2, 7])


def test_cross_entropy_is_that_of_evaluate(cfg: Config, make: Callable, tokens: Tensor) -> None:
    model, sae = load_model(cfg), make().float().train()
    (metrics,) = evaluate(model, [sae], tokens, torch.zeros(16))
    with torch.no_grad(), splice(model, sae):
        logits = model(tokens)
    counted = tokens[:, :-1] != EOS
    ce = F.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted])
    assert ce.item() == pytest.approx(metrics["ce"], rel=1e-5)


def test_gradient_of_a_latent_is_the_slope_of_its_scale(
    make: Callable, model: TransformerBridge, tokens: Tensor
) -> None:
    """Check d logit / d scale = sum f d logit / d f by finite differences, where no parameter requires a gradient."""
    sae = make(sae_type="vanilla").requires_grad_(False)
    with splice(model, sae, error_term=True) as latents:
        logit = model(tokens)[:, -1, 9].sum()
    f = latents[PRE]
    attribution = (f * torch.autograd.grad(logit, f)[0]).sum(dim=(0, 1))
    j = int(attribution.abs().argmax())

    def at(factor: float) -> Tensor:
        with torch.no_grad(), splice(model, sae, error_term=True, scale={(PRE, j): factor}):
            return model(tokens)[:, -1, 9].sum()

    slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    assert_close(attribution[j], slope, rtol=1e-6, atol=0)
    assert slope.abs() > 1e-3


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


def test_special_tokens_alone_are_left_alone(make: Callable, model: TransformerBridge) -> None:
    bos = torch.tensor([[EOS]])
    clean = model(bos)
    with splice(model, make()) as latents:
        assert torch.equal(model(bos), clean)
    assert latents[PRE].shape == (1, 1, 64) and not latents[PRE].any()


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


def test_an_empty_cache_is_the_start_of_a_window(make: Callable, model: TransformerBridge, tokens: Tensor) -> None:
    text = tokens[2:, 1:]  # no special token begins it
    with splice(model, make()) as latents:
        model.original_model(text, past_key_values=DynamicCache())
    assert torch.equal(latents[PRE].any(dim=-1), torch.arange(11).expand(2, -1) > 0)


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
    wide = build_sae(Config(layer=1, act_size=24, dict_size=64, top_k=4, device="cpu"))
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
@pytest.mark.parametrize(
    ("latent", "number", "message"),
    [
        ((Z, 0), 1.0, rf"no SAE here reads {Z}; give one of {PRE}$"),
        ((PRE, 64), 1.0, "the SAE there has latents 0 to 63$"),
        ((PRE, -1), 1.0, "the SAE there has latents 0 to 63$"),
        ((PRE, 17), float("nan"), "give a finite number$"),
        (17, 0.0, r"give latents as \(hook, number\), such as"),
    ],
)
def test_latents_that_cannot_be_edited(
    make: Callable, model: TransformerBridge, field: str, latent: object, number: float, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{field} = {{.*: {number}}}: {message}"):
        splice(model, make(), **{field: {latent: number}}).__enter__()


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
