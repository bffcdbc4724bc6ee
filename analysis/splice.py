"""Splice SAEs into the language model: put reconstructions, scaled latents and added directions in its activations.

At one hook and position, x [act_size] becomes

    f   = scale * encode(x)                                        [dict_size], scale 1 unless given
    out = (f W_dec + b_dec) * std + mean                           mean and std of x if input_unit_norm, else 0 and 1
          x + ((f - encode(x)) W_dec) * std                        with error_term: the same plus x - sae(x)
    out + sum_j add_j W_dec_j
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from language_model import Model, ordinary_positions, replacing
from runtime.checks import require
from sae import BaseAutoencoder

Latent = tuple[str, int]
"""The hook of an SAE, such as "blocks.2.hook_resid_pre", and the number of one of its latents."""


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
        require(name in model.hook_dict, f"saes: the model has no hook {name}; give an SAE that was trained on it")
        by_hook[name] = sae
    factors, shifts = _beside(by_hook, "scale", scale, 1.0), _beside(by_hook, "add", add, 0.0)
    latents: dict[str, Tensor] = {}
    spliced = torch.empty(0)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal spliced
        latents.clear()
        tokens = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        before = int(cache is not None and cache.get_seq_length() > 0)  # after cached tokens no window begins
        ordinary = ordinary_positions(F.pad(tokens, (before, 0)), model.tokenizer)[:, before:]
        spliced = ordinary if positions is None else positions
        shapes = f"positions = {list(spliced.shape)}: the tokens are {list(tokens.shape)}; give the same shape"
        require(spliced.shape == tokens.shape, shapes)

    def stand_in(acts: Tensor, name: str) -> Tensor:
        sae = by_hook[name]
        x = acts.flatten(0, 1).to(sae.W_dec.device)  # [row, act_size]
        here = spliced[..., None].to(x.device)  # [window, pos, 1]
        encoded = sae.encode(x)
        f = (encoded * factors[name]).unflatten(0, spliced.shape) * here
        if torch.is_grad_enabled() and not f.requires_grad:
            f.requires_grad_()
        latents[name], f = f, f.flatten(0, 1)
        _, std, mean = sae.normalise(x)
        out = x + ((f - encoded) @ sae.W_dec) * std if error_term else sae.decode(f) * std + mean
        out = out + shifts[name] @ sae.W_dec
        return torch.where(here, out.view_as(acts), x.view_as(acts))

    stand_ins = {name: partial(stand_in, name=name) for name in by_hook}
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
        hook, index = latent
        require(hook in rows, f"{said} no SAE here reads {hook}; give one of {', '.join(rows)}")
        require(0 <= index < len(rows[hook]), f"{said} the SAE there has latents 0 to {len(rows[hook]) - 1}")
        rows[hook][index] = number
    return rows
