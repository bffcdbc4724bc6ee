"""The language model: load it, check it, record what passes its hooks, replace it, and say which positions count."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from runtime.checks import explained, near, require
from runtime.models import find, model_source

Model = Any  # TransformerLens' TransformerBridge; importing it takes ten seconds
TRIED_TOKENS = 7  # of a window, unlike the number of heads


def check_model(cfg: Config) -> Config:
    """Compare cfg with the model's configuration before its weights are loaded; fill in the widths of named sites.

    Raises: ValueError when cfg does not fit it, or it is no language model; OSError when there is no such model.
    """
    set_verbosity_error()  # retries are a line each
    disable_progress_bar()
    source, said = model_source(cfg.model_name), f"model_name = {cfg.model_name!r}:"
    find(cfg.model_name)
    wrong = (OSError, ValueError, StrictDataclassError)
    with explained(f"{said} has no good config.json", *wrong, remedy="give another", raised=OSError):
        hf = AutoConfig.from_pretrained(source).get_text_config()
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    decoder = not hf.is_encoder_decoder and all(hasattr(hf, name) for name in needed)
    require(decoder, f"{said} {hf.model_type} is no decoder-only language model; give one")
    n_layers, d_model, heads = hf.num_hidden_layers, hf.hidden_size, hf.num_attention_heads
    blocks = f"layer = {cfg.layer}: {cfg.model_name} has {n_layers} blocks; give 0 to {n_layers - 1}"
    require(cfg.layers[-1] < n_layers, blocks)
    context = getattr(hf, "max_position_embeddings", None) or cfg.seq_len
    reads = f"seq_len = {cfg.seq_len}: {cfg.model_name} reads at most {context} tokens; give no more"
    require(cfg.seq_len <= context, reads)
    head_size = getattr(hf, "head_dim", None) or d_model // heads
    widths = dict.fromkeys(SITES, d_model) | {"z": heads * head_size}
    return _with_widths(cfg, widths.get(cfg.site), widths.get(cfg.target_site))


def _with_widths(cfg: Config, act_size: int | None, target_size: int | None) -> Config:
    """Fill in the widths that are known."""
    found = {"act_size": act_size, "target_size": target_size if cfg.target_site else None}
    for (field, width), site in zip(found.items(), (cfg.site, cfg.target_site)):
        given = getattr(cfg, field)
        wide = f"{field} = {given}: {site} of {cfg.model_name} is {width} wide; leave it out"
        require(width is None or given in (None, width), wide)
    return replace(cfg, **{field: width for field, width in found.items() if width})


def load_model(cfg: Config) -> Model:
    """Load the language model of cfg: raw weights, in its dtype, on its device, ready for inference only.

    Raises: ValueError when it cannot be loaded, OSError when there is no such model.
    """
    find(cfg.model_name)
    from transformer_lens.model_bridge import TransformerBridge  # late: what check_model refuses is answered before

    wrong = (OSError, ValueError, RuntimeError, SafetensorError)
    with explained(f"model_name = {cfg.model_name!r}: cannot be loaded", *wrong, remedy="give a whole model that fits"):
        model = TransformerBridge.boot_transformers(
            model_source(cfg.model_name), device=str(cfg.torch_device), dtype=getattr(torch, cfg.dtype)
        )
    return model.eval().requires_grad_(False)


def _kept(found: list[Tensor], acts: Tensor) -> Tensor:
    found.append(acts)
    return acts


@torch.no_grad()
def check_hooks(model: Model, cfg: Config) -> Config:
    """Try each hook that cfg reads or writes on two short windows, and fill in the widths they have.

    A hook must fire, and the model must predict the same when it is replaced by itself, and something else when it is
    replaced by zeros: TransformerLens has some that do neither (its issues 1527 and 1673).
    Raises ValueError when a hook is missing, is no vector for each token, or is not what it seems.
    """
    tokens, widths = torch.arange(2 * TRIED_TOKENS, device=model.cfg.device).view(2, -1), {}
    logits = model(tokens, return_type="logits")
    for hook in dict.fromkeys((*cfg.reads, *cfg.writes)):
        field = "target_site" if cfg.target_site and hook in cfg.writes else "site"
        site, said = getattr(cfg, field), f"{field} = {getattr(cfg, field)!r}: {cfg.model_name}"
        block = f"blocks.{cfg.layers[-1]}."
        named = [name for name, of_block in SITES.items() if block + of_block in model.hook_dict]
        others = [name.removeprefix(block) for name in model.hook_dict if name.startswith(block)]
        meant = "" if site in SITES else near(site, (*named, *others))
        missing = (
            f"{said} has no such hook; {meant}give one of {', '.join(named)}, or any that TransformerLens has there"
        )
        require(hook in model.hook_dict, missing)
        found: list[Tensor] = []
        keep = partial(_kept, found)
        with explained(f"{said}: {hook} cannot be used", ValueError, RuntimeError, IndexError, remedy="give another"):
            with replacing(model, {hook: keep}):
                same = model(tokens, return_type="logits")
            with replacing(model, {hook: torch.zeros_like}):
                other = model(tokens, return_type="logits")
        of_tokens = len(found) == 1 and found[0].shape[:2] == tokens.shape and found[0].shape[2] != TRIED_TOKENS**2
        require(of_tokens, f"{said} has no vector for each token at {hook}; give another")
        acts = torch.equal(same, logits) and not torch.equal(other, logits)
        idle = f"{said} does not act through {hook}: replaced by itself it changes the logits, or by zeros it does not"
        require(acts, f"{idle}; give another")
        widths[hook] = found[0].shape[2]
    order = list(record(model, tokens, list(widths)))
    backwards = f"target_site = {cfg.target_site!r}: comes before {cfg.site} in {cfg.model_name}; exchange them"
    require(order.index(cfg.reads[0]) <= order.index(cfg.writes[0]), backwards)
    return _with_widths(cfg, widths[cfg.reads[0]], widths[cfg.writes[0]])


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


def side_by_side(
    by_hook: Mapping[str, Float[Tensor, "*batch act_size"]], hooks: Sequence[str]
) -> Float[Tensor, "*batch width"]:
    """Join the activations at some hooks into the x or y of a dictionary; those of one hook are not copied."""
    return by_hook[hooks[0]] if len(hooks) == 1 else torch.cat([by_hook[hook] for hook in hooks], dim=-1)


@contextlib.contextmanager
def replacing(
    model: Model,
    by_hook: Mapping[str, Callable[[Float[Tensor, "window pos act_size"]], Float[Tensor, "window pos act_size"]]],
) -> Iterator[None]:
    """Pass the activations at each hook, heads concatenated, through its function in every forward pass within.

    TransformerBridge's hook_resid_mid stands on the way into the MLP alone. The residual stream that goes on beside it
    is made to follow, at the end of the block.
    """
    shifts: dict[str, Tensor] = {}

    def replaced(acts: Tensor, hook: object, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        out = function(acts.flatten(2)).to(acts).view_as(acts)
        if name in after:
            shifts[name] = out - acts
        return out

    def follow(acts: Tensor, hook: object, name: str) -> Tensor:
        return acts + shifts.pop(name)

    middle, end = SITES["resid_mid"], SITES["resid_post"]
    after = {name: name.removesuffix(middle) + end for name in by_hook if name.endswith(middle)}
    following = [(after_block, partial(follow, name=name)) for name, after_block in after.items()]
    stand_ins = [(name, partial(replaced, name=name, function=f)) for name, f in by_hook.items()]
    with model.hooks(fwd_hooks=[*following, *stand_ins]):
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
