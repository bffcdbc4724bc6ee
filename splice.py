"""The language model with SAEs spliced in: reconstructions, latents scaled, directions added; gradients flow through.

At one hook and position, x [act_size] becomes

    f   = scale * encode(x)                                        [dict_size], scale 1 where nothing is said
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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from activation_store import ordinary_positions
from sae import BaseAutoencoder

Latent = tuple[str, int]
"""The hook of an SAE, such as "blocks.2.hook_resid_pre", and a latent's number in it."""


@contextlib.contextmanager
def splice(
    model: TransformerBridge,
    *saes: BaseAutoencoder,
    error_term: bool = False,
    scale: Mapping[Latent, float] = {},
    add: Mapping[Latent, float] = {},
    positions: Bool[Tensor, "window pos"] | None = None,
) -> Iterator[dict[str, Float[Tensor, "window pos dict_size"]]]:
    """While active, each SAE stands in for the activations at its hook, `sae.cfg.hook_point`, in every forward pass.

        with splice(model, sae, error_term=True, scale={("blocks.2.hook_resid_pre", 17): 0.0}) as latents:
            logits = model(tokens)
        latents["blocks.2.hook_resid_pre"]  # [window, pos, dict_size]

    error_term  adds what the SAE does not reconstruct, so that nothing changes but by `scale` and `add`
    scale       latent -> factor: 0 ablates it
    add         latent -> factor of its decoder row, of norm 1 if trained here: added at every position, in the units of
                the model's activations, whether the latent fires or not; to steer, give error_term as well
    positions   where to splice. By default all but the first of a window (BOS) and special tokens, as in training and
                `evaluate`. What `model.generate` adds to its cache is spliced like the rest of the text.

    Yields the latents of the latest forward pass by hook name, as they are decoded (scaled) and 0 where nothing is
    spliced. They are part of the graph: `torch.autograd.grad(logits[0, -1, token], latents[name])`, also where no
    parameter needs a gradient. Nothing is detached, the error term neither: with it, gradients with respect to whatever
    comes before the hook are those of the model alone. SAEs encode as in evaluation, whatever their mode, and may lie
    on other devices than the model. On leaving, all is as it was, after an exception too.
    Raises ValueError when what is given are no SAEs, two read one hook, the model has no such hook, `scale` or `add` is
    not finite or names a latent that none of the SAEs has, or `positions` has not the shape of the tokens.
    """
    _check(model, saes, scale, add)
    latents: dict[str, Tensor] = {}
    spliced = torch.empty(0)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal spliced
        latents.clear()
        tokens = args[0] if args else kwargs["input_ids"]
        if positions is not None and positions.shape != tokens.shape:
            raise ValueError(f"positions = {list(positions.shape)}: the tokens are {list(tokens.shape)}; give the same")
        cache = kwargs.get("past_key_values")
        goes_on = cache is not None and cache.get_seq_length() > 0
        spliced = _ordinary(tokens, model, goes_on) if positions is None else positions

    def replace(acts: Tensor, hook: HookPoint, sae: BaseAutoencoder) -> Tensor:
        name = sae.cfg.hook_point
        x = acts.flatten(2).to(sae.W_dec.device)  # [window, pos, act_size], heads concatenated
        here = spliced[..., None].to(x.device)
        encoded = sae.encode(x)
        factors = torch.ones_like(sae.b_enc)
        for (at, latent), factor in scale.items():
            if at == name:
                factors[latent] = factor
        f = encoded * factors * here
        if torch.is_grad_enabled() and not f.requires_grad:
            f.requires_grad_()
        latents[name] = f
        _, std, mean = (_per_token(part, x) for part in sae.normalise(x.flatten(0, 1)))
        out = x + ((f - encoded) @ sae.W_dec) * std if error_term else sae.decode(f) * std + mean
        for (at, latent), length in add.items():
            if at == name:
                out = out + length * sae.W_dec[latent]
        return torch.where(here, out.to(x.dtype), x).to(acts.device).view_as(acts)

    hooks = [(sae.cfg.hook_point, partial(replace, sae=sae)) for sae in saes]
    with model.original_model.register_forward_pre_hook(begin, with_kwargs=True), model.hooks(fwd_hooks=hooks):
        yield latents


def _ordinary(tokens: Int[Tensor, "window pos"], model: TransformerBridge, goes_on: bool) -> Bool[Tensor, "window pos"]:
    """`ordinary_positions`; those of tokens that go on behind cached ones have no first of a window among them."""
    before = 1 if goes_on else 0
    return ordinary_positions(F.pad(tokens, (before, 0)), model.tokenizer)[:, before:]


def _per_token(part: Tensor | float, x: Float[Tensor, "window pos act_size"]) -> Tensor | float:
    return part.unflatten(0, x.shape[:2]) if isinstance(part, Tensor) else part


def _check(
    model: TransformerBridge,
    saes: tuple[BaseAutoencoder, ...],
    scale: Mapping[Latent, float],
    add: Mapping[Latent, float],
) -> None:
    sizes: dict[str, int] = {}
    for sae in saes:
        if not isinstance(sae, BaseAutoencoder):
            raise ValueError(f"saes: a {type(sae).__name__} is none; give splice(model, sae) or splice(model, a, b)")
        name = sae.cfg.hook_point
        if name in sizes:
            raise ValueError(f"saes: two of them read {name}; give one per hook")
        if name not in model.hook_dict:
            raise ValueError(f"saes: the model has no hook {name}; give an SAE that was trained on this model")
        sizes[name] = sae.cfg.dict_size
    for field, latents in (("scale", scale), ("add", add)):
        for at, number in latents.items():
            if not (isinstance(at, tuple) and len(at) == 2):
                raise ValueError(
                    f"{field} = {at!r}: no latent; give (hook, number), as in ('blocks.2.hook_mlp_out', 17)"
                )
            if not math.isfinite(number):
                raise ValueError(f"{field} = {at}: {number}; give a finite number")
            name, latent = at
            if name not in sizes:
                raise ValueError(f"{field} = {name!r}: no SAE given reads this hook; give one of {', '.join(sizes)}")
            if not 0 <= latent < sizes[name]:
                raise ValueError(f"{field} = {name!r}, {latent}: the SAE there has latents 0 to {sizes[name] - 1}")
