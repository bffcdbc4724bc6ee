"""Splice SAEs into the language model: put reconstructions, scaled latents and added directions in its activations.

At one hook and position, x [act_size] becomes

    f   = scale * encode(x)                                        [dict_size], scale 1 unless given
    out = (f W_dec + b_dec) * std + mean                           mean and std of x if input_unit_norm, else 0 and 1
          y + ((f - encode(x)) W_dec) * std                        with error_term: the same plus y - sae(x)
    out + sum_j add_j W_dec_j

y is x, or for a transcoder what is at the hook it writes, where `out` then goes; a skip connection adds z W_skip to
the first `out`.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor, nn

from analysis.latents import checked_latents
from evaluation import HeldOut, Predictions, ce, kl, top1_agreement
from language_model import Model, logits_at, ordinary_positions, replacing
from runtime.checks import require
from sae import BaseAutoencoder

EFFECTS = 5  # tokens that a latent's absence makes less likely, and as many that it makes more likely

Latent = tuple[str, int | tuple[int, ...]]
"""The hook of an SAE, such as "blocks.2.hook_resid_pre", and the number of one of its latents, or of several."""


@contextlib.contextmanager
def splice(
    model: Model,
    *saes: BaseAutoencoder,
    error_term: bool = False,
    scale: Mapping[Latent, float] = {},
    add: Mapping[Latent, float] = {},
    positions: Bool[Tensor, "window pos"] | None = None,
) -> Iterator[dict[str, Float[Tensor, "window pos dict_size"]]]:
    """Let each SAE stand in for the activations at its hook, `sae.cfg.hook_name`, in every forward pass within.

    A transcoder reads that hook and stands in for the activations at another; a crosscoder cannot be spliced, as it
    would have to read layers that come after those it writes.

        with splice(model, sae, error_term=True, scale={("blocks.2.hook_resid_pre", 17): 0.0}) as latents:
            logits = model(tokens)
        latents["blocks.2.hook_resid_pre"]  # [window, pos, dict_size]

    error_term  adds what the SAE does not reconstruct, so that only `scale` and `add` change anything
    scale       latent -> factor: 0 ablates it
    add         latent -> factor of its decoder row, added at every position, whether the latent fires or not, in the
                units of the model's activations; to steer, set error_term as well
    positions   where to splice; by default everywhere but at the first token of a window (BOS) and at special tokens,
                as in training and `evaluate`. The tokens that `model.generate` adds are spliced like the rest.

    Yields the latents of the latest forward pass by hook name, as they are decoded (scaled), 0 where nothing is
    spliced. They are part of the graph: `torch.autograd.grad(logits[0, -1, token], latents[name])`. Nothing is
    detached: with error_term, gradients before the hook are those of the model alone. SAEs encode as in evaluation and
    may be on other devices than the model. Raises ValueError when an argument does not fit the model or the SAEs.
    """
    by_hook: dict[str, BaseAutoencoder] = {}
    for sae in saes:
        kind = type(sae).__name__
        require(isinstance(sae, BaseAutoencoder), f"saes: a {kind} is not an SAE; give splice(model, sae)")
        name = sae.cfg.hook_name
        require(name not in by_hook, f"saes: two of them read {name}; give one per hook")
        for hook in (*sae.cfg.reads, *sae.cfg.writes):
            require(hook in model.hook_dict, f"saes: the model has no hook {hook}; give an SAE that was trained on it")
        require(
            len(sae.cfg.layers) == 1,
            f"saes: {kind} of layers {sae.cfg.layer}: a crosscoder cannot be spliced",
        )
        by_hook[name] = sae
    targets = [sae.cfg.writes[0] for sae in saes]
    require(len({*targets}) == len(targets), "saes: two of them write the same hook; give one per hook")
    factors, shifts = _beside(by_hook, "scale", scale, 1.0), _beside(by_hook, "add", add, 0.0)
    latents: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}  # by the hook where they go, until the forward pass is there
    spliced = torch.empty(0)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal spliced
        latents.clear()
        outputs.clear()
        tokens = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        before = int(cache is not None and cache.get_seq_length() > 0)  # after cached tokens no window begins
        ordinary = ordinary_positions(F.pad(tokens, (before, 0)), model.tokenizer)[:, before:]
        spliced = ordinary if positions is None else positions
        shapes = f"positions = {list(spliced.shape)}: the tokens are {list(tokens.shape)}; give the same shape"
        require(spliced.shape == tokens.shape, shapes)

    def read(acts: Tensor, name: str) -> None:
        sae = by_hook[name]
        x = acts.flatten(0, 1).to(sae.W_dec.device)  # [row, act_size]
        encoded = sae.encode(x)
        f = (encoded * factors[name]).unflatten(0, spliced.shape) * spliced[..., None].to(x.device)
        if torch.is_grad_enabled() and not f.requires_grad:
            f.requires_grad_()
        latents[name], f = f, f.flatten(0, 1)
        z, std, mean = sae.normalise(x)
        if error_term:
            out = ((f - encoded) @ sae.W_dec) * std
        else:
            out = sae.decode(f) * std + mean + (0 if sae.W_skip is None else z @ sae.W_skip)
        outputs[sae.cfg.writes[0]] = out + shifts[name] @ sae.W_dec

    def write(acts: Tensor, hook: str) -> Tensor:
        out = outputs.pop(hook).view_as(acts)
        here, y = spliced[..., None].to(out.device), acts.to(out.device)
        return torch.where(here, y + out if error_term else out, y)

    def stand_in(acts: Tensor, hook: str) -> Tensor:
        if hook in outputs:  # of a transcoder, which another SAE here may read
            acts = write(acts, hook)
        if hook in by_hook:
            read(acts, hook)
        return write(acts, hook) if hook in outputs else acts

    hooks = {*by_hook, *(sae.cfg.writes[0] for sae in saes)}
    stand_ins = {hook: partial(stand_in, hook=hook) for hook in hooks}
    with model.original_model.register_forward_pre_hook(begin, with_kwargs=True), replacing(model, stand_ins):
        yield latents


def _beside(
    by_hook: Mapping[str, BaseAutoencoder], field: str, numbers: Mapping[Latent, float], otherwise: float
) -> dict[str, Float[Tensor, "dict_size"]]:
    """Lay the numbers that are given for some latents beside all of them, by hook."""
    rows = {hook: torch.full_like(sae.b_enc, otherwise) for hook, sae in by_hook.items()}
    for latent, number in numbers.items():
        said, pair = f"{field} = {{{latent!r}: {number}}}:", isinstance(latent, tuple) and len(latent) == 2
        require(pair, f"{said} give latents as (hook, number), such as ('blocks.2.hook_mlp_out', 17)")
        require(math.isfinite(number), f"{said} give a finite number")
        hook, indices = latent
        require(hook in rows, f"{said} no SAE here reads {hook}; give one of {', '.join(rows)}")
        indices = indices if isinstance(indices, tuple) else (indices,)
        numbers = indices and all(isinstance(index, Integral) and not isinstance(index, bool) for index in indices)
        require(numbers, f"{said} give a latent's number, or a tuple of them")
        for index in indices:
            require(0 <= index < len(rows[hook]), f"{said} the SAE there has latents 0 to {len(rows[hook]) - 1}")
            rows[hook][index] = number
    return rows


@torch.no_grad()
def ablation_table(
    model: Model, sae: BaseAutoencoder, tokens: Int[Tensor, "window pos"], latents: Sequence[int]
) -> DataFrame:
    """Measure what the model predicts without each of some latents, one at a time, on windows of tokens.

    Columns, over all predictions: latent; ce_change, the rise of the cross-entropy in nats; kl, from the predictions
    with the latent; changed, the share whose likeliest token is another; loses and gains, the tokens whose
    probability falls and rises most on average. The SAE's error is left in, so that the latent alone is missing.
    Raises: ValueError when a latent is none or the tokens do not fit the model.
    """
    held_out, hook, rows = HeldOut(model, tokens), sae.cfg.hook_name, []
    for latent in checked_latents(sae, latents):
        totals, shift = torch.zeros(3, dtype=torch.float64), 0
        for batch in held_out.batches:
            clean = Predictions.of(batch.targets, logits_at(model, batch.tokens, batch.predicts).float())
            with splice(model, sae, error_term=True, scale={(hook, latent): 0.0}):
                logits = logits_at(model, batch.tokens, batch.predicts).float()
            seen = Predictions.of(batch.targets, logits, clean)
            metrics = ce(seen) - ce(clean), kl(seen), 1 - top1_agreement(seen)
            totals += torch.stack([metric.double().sum() for metric in metrics]).cpu()
            shift = shift + ((logits - seen.log_z[:, None]).exp() - clean.p).double().sum(dim=0)
        moved = []
        for sign in (-1, 1):
            most, ids = (sign * shift).topk(EFFECTS)
            moved.append(model.to_string(ids[most > 0][:, None]) if (most > 0).any() else [])
        count = sum(int(batch.predicts.sum()) for batch in held_out.batches)
        rows.append((latent, *(totals / count).tolist(), *moved))
    return DataFrame(rows, columns=["latent", "ce_change", "kl", "changed", "loses", "gains"])
