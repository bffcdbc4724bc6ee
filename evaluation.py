"""Pure metric functions, and the language model spliced with an SAE. All on held-out text when `train` calls them."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

import ranks
from activation_store import ordinary_positions, record
from sae import BaseAutoencoder, SAEOutput

if TYPE_CHECKING:  # it takes seconds, and results.py needs no model
    from transformer_lens.model_bridge import TransformerBridge

MAX_LOGITS = 1 << 26  # in one forward pass: 256 MB of float32
COMPARED = 1 << 26  # cosines at a time: 256 MB


def l0_l1(out: SAEOutput) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Latents that fire, and the sum of their activations, per row on average."""
    rows = out.sae_out.numel() // out.sae_out.shape[-1]
    acts = out.acts if isinstance(out.acts, Tensor) else out.acts.values
    return (acts > 0).sum() / rows, acts.sum() / rows


def explained_variance(x: Float[Tensor, "batch act_size"], x_hat: Float[Tensor, "batch act_size"]) -> Float[Tensor, ""]:
    """1 - sum (x - x_hat)^2 / sum (x - mean(x))^2, over rows and width together."""
    x = x.to(x_hat.dtype)
    return 1 - (x - x_hat).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()


@torch.no_grad()
def training_metrics(sae: BaseAutoencoder, x: Float[Tensor, "batch act_size"], out: SAEOutput) -> dict[str, float]:
    """Metrics of one training batch, means over the processes that share it, as numbers: the device is waited for."""
    l0, l1 = l0_l1(out)
    metrics = {
        "loss": out.loss,
        **{f"{name}_loss": term for name, term in out.losses.items()},
        "l0": l0,
        "l1": l1,
        "explained_variance": explained_variance(x, out.sae_out),
        "dead_share": sae.dead.float().mean(),
    }
    means = ranks.mean(torch.stack([value.double() for value in metrics.values()]))
    return {f"train/{name}": value for name, value in zip(metrics, means.tolist())}


