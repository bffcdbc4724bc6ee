"""The language model: load it, check it, record what passes its hooks, replace it, and say which positions count."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.logging import set_verbosity_error
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from config import SITES, Config
from runtime.checks import explained, require

Model = Any  # TransformerLens' TransformerBridge; importing it takes ten seconds
TINY_LM = Path(__file__).parent / "assets" / "tiny-lm"


def model_source(model_name: str) -> str:
    """Name what Hugging Face loads for a model_name: a folder, or the name itself."""
    folder = TINY_LM if model_name == "tiny-lm" else Path(model_name).expanduser()
    # An absolute path, as TransformerLens takes some names for other models.
    return str(folder.absolute()) if folder.is_dir() else model_name


def check_model(cfg: Config) -> Config:
    """Compare cfg with the model's configuration, before its weights are loaded, and fill in act_size.

    Raises: ValueError when cfg does not fit it, or it is no language model; OSError when there is no such model.
    """
    set_verbosity_error()  # retries are a line each
    disable_progress_bar()
    source, said = model_source(cfg.model_name), f"model_name = {cfg.model_name!r}:"
    problem = "has no good config.json" if os.path.exists(source) else "found neither in a folder nor on the Hub"
    wrong = (OSError, ValueError, StrictDataclassError)
    with explained(f"{said} {problem}", *wrong, remedy="give another", raised=OSError):
        hf = AutoConfig.from_pretrained(source).get_text_config()
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    decoder = not hf.is_encoder_decoder and all(hasattr(hf, name) for name in needed)
    require(decoder, f"{said} {hf.model_type} is no decoder-only language model; give one")
    n_layers, d_model, heads = hf.num_hidden_layers, hf.hidden_size, hf.num_attention_heads
    blocks = f"layer = {cfg.layer}: {cfg.model_name} has {n_layers} blocks; give 0 to {n_layers - 1}"
    require(cfg.layer < n_layers, blocks)
    context = getattr(hf, "max_position_embeddings", None) or cfg.seq_len
    reads = f"seq_len = {cfg.seq_len}: {cfg.model_name} reads at most {context} tokens; give no more"
    require(cfg.seq_len <= context, reads)
    head_size = getattr(hf, "head_dim", None) or d_model // heads
    act_size = heads * head_size if cfg.site == "z" else d_model
    wide = f"act_size = {cfg.act_size}: {cfg.site} of {cfg.model_name} is {act_size} wide; leave it out"
    require(cfg.act_size in (None, act_size), wide)
    return replace(cfg, act_size=act_size)


def load_model(cfg: Config) -> Model:
    """Load the language model of cfg: raw weights, in its dtype, on its device, ready for inference only.

    Raises: ValueError when it cannot be loaded or has no such site.
    """
    from transformer_lens.model_bridge import TransformerBridge  # late: what check_model refuses is answered before

    wrong = (OSError, ValueError, RuntimeError, SafetensorError)
    with explained(f"model_name = {cfg.model_name!r}: cannot be loaded", *wrong, remedy="give a whole model that fits"):
        model = TransformerBridge.boot_transformers(
            model_source(cfg.model_name), device=str(cfg.torch_device), dtype=getattr(torch, cfg.dtype)
        )
    check_hooks(model, cfg)
    return model.eval().requires_grad_(False)


def check_hooks(model: Model, cfg: Config) -> None:
    """Raise ValueError when the model lacks a hook that cfg reads or writes."""
    sites = [site for site, hook in SITES.items() if f"blocks.{cfg.layer}.{hook}" in model.hook_dict]
    missing = f"site = {cfg.site!r}: {cfg.model_name} has no such hook; give one of {', '.join(sites)}"
    require({*cfg.reads, *cfg.writes} <= model.hook_dict.keys(), missing)


class _Recorded(Exception):
    """Leaves the forward pass at the last hook: what follows it would be computed for nothing."""


@torch.no_grad()
def record(
    model: Model, tokens: Int[Tensor, "window pos"], hook_names: Sequence[str]
) -> dict[str, Float[Tensor, "window pos act_size"]]:
    """Record the activations at some hooks, heads concatenated; the forward pass ends at the last of them."""
    recorded: dict[str, Tensor] = {}

    def keep(acts: Tensor, hook: object, name: str) -> None:
        recorded[name] = rearrange(acts, "window pos ... -> window pos (...)")
        if len(recorded) == len(set(hook_names)):
            raise _Recorded

    with (
        model.hooks(fwd_hooks=[(name, partial(keep, name=name)) for name in hook_names]),
        contextlib.suppress(_Recorded),
    ):
        model(tokens, return_type=None)
    assert recorded.keys() == set(hook_names), f"of {hook_names} only {list(recorded)} fired"
    return recorded


@contextlib.contextmanager
def replacing(
    model: Model,
    by_hook: Mapping[str, Callable[[Float[Tensor, "window pos act_size"]], Float[Tensor, "window pos act_size"]]],
) -> Iterator[None]:
    """Pass the activations at each hook, heads concatenated, through its function in every forward pass within."""

    def replaced(acts: Tensor, hook: object, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(acts.flatten(2)).to(acts).view_as(acts)

    with model.hooks(fwd_hooks=[(name, partial(replaced, function=f)) for name, f in by_hook.items()]):
        yield


@contextlib.contextmanager
def computing_once(model: Model, layer: int) -> Iterator[None]:
    """Have the blocks below `layer` compute in the first forward pass within only: later ones take what they gave.

    All passes must be of the same tokens, and change nothing below `layer`. Nothing is saved in a model like Gemma 4,
    whose later blocks read keys and values of earlier ones.
    """
    given: dict[Any, Any] = {}
    shares = getattr(model.original_model.config.get_text_config(), "num_kv_shared_layers", 0)

    def once(block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if block not in given:
            given[block] = forward(*args, **kwargs)
        return given[block]

    with contextlib.ExitStack() as stack:
        for block in model.blocks[: 0 if shares else layer]:
            vars(block)["forward"] = partial(once, block, block.forward)  # setattr would change the module it wraps
            stack.callback(vars(block).pop, "forward")
        yield


def logits_at(
    model: Model, tokens: Int[Tensor, "window pos"], positions: Bool[Tensor, "window pos"]
) -> Float[Tensor, "position vocab"]:
    """Compute the logits at some positions: unembedding takes as long as several blocks of a small model."""

    def keep(acts: Tensor, hook: object) -> Tensor:
        return acts[positions][None]

    with model.hooks(fwd_hooks=[("unembed.hook_in", keep)]):
        return model(tokens, return_type="logits")[0]


def ordinary_positions(
    tokens: Int[Tensor, "window pos"], tokenizer: PreTrainedTokenizerBase
) -> Bool[Tensor, "window pos"]:
    """Mark where a dictionary may read: not the BOS that starts a window, no special token (EOS, padding, ...)."""
    # all_special_ids lacks those that only tokenizer.json knows, such as the padding of Pythia.
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = torch.tensor([*tokenizer.all_special_ids, *added], dtype=tokens.dtype, device=tokens.device)
    ordinary = ~torch.isin(tokens, special)
    ordinary[:, 0] = False
    return ordinary
