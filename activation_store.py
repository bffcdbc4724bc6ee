"""Text -> tokens -> hooked activations -> shuffled batches.

The store streams: it holds one buffer of activations, refills the half that has been read, and serves every row once.
"""

import contextlib
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, PreTrainedTokenizerBase

import text
from config import SITES, Config

MIXED_TOKENS = 1 << 19  # tokens of windows that wait to be mixed
PREFETCHED = 8  # batches of windows: documents are tokenised many at a time
TINY_LM = Path(__file__).parent / "assets" / "tiny-lm"


def model_source(model_name: str) -> str:
    """What Hugging Face loads for a model_name: the embedded model's folder, or the name itself."""
    return str(TINY_LM) if model_name == "tiny-lm" else os.path.expanduser(model_name)


def check_model(cfg: Config) -> Config:
    """Compare cfg with the model's configuration, before its weights are loaded, and fill in act_size.

    Raises: ValueError when layer, seq_len or act_size do not fit the model; OSError when there is no such model.
    """
    try:
        hf = AutoConfig.from_pretrained(model_source(cfg.model_name)).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"model_name = {cfg.model_name!r}: found neither in a folder nor on the Hub ({reason})") from None
    n_layers, d_model = hf.num_hidden_layers, hf.hidden_size
    if cfg.layer >= n_layers:
        raise ValueError(f"layer = {cfg.layer}: {cfg.model_name} has {n_layers} blocks; give 0 to {n_layers - 1}")
    context = getattr(hf, "max_position_embeddings", None)
    if context is not None and cfg.seq_len > context:
        raise ValueError(f"seq_len = {cfg.seq_len}: {cfg.model_name} reads at most {context} tokens")
    heads = hf.num_attention_heads
    head_size = getattr(hf, "head_dim", None) or d_model // heads
    act_size = heads * head_size if cfg.site == "z" else d_model
    if cfg.act_size not in (None, act_size):
        raise ValueError(f"act_size = {cfg.act_size}: {cfg.site} of {cfg.model_name} is {act_size} wide; leave it out")
    return replace(cfg, act_size=act_size)


def load_model(cfg: Config) -> TransformerBridge:
    """The language model of cfg, raw weights, in its dtype, on its device, ready for inference only."""
    model = TransformerBridge.boot_transformers(
        model_source(cfg.model_name), device=str(cfg.torch_device), dtype=cfg.torch_dtype
    )
    if cfg.hook_point not in model.hook_dict:
        sites = [site for site, hook in SITES.items() if f"blocks.{cfg.layer}.{hook}" in model.hook_dict]
        raise ValueError(f"site = {cfg.site!r}: {cfg.model_name} has no such hook; give one of {', '.join(sites)}")
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class _Recorded(Exception):
    """Leaves the forward pass at the hook: what follows it would be computed for nothing."""


@torch.no_grad()
def record(
    model: TransformerBridge, tokens: Int[Tensor, "window pos"], hook_name: str
) -> Float[Tensor, "window pos act_size"]:
    """Activations at a hook; the forward pass ends there. Heads are concatenated."""
    recorded: list[Tensor] = []

    def keep(acts: Tensor, hook: object) -> None:
        recorded.append(rearrange(acts, "window pos ... -> window pos (...)"))
        raise _Recorded

    with model.hooks(fwd_hooks=[(hook_name, keep)]), contextlib.suppress(_Recorded):
        model(tokens, return_type=None)
    assert len(recorded) == 1, f"{hook_name} did not fire"
    return recorded[0]


def ordinary_positions(
    tokens: Int[Tensor, "window pos"], tokenizer: PreTrainedTokenizerBase
) -> Bool[Tensor, "window pos"]:
    """True where an SAE may read: not the BOS that starts a window, not a special token (EOS, padding, ...)."""
    # all_special_ids lacks those that only tokenizer.json knows, such as the padding of Pythia.
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = torch.tensor([*tokenizer.all_special_ids, *added], dtype=tokens.dtype, device=tokens.device)
    ordinary = ~torch.isin(tokens, special)
    ordinary[:, 0] = False
    return ordinary