def cross_entropy(
    logits: Float[Tensor, "window pos vocab"], tokens: Int[Tensor, "window pos"], counted: Bool[Tensor, "window pos"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the next token after each of the positions `counted`."""
    counted = counted[:, :-1]
    return F.cross_entropy(logits[:, :-1][counted].float(), tokens[:, 1:][counted])


@torch.no_grad()
def spliced_logits(
    model: "TransformerBridge",
    tokens: Int[Tensor, "window pos"],
    hook_name: str,
    replaced: Bool[Tensor, "window pos"],
    replace: Callable[[Float[Tensor, "rows act_size"]], Float[Tensor, "rows act_size"]],
) -> Float[Tensor, "window pos vocab"]:
    """Logits of the model when `replace` stands in for the activations at the positions `replaced`."""

    def splice(acts: Tensor, hook: object) -> Tensor:
        acts = acts.clone()
        rows = acts[replaced]
        acts[replaced] = replace(rows.flatten(1)).to(acts.dtype).view_as(rows)
        return acts

    with model.hooks(fwd_hooks=[(hook_name, splice)]):
        return model(tokens, return_type="logits")


@torch.no_grad()
def evaluate(
    model: "TransformerBridge",
    saes: list[BaseAutoencoder],
    tokens: Int[Tensor, "window pos"],
    mean: Float[Tensor, "act_size"],
) -> list[dict[str, float]]:
    """Metrics of each SAE on `tokens`, which no training text should hold; all SAEs read the same hook.

    tokens [window, pos] on any device; mean [act_size], on the model's: the activations' mean over training text.
    Special positions (BOS, EOS, padding) are neither spliced nor measured, nor is what the model predicts there.
    Returns for each SAE, cross-entropies (CE) in nats per token:
        l0, l1, mse (in the SAE's normalised space), explained_variance (about the mean of these activations),
        ce_clean, ce (with the SAE's reconstruction), ce_zero and ce_mean (with zeros, with the mean),
        ce_degradation = ce - ce_clean (positive is worse),
        ce_recovered = (ce_zero - ce) / (ce_zero - ce_clean), ce_recovered_mean = the same against ce_mean,
        kl: KL(clean || spliced) in nats per token, dead_share: latents that training found dead.
    Processes that share batches share the windows too: all must call this, and all get the metrics of the whole.
    Raises: ValueError when tokens or mean do not fit the model, or no position can be measured.
    """
    _check(model, tokens, mean, saes[0].cfg.act_size)
    hook_name = saes[0].cfg.hook_point
    was_training = [sae.training for sae in saes]
    for sae in saes:
        sae.eval()
    zero = torch.zeros((), dtype=torch.float64, device=mean.device)
    totals = dict.fromkeys(("rows", "predictions", "ce_clean", "ce_zero", "ce_mean", "x_squared"), zero)
    totals["x"] = zero.expand(len(mean))
    sums = [dict.fromkeys(("l0", "l1", "mse", "squared_error", "ce", "kl"), zero) for _ in saes]
    share = tokens[ranks.rank() :: ranks.count()]
    for batch in _eval_batches(share.to(mean.device), model.cfg.d_vocab):
        replaced = ordinary_positions(batch, model.tokenizer)
        if not replaced[:, :-1].any():  # special tokens alone
            continue
        x = record(model, batch, hook_name)[replaced].float()
        clean = model(batch, return_type="logits")
        counted = replaced[:, :-1]  # the last position of a window predicts nothing that is known
        log_p = clean[:, :-1][counted].float().log_softmax(dim=-1)  # [prediction, vocab]
        weight = len(log_p)
        _add(
            totals,
            rows=torch.tensor(len(x)),
            predictions=torch.tensor(weight),
            ce_clean=cross_entropy(clean, batch, replaced) * weight,
            ce_zero=_spliced_ce(model, batch, hook_name, replaced, torch.zeros_like) * weight,
            ce_mean=_spliced_ce(model, batch, hook_name, replaced, lambda rows: mean.expand_as(rows)) * weight,
            x=x.double().sum(dim=0),
            x_squared=x.double().pow(2).sum(),
        )
        for sae, sum_ in zip(saes, sums):
            out = sae(x.to(sae.W_dec.device))
            sae_out = out.sae_out.to(x.device)
            l0, l1 = l0_l1(out)
            logits = spliced_logits(model, batch, hook_name, replaced, lambda _, sae_out=sae_out: sae_out)
            log_q = logits[:, :-1][counted].float().log_softmax(dim=-1)
            _add(
                sum_,
                l0=l0 * len(x),
                l1=l1 * len(x),
                mse=out.losses["mse"] * len(x),
                squared_error=(x - sae_out).double().pow(2).sum(),
                ce=cross_entropy(logits, batch, replaced) * weight,
                kl=(log_p.exp() * (log_p - log_q)).sum(dim=-1).mean() * weight,
            )
    for sae, training in zip(saes, was_training):
        sae.train(training)

    # From here on means over the processes that share the windows: all metrics are ratios.
    totals, *sums = ({name: ranks.mean(value) for name, value in sum_.items()} for sum_ in (totals, *sums))
    rows, predictions = totals["rows"], totals["predictions"]
    if predictions == 0:
        raise ValueError(f"tokens = {list(tokens.shape)}: special ones only; give held-out text")
    variance = totals["x_squared"] - totals["x"].pow(2).sum() / rows
    ce_clean, ce_zero, ce_mean = (totals[name] / predictions for name in ("ce_clean", "ce_zero", "ce_mean"))
    results = []
    for sae, sum_ in zip(saes, sums):
        ce = sum_["ce"] / predictions
        metrics = {
            "l0": sum_["l0"] / rows,
            "l1": sum_["l1"] / rows,
            "mse": sum_["mse"] / rows,
            "explained_variance": 1 - sum_["squared_error"] / variance,
            "ce_clean": ce_clean,
            "ce": ce,
            "ce_zero": ce_zero,
            "ce_mean": ce_mean,
            "ce_degradation": ce - ce_clean,
            "ce_recovered": (ce_zero - ce) / (ce_zero - ce_clean),
            "ce_recovered_mean": (ce_mean - ce) / (ce_mean - ce_clean),
            "kl": sum_["kl"] / predictions,
            "dead_share": sae.dead.double().mean().to(mean.device),
        }
        values = torch.stack(list(metrics.values())).tolist()  # one transfer from the device for all of them
        results.append(dict(zip(metrics, values)))
    return results


@torch.no_grad()
def feature_density(
    sae: BaseAutoencoder, model: "TransformerBridge", tokens: Int[Tensor, "window pos"]
) -> Float[Tensor, "dict_size"]:
    """Share of the ordinary positions of `tokens` at which each latent fires, in evaluation; its sum is L0.

    Raises: ValueError when the tokens do not fit the model or are special ones only.
    """
    _check_tokens(model, tokens)
    device = sae.W_dec.device
    fired, positions = torch.zeros(sae.cfg.dict_size, dtype=torch.int64, device=device), 0
    for batch in _eval_batches(tokens.to(model.cfg.device), sae.cfg.dict_size):
        ordinary = ordinary_positions(batch, model.tokenizer)
        if not ordinary.any():
            continue
        x = record(model, batch, sae.cfg.hook_point)[ordinary].to(device)
        fired += (sae.encode(x) > 0).sum(dim=0)
        positions += len(x)
    if positions == 0:
        raise ValueError(f"tokens = {list(tokens.shape)}: special ones only; give text")
    return fired / positions


@torch.no_grad()
def nearest_latents(
    W_dec: Float[Tensor, "dict_size act_size"], latents: Int[Tensor, "latents"], count: int
) -> tuple[Int[Tensor, "latents count"], Float[Tensor, "latents count"]]:
    """The `count` latents whose decoder rows have the largest cosines with those of `latents`, and the cosines.

    A latent is not its own neighbour; where there are no more than `count` others, all of them.
    """
    rows = F.normalize(W_dec, dim=1)  # a row of zeros, which other libraries' SAEs may have, stays one
    found = []
    for some in latents.split(max(1, COMPARED // len(rows))):
        cosines = rows[some] @ rows.t()
        cosines[torch.arange(len(some)), some] = -torch.inf
        found.append(cosines.topk(min(count, len(rows) - 1)))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


@torch.no_grad()
def nearest_cosines(W_dec: Float[Tensor, "dict_size act_size"], at_most: int = 4096) -> Float[Tensor, "latents"]:
    """Cosine of decoder rows with the row nearest to each, among all: of `at_most` rows, evenly spaced."""
    spaced = torch.linspace(0, len(W_dec) - 1, min(at_most, len(W_dec)), dtype=torch.float64, device=W_dec.device)
    return nearest_latents(W_dec, spaced.round().long(), 1)[1].flatten()


def _check(model: "TransformerBridge", tokens: Tensor, mean: Tensor, act_size: int) -> None:
    _check_tokens(model, tokens)
    if mean.shape != (act_size,) or not mean.isfinite().all():
        raise ValueError(f"mean = {mean.dtype} {list(mean.shape)}: give {act_size} finite numbers, the store's mean")


def _check_tokens(model: "TransformerBridge", tokens: Tensor) -> None:
    context, vocab = model.cfg.n_ctx, model.cfg.d_vocab
    if not (tokens.dtype == torch.int64 and tokens.ndim == 2 and len(tokens) and 2 <= tokens.shape[1] <= context):
        raise ValueError(
            f"tokens = {tokens.dtype} {list(tokens.shape)}: give int64 [window, pos], at least one window of 2 to"
            f" {context} tokens"
        )
    low, high = (int(token) for token in tokens.aminmax())
    if not 0 <= low <= high < vocab:
        raise ValueError(f"tokens = {low} to {high}: the model knows 0 to {vocab - 1}; use its own tokenizer")


def _spliced_ce(
    model: "TransformerBridge", tokens: Tensor, hook_name: str, replaced: Tensor, replace: Callable[[Tensor], Tensor]
) -> Float[Tensor, ""]:
    return cross_entropy(spliced_logits(model, tokens, hook_name, replaced, replace), tokens, replaced)


def _eval_batches(tokens: Int[Tensor, "window pos"], width: int) -> Iterator[Int[Tensor, "window pos"]]:
    """Windows for whose positions so many numbers each, logits or latents, are not too many."""
    yield from tokens.split(max(1, MAX_LOGITS // (tokens.shape[1] * width)))


def _add(sums: dict[str, Tensor], **terms: Tensor) -> None:
    for name, term in terms.items():
        sums[name] = sums[name] + term.to(sums[name].device)
