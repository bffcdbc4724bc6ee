"""evaluation.py by hand, and against the Hugging Face model with forward hooks, on a two-layer model."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel

import evaluation
from analysis import latents
from analysis.latents import encoder_alignment, feature_density, matched_cosines, nearest_cosines, nearest_latents
from config import Config
from evaluation import Firing, HeldOut, Predictions, Rows, evaluate, training_metrics
from kernels.sparse import SparseLatents, Support
from language_model import check_model, load_model, record
from sae import SAE_TYPES, BaseAutoencoder, SAEOutput, build_sae

EOS = 0


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path) -> Config:
    return check_model(Config(model_name=str(tiny_gpt2), layer=1, dict_size=64, target_l0=4, seq_len=24, device="cpu"))


@pytest.fixture(scope="module")
def model(cfg: Config) -> TransformerBridge:
    return load_model(cfg)


@pytest.fixture(scope="module")
def hugging_face(tiny_gpt2: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge, windows_of: Callable[..., Tensor]) -> Tensor:
    """Six windows: BOS, text, and in two of them EOS, once and many times."""
    tokens = windows_of(model.tokenizer, 6, 24)
    tokens[1, 10] = EOS
    tokens[4, 5:17] = EOS
    return tokens


@pytest.fixture(scope="module")
def held_out(model: TransformerBridge, tokens: Tensor, cfg: Config) -> HeldOut:
    return HeldOut(model, tokens)


class Stand(BaseAutoencoder):
    """Stands in for an SAE: reconstructs x as given(x), and keeps what it was given."""

    sae_type = "topk"

    def __init__(self, cfg: Config, given: Callable[[Tensor], Tensor]) -> None:
        super().__init__(cfg)
        self.given, self.seen = given, []

    def forward(self, x: Tensor, y: Tensor | None = None) -> SAEOutput:
        self.seen.append(x)
        z_hat, none = self.given(x), torch.zeros(len(x), self.cfg.dict_size)
        latents = SparseLatents(none, none, None, self.normalise(z_hat)[0][None])
        return SAEOutput(z_hat, latents, {"mse": (z_hat - x).pow(2).mean()})


def acts_of(cfg: Config, model: TransformerBridge, tokens: Tensor) -> Tensor:
    return record(model, tokens, [cfg.hook_name])[cfg.hook_name]


def some_sae(cfg: Config, model: TransformerBridge, tokens: Tensor) -> BaseAutoencoder:
    sae = build_sae(cfg)
    sae.initialise_from(acts_of(cfg, model, tokens).flatten(0, 1))
    if "threshold" in dict(sae.named_buffers()):
        sae.threshold.fill_(0.5)
    sae.b_enc.data += 1e-3  # no pre-activation is exactly where a latent begins to fire
    sae.tokens_since_fired[::4] = cfg.dead_after
    return sae


# ---- metrics, by hand ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_metrics_of_rows(dtype: torch.dtype, sparse: bool) -> None:
    """Means 2 and 4, squared deviations 1 + 4 + 1 + 4 = 10, squared errors 2 (about zero it would be 1 - 2 / 50).

    The rows fire 2 and 1 latents, 7.5 in sum; a latent that was kept at 0 does not fire.
    """
    sae = build_sae(Config(act_size=2, dict_size=3, target_l0=2, input_unit_norm=False, device="cpu"))
    sae.tokens_since_fired[0] = sae.cfg.dead_after
    x, sae_out = torch.tensor([[1, 2], [3, 6]], dtype=dtype), torch.tensor([[1.0, 1.0], [3.0, 5.0]])
    acts = torch.tensor([[1.0, 0, 2.5], [0, 4.0, 0]])
    latents = SparseLatents(acts, acts, None, sae_out[None])
    if sparse:
        kept = torch.tensor([1.0, 2.5, 4.0, 0.0])
        latents = SparseLatents(
            kept, kept, Support(torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 4]), 3), sae_out[None]
        )
    out = SAEOutput(sae_out, latents, {"mse": torch.tensor(0.5), "auxk": torch.tensor(0.25)})
    assert training_metrics(sae, x, out) == pytest.approx({
        "train/loss": 0.75, "train/mse_loss": 0.5, "train/auxk_loss": 0.25, "train/l0": 1.5, "train/l1": 3.75,
        "train/mse": 0.5, "train/explained_variance": 0.8, "train/dead_share": 1 / 3,
        "train/normalised_mse": (1 / 5 + 1 / 45) / 2, "train/cosine": (3 / 10**0.5 + 39 / (45 * 34) ** 0.5) / 2,
        "train/l2_ratio": ((2 / 5) ** 0.5 + (34 / 45) ** 0.5) / 2, "train/relative_bias": (2 + 34) / (3 + 39),
    })  # fmt: skip


def test_nothing_is_lost_where_the_mean_is_large_beside_the_variance() -> None:
    """About 2^22, in float32, against numpy in float64."""
    sae, rng = build_sae(Config(act_size=2, dict_size=3, target_l0=2, device="cpu")), torch.Generator().manual_seed(0)
    x = 2**22 + 1000 * torch.randn(5000, 2, generator=rng)
    x_hat, none = x + 300 * torch.randn(5000, 2, generator=rng), torch.zeros(len(x), 3)
    out = SAEOutput(x_hat, SparseLatents(none, none, None, x[None]), {"mse": torch.zeros(())})
    a, b = (part.numpy().astype(np.float64) for part in (x, x_hat))
    expected = 1 - np.square(a - b).sum() / np.square(a - a.mean(axis=0)).sum()
    assert training_metrics(sae, x, out)["train/explained_variance"] == pytest.approx(expected, rel=1e-12, abs=0)


def test_metrics_of_predictions() -> None:
    """Where the next token is 1, with probabilities 1/4, 1/2 and 3/4 in place of 1/2, 1/2 and 2/3."""
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1 / 3, 2 / 3]])
    q = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    targets = torch.tensor([1, 1, 1])
    clean = Predictions.of(targets, p.log() + 3)
    seen = Predictions.of(targets, q.log() - 2, clean)
    assert_close(evaluation.ce(clean), torch.tensor([2, 2, 1.5]).log())
    assert_close(evaluation.kl(clean), torch.zeros(3), atol=1e-6, rtol=0)
    assert_close(evaluation.ce(seen), torch.tensor([4, 2, 4 / 3]).log())
    far = (math.log(2 / 3) + math.log(2)) / 2, 0, math.log(4 / 3) / 3 + 2 * math.log(8 / 9) / 3
    assert_close(evaluation.kl(seen), torch.tensor(far), atol=1e-6, rtol=1e-4)


def test_agreement_is_of_the_likeliest_tokens() -> None:
    clean = Predictions.of(torch.tensor([0, 0, 0, 0]), torch.tensor([[1, 2, 0], [3, 1, 2], [0, 0, 5], [4.0, 1, 1]]))
    seen = Predictions.of(clean.targets, torch.tensor([[-1, 0, -9], [2, 1, 3], [0, 0, 1], [1.0, 4, 1]]), clean)
    assert evaluation.top1_agreement(seen).tolist() == [1, 0, 1, 0]


def test_metrics_of_firing() -> None:
    """On 20 rows the L0 is once 0, 9 times 2, 9 times 3 and once 5; of 5 latents two are silent and two dense."""
    sae = build_sae(Config(act_size=2, dict_size=5, target_l0=2, device="cpu"))
    sae.tokens_since_fired[:2] = sae.cfg.dead_after
    firing = Firing(sae, torch.tensor([0, 0.1, 0.11, 1.0, 0]), torch.tensor([1.0, 0, 9, 9, 0, 1]))
    found = {metric.__name__: metric(firing).item() for metric in evaluation.OF_FIRING}
    shares = {"dead_share": 0.4, "silent_share": 0.4, "dense_share": 0.4}
    assert found == pytest.approx(shares | {"l0_p5": 0, "l0_median": 2, "l0_p95": 3})


@pytest.mark.parametrize("sae_type", list(SAE_TYPES))
def test_training_metrics_hold_every_loss_term(sae_type: str) -> None:
    sae = build_sae(
        Config(sae_type=sae_type, act_size=16, dict_size=64, target_l0=4, l1_coeff=0.1, device="cpu")
    ).train()
    sae.tokens_since_fired[:16] = sae.cfg.dead_after
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) + 1
    out = sae(x)
    metrics = training_metrics(sae, x, out)
    for name, term in (*out.losses.items(), ("", out.loss)):
        assert metrics[f"train/{name}_loss" if name else "train/loss"] == pytest.approx(term.item(), rel=1e-6)
    squares = (out.latents.y_hats[-1] - sae.normalise(x)[0]).square()
    assert metrics["train/mse"] == pytest.approx(squares.mean().item(), rel=1e-6)
    assert metrics["train/dead_share"] == 0.25
    dense = out.latents.to_dense()
    assert metrics["train/l0"] == pytest.approx((dense > 0).sum().item() / 32)
    assert metrics["train/l1"] == pytest.approx(dense.sum().item() / 32, rel=1e-5)


def test_a_metric_is_one_function(
    cfg: Config, model: TransformerBridge, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest_mean(seen: Rows) -> Tensor:
        return seen.out.latents.to_dense().amax(dim=1)

    monkeypatch.setattr(evaluation, "OF_ROWS", (*evaluation.OF_ROWS, largest_mean))
    sae = some_sae(cfg, model, tokens).eval()
    x = acts_of(cfg, model, tokens)[tokens != EOS]
    expected = sae.encode(x).amax(dim=1).mean().item()
    (found,) = evaluate(HeldOut(model, tokens), [sae])
    assert found["largest_mean"] == pytest.approx(expected, rel=1e-5)
    assert training_metrics(sae, x, sae(x))["train/largest_mean"] == pytest.approx(expected, rel=1e-5)


# ---- splicing ----


def test_splicing_the_identity_changes_nothing(cfg: Config, held_out: HeldOut) -> None:
    (m,) = evaluate(held_out, [Stand(cfg, lambda x: x)])
    assert (m["ce"], m["ce_degradation"], m["top1_agreement"]) == (m["ce_clean"], 0, 1)
    assert m["kl"] == pytest.approx(0, abs=1e-6)
    ones = ("ce_recovered", "ce_recovered_mean", "explained_variance", "l2_ratio", "relative_bias")
    assert [m[name] for name in ones] == [1] * 5 and m["cosine"] == pytest.approx(1)
    assert (m["mse"], m["normalised_mse"], m["silent_share"], m["l0_p95"]) == (0, 0, 1, 0)


def test_splicing_zeros_or_the_mean_recovers_nothing(cfg: Config, held_out: HeldOut) -> None:
    zeros, mean = Stand(cfg, torch.zeros_like), Stand(cfg, lambda x: held_out.of(cfg).mean.float().expand_as(x))
    for m, ablation in zip(evaluate(held_out, [zeros, mean]), ("zero", "mean")):
        assert m["ce"] == m[f"ce_{ablation}"] > m["ce_clean"] + 0.1
        assert m["ce_recovered" if ablation == "zero" else "ce_recovered_mean"] == 0
        assert m["explained_variance"] == pytest.approx(0, abs=1e-6) or ablation == "zero"
        assert m["ce_degradation"] == pytest.approx(m["ce"] - m["ce_clean"], rel=1e-5)
        assert m["kl"] > 0.01 and m["top1_agreement"] < 1


def test_a_worse_sae_degrades_more(cfg: Config, held_out: HeldOut) -> None:
    noise = torch.randn(6 * 24, 16, generator=torch.Generator().manual_seed(0))
    saes = [Stand(cfg, lambda x, s=scale: x + s * noise[: len(x)]) for scale in (0.3, 1.0, 3.0)]
    results = evaluate(held_out, saes)
    for better, worse in pairwise(results):
        assert 0 < better["ce_degradation"] < worse["ce_degradation"] and 0 < better["kl"] < worse["kl"]
        assert 1 > better["ce_recovered"] > worse["ce_recovered"]
        for name in ("explained_variance", "cosine", "top1_agreement"):
            assert 1 > better[name] > worse[name]


def test_an_sae_is_given_every_ordinary_position_once_and_no_other(
    cfg: Config, model: TransformerBridge, tokens: Tensor
) -> None:
    sae = Stand(cfg, lambda x: x)
    evaluate(HeldOut(model, tokens), [sae])
    acts = acts_of(cfg, model, tokens)
    assert_close(torch.cat(sae.seen), acts[tokens != EOS])


# ---- against Hugging Face ----


def places(hf: GPT2LMHeadModel, cfg: Config) -> torch.nn.Module:
    """The module whose input (resid_pre, z) or output (the others) is the site."""
    block = hf.transformer.h[cfg.layer]
    return {"resid_pre": block, "z": block.attn.c_proj, "mlp_out": block.mlp, "attn_out": block.attn.c_proj}[cfg.site]


@torch.no_grad()
def run_hf(
    hf: GPT2LMHeadModel, cfg: Config, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the activations as they were; `replace` maps those at ordinary positions."""
    kept = []

    def spliced(acts: Tensor) -> Tensor:
        kept.append(acts.clone())
        if replace is None:
            return acts
        acts = acts.clone()
        for window, position in (tokens != EOS).nonzero().tolist():
            acts[window, position] = replace(acts[window, position])
        return acts

    module = places(hf, cfg)
    if cfg.site in ("resid_pre", "z"):
        handle = module.register_forward_pre_hook(lambda _, args: (spliced(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: spliced(out))
    logits = hf(tokens).logits.double()
    handle.remove()
    return logits.log_softmax(dim=-1), kept[0]


@torch.no_grad()
def direct(hf: GPT2LMHeadModel, sae: BaseAutoencoder, tokens: Tensor) -> dict[str, float]:
    """Every metric of `evaluate`, position by position."""
    sae = sae.eval()
    clean, acts = run_hf(hf, sae.cfg, tokens)
    here = [(w, p) for w, p in (tokens != EOS).nonzero().tolist() if p + 1 < tokens.shape[1]]

    def ce(log_p: Tensor) -> float:
        return -sum(log_p[w, p, tokens[w, p + 1]].item() for w, p in here) / len(here)

    spliced = run_hf(hf, sae.cfg, tokens, lambda x: sae(x).sae_out)[0]
    x = acts[tokens != EOS]
    out, latents = sae(x), sae.encode(x)
    z, z_hat = sae.normalise(x)[0].double(), sae.decode(latents).double()
    x64, out64 = x.double(), out.sae_out.double()
    l0 = sorted((latents > 0).sum(dim=1).tolist())
    density = torch.tensor([sum(row[j] > 0 for row in latents).item() / len(x) for j in range(64)])
    mean = x.mean(dim=0)
    kl = sum((clean[w, p].exp() * (clean[w, p] - spliced[w, p])).sum().item() for w, p in here) / len(here)
    m = {
        "l0": (latents > 0).sum().item() / len(x),
        "l1": latents.sum().item() / len(x),
        "mse": ((z - z_hat) ** 2).mean().item(),
        "explained_variance": 1 - (F.mse_loss(out.sae_out, x) / x.var(dim=0, unbiased=False).mean()).item(),
        "ce_clean": ce(clean),
        "ce": ce(spliced),
        "ce_zero": ce(run_hf(hf, sae.cfg, tokens, torch.zeros_like)[0]),
        "ce_mean": ce(run_hf(hf, sae.cfg, tokens, lambda x: mean)[0]),
        "kl": kl,
        "top1_agreement": sum(float(clean[at].argmax() == spliced[at].argmax()) for at in here) / len(here),
        "normalised_mse": sum(((a - b).norm() / a.norm()).item() ** 2 for a, b in zip(x64, out64)) / len(x),
        "cosine": sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(x64, out64)) / len(x),
        "l2_ratio": sum((b.norm() / a.norm()).item() for a, b in zip(x64, out64)) / len(x),
        "relative_bias": (out64.square().sum() / (x64 * out64).sum()).item(),
        "dead_share": 0.25,
        "silent_share": sum(share == 0 for share in density).item() / 64,
        "dense_share": sum(share > 0.1 for share in density).item() / 64,
        **{f"l0_{name}": l0[math.ceil(q * len(x)) - 1] for name, q in {"p5": 0.05, "median": 0.5, "p95": 0.95}.items()},
    }
    return m | {
        "ce_degradation": m["ce"] - m["ce_clean"],
        "ce_recovered": (m["ce_zero"] - m["ce"]) / (m["ce_zero"] - m["ce_clean"]),
        "ce_recovered_mean": (m["ce_mean"] - m["ce"]) / (m["ce_mean"] - m["ce_clean"]),
    }


@pytest.mark.parametrize(
    "changes",
    [
        *({"sae_type": sae_type} for sae_type in SAE_TYPES),
        {"input_unit_norm": False},
        {"site": "z"},
        {"site": "z", "layer": 0},
        {"site": "mlp_out", "layer": 0},
        {"site": "attn_out"},
        {"layer": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_metric_agrees_with_the_hugging_face_model(
    cfg: Config, model: TransformerBridge, hugging_face: GPT2LMHeadModel, tokens: Tensor, changes: dict
) -> None:
    sae = some_sae(Config(**cfg.to_dict() | changes), model, tokens)
    (found,) = evaluate(HeldOut(model, tokens), [sae])
    expected = direct(hugging_face, sae, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-4), name


# ---- latents and directions ----


@pytest.mark.parametrize("sae_type", list(SAE_TYPES))
def test_density_is_the_share_of_ordinary_tokens(
    monkeypatch: pytest.MonkeyPatch, cfg: Config, model: TransformerBridge, tokens: Tensor, sae_type: str
) -> None:
    sae = some_sae(Config(**cfg.to_dict() | {"sae_type": sae_type}), model, tokens).train()
    latents = sae.encode(acts_of(cfg, model, tokens))
    here = (tokens != EOS).nonzero().tolist()
    expected = torch.tensor([sum(bool(latents[w, p, j] > 0) for w, p in here) / len(here) for j in range(64)])
    assert expected.sum() > 0
    for numbers in (evaluation.MAX_LOGITS, 2 * 24 * 64):
        monkeypatch.setattr(evaluation, "MAX_LOGITS", numbers)
        assert_close(feature_density(sae, model, tokens), expected)
    with pytest.raises(ValueError, match="special ones only"):
        feature_density(sae, model, torch.full((2, 5), EOS))
    with pytest.raises(ValueError, match="use its own tokenizer"):
        feature_density(sae, model, tokens + 10**6)


def test_nearest_latents_are_those_of_the_largest_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "COMPARED", 10 * 50)  # ten rows at a time
    W_dec = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    W_dec[3] = 5 * W_dec[7]
    indices, cosines = nearest_latents(W_dec, torch.arange(50), 4)
    assert indices[3, 0] == 7 and indices[7, 0] == 3 and cosines[3, 0] == pytest.approx(1)
    expected = torch.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).fill_diagonal_(-2)
    assert_close(cosines, expected.topk(4).values)
    assert_close(expected.gather(1, indices), cosines)
    assert torch.equal(nearest_latents(W_dec, torch.tensor([7, 2]), 4)[0], indices[[7, 2]])
    opposite = torch.cat([W_dec[:1], -W_dec[:1]])
    assert nearest_latents(opposite, torch.arange(2), 1)[0].tolist() == [[1], [0]], (
        "not itself, if all others point away"
    )
    assert [part.shape for part in nearest_latents(W_dec[:3], torch.arange(3), 4)] == [(3, 2), (3, 2)]


def test_nearest_cosines_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    W_dec = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    W_dec[7] = 3 * W_dec[31]
    expected = [
        max(F.cosine_similarity(a, b, dim=0) for j, b in enumerate(W_dec) if j != i) for i, a in enumerate(W_dec)
    ]
    for rows in (512, 13):
        monkeypatch.setattr(latents, "COMPARED", rows * 50)
        found = nearest_cosines(W_dec)
        assert_close(found, torch.stack(expected))
    assert found[7] == found[31] == pytest.approx(1)
    assert_close(nearest_cosines(W_dec, at_most=8), found[::7])  # 0, 7, ..., 49
    assert nearest_cosines(W_dec[:1]).shape == (0,)


def test_alignment_is_the_cosine_of_encoder_and_decoder() -> None:
    sae = build_sae(Config(act_size=2, dict_size=3, target_l0=1, device="cpu"))
    sae.W_enc.data = torch.tensor([[2.0, 3.0, 1.0], [0.0, 4.0, 1.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert_close(encoder_alignment(sae), torch.tensor([1, 0.8, -1]))


def test_rows_are_matched_one_to_one_with_the_largest_sum() -> None:
    """Both rows are nearest to the first of the others, but only one can have it."""
    angles = [torch.tensor(degrees) * torch.pi / 180 for degrees in ([0.0, 10.0], [5.0, 40.0, 180.0])]
    mine, other = (torch.stack([a.cos(), a.sin()], dim=1) * 3 for a in angles)
    expected = torch.tensor([math.cos(math.radians(5)), math.cos(math.radians(30))])
    assert_close(matched_cosines(mine, other), expected)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    W_dec = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert_close(matched_cosines(W_dec, 2 * W_dec[shuffled]), torch.ones(50))


# ---- what evaluation must not do ----


def test_results_do_not_depend_on_how_windows_are_batched(
    monkeypatch: pytest.MonkeyPatch, cfg: Config, model: TransformerBridge, tokens: Tensor, held_out: HeldOut
) -> None:
    saes = [some_sae(Config(**cfg.to_dict() | {"sae_type": sae_type}), model, tokens) for sae_type in SAE_TYPES]
    together = evaluate(held_out, saes)
    vocab = model.cfg.d_vocab
    for windows in (1, 4):
        monkeypatch.setattr(evaluation, "MAX_LOGITS", windows * 24 * vocab)
        for found, expected in zip(evaluate(HeldOut(model, tokens), saes), together):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_latents_that_are_kept_at_zero_do_not_fire(cfg: Config, model: TransformerBridge, held_out: HeldOut) -> None:
    sae = some_sae(Config(**cfg.to_dict() | {"sae_type": "topk"}), model, held_out.batches[0].tokens)
    sae.b_enc.data -= 1e3
    (m,) = evaluate(held_out, [sae])
    assert [m[name] for name in ("l0", "l1", "l0_p95", "dense_share", "silent_share")] == [0, 0, 0, 0, 1]


@torch.no_grad()
def test_what_no_sae_has_a_part_in_is_computed_once(
    cfg: Config, model: TransformerBridge, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 3 * 24 * model.cfg.d_vocab)
    counts = {"blocks.0": 0, "blocks.1": 0}
    handles = [
        model.get_submodule(name).mlp.register_forward_hook(
            lambda *_, name=name: counts.update({name: counts[name] + 1})
        )
        for name in counts
    ]
    held_out = HeldOut(model, tokens)
    first = evaluate(held_out, [Stand(cfg, lambda x: 2 * x)] * 4)
    before = dict(counts)
    assert evaluate(held_out, [Stand(cfg, lambda x: 2 * x)] * 4) == first
    for handle in handles:
        handle.remove()
    assert len(held_out.batches) == 2
    assert {name: counts[name] - before[name] for name in counts} == {"blocks.0": 2, "blocks.1": 2 * (1 + 4)}


def test_evaluation_changes_no_sae_and_keeps_its_mode(
    cfg: Config, model: TransformerBridge, tokens: Tensor, held_out: HeldOut
) -> None:
    """Also where it fails, in the middle of a text; then the model, too, is as it was."""
    saes = [
        some_sae(Config(**cfg.to_dict() | {"sae_type": sae_type}), model, tokens).train(mode)
        for sae_type in SAE_TYPES
        for mode in (True, False)
    ]
    before = [{name: value.clone() for name, value in sae.state_dict().items()} for sae in saes]
    with torch.no_grad():
        logits = model(tokens)

    def unchanged() -> None:
        assert [sae.training for sae in saes] == [True, False] * len(SAE_TYPES)
        for sae, state in zip(saes, before):
            assert all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())
            assert all(p.grad is None for p in sae.parameters())
        with torch.no_grad():
            assert torch.equal(model(tokens), logits)

    evaluate(held_out, saes)
    unchanged()
    for failing in (lambda x: 1 / 0, lambda x: x[:-1]):  # the SAE fails, or the model with its output
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            evaluate(held_out, [*saes, Stand(cfg, failing)])
        unchanged()