class ActivationsStore:
    """Activations of a model's hook on the training text, in shuffled batches, and its held-out text for evaluation.

    The buffer holds num_batches_in_buffer batches of the model. Once half of it has been read, that half is refilled
    and the unread rows of old and new are shuffled together. Deterministic in cfg.seed.
    """

    def __init__(self, model: TransformerBridge, cfg: Config) -> None:
        assert cfg.act_size is not None, "cfg.act_size is unknown: use check_model(cfg)"
        self.model, self.cfg = model, cfg
        self.capacity = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
        if self.capacity < 2 * cfg.batch_size:
            raise ValueError(
                f"num_batches_in_buffer = {cfg.num_batches_in_buffer}: the buffer would hold {self.capacity} rows, less"
                f" than two of batch_size {cfg.batch_size}; give at least"
                f" {-(-2 * cfg.batch_size // (cfg.model_batch_size * (cfg.seq_len - 1)))}"
            )
        device = cfg.torch_device
        self._rng = torch.Generator().manual_seed(cfg.seed)
        self._token_batches = _prefetch(_training_token_batches(cfg, model.tokenizer))
        self._buffer = torch.empty(self.capacity, cfg.act_size, dtype=cfg.torch_dtype, device=device)
        self._order = torch.arange(
            self.capacity, device=device
        )  # slots in the order they are served; those before _served are free
        self._served = self.capacity
        self._spill = torch.empty(0, cfg.act_size, dtype=cfg.torch_dtype, device=device)  # rows that found no slot yet
        self._row_sum = torch.zeros(cfg.act_size, dtype=torch.float64, device=device)
        self._rows = 0
        self.tokens_seen = 0
        """Tokens the language model has read for training, special ones included."""

    def next_batch(self) -> Float[Tensor, "batch_size act_size"]:
        """The next cfg.batch_size rows, in the model's dtype, on its device. A copy: the caller may keep it."""
        if self._served > 0 and self._served + self.cfg.batch_size > self.capacity // 2:
            self._refill()
        slots = self._order[self._served : self._served + self.cfg.batch_size]
        self._served += self.cfg.batch_size
        return self._buffer[slots]

    @property
    def mean(self) -> Float[Tensor, "act_size"]:
        """Mean of all training activations so far."""
        return (self._row_sum / self._rows).to(torch.float32)

    def held_out_tokens(self) -> Int[Tensor, "window pos"]:
        """The first cfg.eval_windows windows of the held-out text: the same ones whenever asked."""
        windows = list(islice(_windows(self.cfg, self.model.tokenizer, held_out=True), self.cfg.eval_windows))
        if not windows:
            raise ValueError(
                f"dataset_path = {self.cfg.dataset_path!r}: the held-out tenth has no {self.cfg.seq_len} tokens"
            )
        return torch.stack(windows)

    def _refill(self) -> None:
        """Write new rows into the slots already served, then shuffle all unread rows."""
        free = self._order[: self._served]
        filled = 0
        while filled < len(free):
            rows = self._spill if len(self._spill) else self._new_rows()
            fits = min(len(rows), len(free) - filled)
            slots = free[filled : filled + fits]
            self._buffer[slots] = rows[:fits]
            self._spill = rows[fits:]
            filled += fits
        self._order = _send(torch.randperm(self.capacity, generator=self._rng), self._buffer.device)
        self._served = 0

    def _new_rows(self) -> Float[Tensor, "rows act_size"]:
        """Activations of the next batch of windows at ordinary positions."""
        tokens = next(self._token_batches)
        kept = ordinary_positions(tokens, self.model.tokenizer).flatten().nonzero().squeeze(1)
        device = self._buffer.device
        acts = record(self.model, _send(tokens, device), self.cfg.hook_point).flatten(0, 1)
        rows = acts[_send(kept, device)]
        self._row_sum += rows.sum(dim=0, dtype=torch.float64)
        self._rows += len(rows)
        self.tokens_seen += tokens.numel()
        return rows


# Functions, not methods: a generator that held the store would keep its buffer alive when the store is dropped.


def _windows(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, *, held_out: bool, epoch: int = 0
) -> Iterator[Int[Tensor, "pos"]]:
    documents = text.load_documents(
        cfg.dataset_path, cfg.dataset_name, held_out=held_out, seed=0 if held_out else cfg.seed
    )
    documents.set_epoch(epoch)
    return text.token_windows(documents, tokenizer, cfg.seq_len)


def _training_token_batches(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[Int[Tensor, "window pos"]]:
    epoch = 0
    while True:
        rng = random.Random(f"{cfg.seed} {epoch}")
        windows = _mixed(_windows(cfg, tokenizer, held_out=False, epoch=epoch), MIXED_TOKENS // cfg.seq_len, rng)
        count = 0
        while batch := list(islice(windows, cfg.model_batch_size)):
            count += len(batch)
            yield torch.stack(batch)
        if count == 0:
            raise ValueError(f"dataset_path = {cfg.dataset_path!r}: no {cfg.seq_len} tokens of training text")
        if epoch == 0:
            tokens = count * cfg.seq_len
            tqdm.write(f"all {tokens:,} training tokens of {cfg.dataset_path} read: starting over, reshuffled")
        epoch += 1


def _mixed(windows: Iterator[Int[Tensor, "pos"]], pool_size: int, rng: random.Random) -> Iterator[Int[Tensor, "pos"]]:
    """The same windows in another order: each waits in a pool for a random time. A long document is many windows in a
    row, of which the buffer of activations alone would hold too large a share.
    """
    pool = list(islice(windows, max(1, pool_size)))
    for window in windows:
        chosen = rng.randrange(len(pool))
        yield pool[chosen]
        pool[chosen] = window
    rng.shuffle(pool)
    yield from pool


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _prefetch(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same batches, the next few being made in a thread while one is used (tokenizers release the GIL)."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokens") as executor:
        pending = deque(executor.submit(next, batches) for _ in range(PREFETCHED))
        while True:
            ready = pending.popleft().result()
            pending.append(executor.submit(next, batches))
            yield ready
