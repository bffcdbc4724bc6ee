"""Text -> tokens -> hooked activations -> shuffled batches.

The store streams: it holds one buffer of activations, refills the half that has been read, and serves every row once.
"""

import contextlib
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import ranks
import text
from config import SITES, Config
from errors import one_line

if TYPE_CHECKING:  # it takes seconds, and what check_model and check_text refuse is answered at once
    from transformer_lens.model_bridge import TransformerBridge

COPIED_ROWS = 1 << 16  # at a time from a GPU
HELD_OUT_CHOICE = 32
PREFETCHED = 8  # batches of windows: documents are tokenised many at a time
TINY_LM = Path(__file__).parent / "assets" / "tiny-lm"


def model_source(model_name: str) -> str:
    """What Hugging Face loads for a model_name: the embedded model's folder, or the name itself."""
    return str(TINY_LM) if model_name == "tiny-lm" else os.path.expanduser(model_name)


def check_model(cfg: Config) -> Config:
    """Compare cfg with the model's configuration, before its weights are loaded, and fill in act_size.

    Raises: ValueError when it is no language model, or layer, seq_len or act_size do not fit it; OSError when there is
    no such model.
    """
    source = model_source(cfg.model_name)
    try:
        hf = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        problem = "has no good config.json" if os.path.exists(source) else "found neither in a folder nor on the Hub"
        raise OSError(f"model_name = {cfg.model_name!r}: {problem} ({one_line(error)}); give another") from None
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    if hf.is_encoder_decoder or not all(hasattr(hf, name) for name in needed):
        raise ValueError(
            f"model_name = {cfg.model_name!r}: {hf.model_type} is no decoder-only language model; give one"
        )
    n_layers, d_model = hf.num_hidden_layers, hf.hidden_size
    if cfg.layer >= n_layers:
        raise ValueError(f"layer = {cfg.layer}: {cfg.model_name} has {n_layers} blocks; give 0 to {n_layers - 1}")
    context = getattr(hf, "max_position_embeddings", None)
    if context is not None and cfg.seq_len > context:
        raise ValueError(f"seq_len = {cfg.seq_len}: {cfg.model_name} reads at most {context} tokens; give no more")
    heads = hf.num_attention_heads
    head_size = getattr(hf, "head_dim", None) or d_model // heads
    act_size = heads * head_size if cfg.site == "z" else d_model
    if cfg.act_size not in (None, act_size):
        raise ValueError(f"act_size = {cfg.act_size}: {cfg.site} of {cfg.model_name} is {act_size} wide; leave it out")
    return replace(cfg, act_size=act_size)


def check_text(cfg: Config) -> None:
    """Read the training and the held-out text up to a window of each with a token that an SAE may read.

    Raises: ValueError when a part has none, or the text or the model's tokenizer cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(cfg.model_name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name = {cfg.model_name!r}: no tokenizer that can be read ({one_line(error)}); give another"
        ) from None
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):  # made where there are no files
        raise ValueError(f"model_name = {cfg.model_name!r}: no tokenizer in that folder; give another")
    vocab_size = AutoConfig.from_pretrained(model_source(cfg.model_name)).get_text_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model_name = {cfg.model_name!r}: its tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size};"
            " put the model's own beside it"
        )
    text.bos_token_id(tokenizer)
    for held_out in (False, True):
        documents = text.documents(cfg.dataset_path, cfg.dataset_name, held_out=held_out)
        windows = text.token_windows(documents, tokenizer, cfg.seq_len)
        try:
            readable = any(ordinary_positions(window[None], tokenizer).any() for window in windows)
        except ValueError as error:
            raise ValueError(f"dataset_path {cfg.dataset_path!r}: {error}; give other data") from None
        if not readable:
            part = "held-out tenth" if held_out else "training part"
            raise ValueError(
                f"dataset_path {cfg.dataset_path!r}: its {part} does not fill a window of seq_len {cfg.seq_len}; give"
                " more text"
            )


def load_model(cfg: Config) -> "TransformerBridge":
    """The language model of cfg, raw weights, in its dtype, on its device, ready for inference only.

    Raises: ValueError when it cannot be loaded or has no such site.
    """
    from transformer_lens.model_bridge import TransformerBridge

    try:
        model = TransformerBridge.boot_transformers(
            model_source(cfg.model_name), device=str(cfg.torch_device), dtype=cfg.torch_dtype
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model_name = {cfg.model_name!r}: cannot be loaded ({one_line(error)}); give a whole model that fits"
        ) from None
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
    model: "TransformerBridge", tokens: Int[Tensor, "window pos"], hook_name: str
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


def held_out_windows(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, count: int, choice: int
) -> Int[Tensor, "window pos"]:
    """`count` windows of the held-out text, the same ones whenever asked: a sample of the first `choice` times as many,
    as one long document can be many windows in a row. Fewer where the text ends before.

    Raises: ValueError when the held-out text does not fill one window, or cannot be read.
    """
    documents = text.load_documents(cfg.dataset_path, cfg.dataset_name, held_out=True)
    first = list(islice(text.token_windows(documents, tokenizer, cfg.seq_len), choice * count))
    if not first:
        raise ValueError(
            f"dataset_path = {cfg.dataset_path!r}: the held-out tenth has no {cfg.seq_len} tokens; give more"
        )
    return torch.stack(random.Random(0).sample(first, min(count, len(first))))


@dataclass(frozen=True)
class _Progress:
    """What a store has read."""

    text: text.TextPosition | None  # None before the first batch of windows
    spill: Float[Tensor, "rows act_size"]  # rows that found no slot yet
    row_sum: Float[Tensor, "act_size"]  # of all rows so far
    rows: int
    tokens_seen: int


class ActivationsStore:
    """Activations of a model's hook on the training text, in shuffled batches, and its held-out text for evaluation.

    The buffer holds num_batches_in_buffer batches of the model. Once half of it has been read, that half is refilled
    and the unread rows of old and new are shuffled together. Deterministic in cfg.seed; a store made with the `state`
    of another serves on where that one stood.
    """

    def __init__(self, model: "TransformerBridge", cfg: Config, state: dict[str, Any] | None = None) -> None:
        if cfg.act_size is None:
            raise ValueError("act_size = None: the width of the activations is unknown; give check_model(cfg)")
        self.model, self.cfg = model, cfg
        self.capacity = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
        self.batch_size = cfg.batch_size // ranks.count()
        device = cfg.torch_device
        self._check_memory()
        self._buffer = torch.empty(self.capacity, cfg.act_size, dtype=cfg.torch_dtype, device=device)
        self._rng = torch.Generator().manual_seed(cfg.seed)
        if state is None:
            # Slots in the order they are served; those before _served are free.
            self._order = torch.arange(self.capacity, device=device)
            self._served = self.capacity
            self._progress = _Progress(
                text=None,
                spill=self._buffer[:0],
                row_sum=torch.zeros(cfg.act_size, dtype=torch.float64, device=device),
                rows=0,
                tokens_seen=0,
            )
        else:
            self._order = state["order"].to(device)
            self._served = self.capacity - len(state["unread"])
            unread = self._order[self._served :].split(COPIED_ROWS)
            for slots, rows in zip(unread, state["unread"].split(COPIED_ROWS)):
                self._buffer[slots] = rows.to(device)
            self._rng.set_state(state["rng"])
            self._progress = _Progress(
                text=text.TextPosition.from_state(state["text"]),
                spill=state["spill"].to(device),
                row_sum=state["row_sum"].to(device),
                rows=state["rows"],
                tokens_seen=state["tokens_seen"],
            )
        stream = text.TextStream(
            cfg.dataset_path, cfg.dataset_name, model.tokenizer, cfg.seq_len, cfg.seed, self._progress.text
        )
        self._token_batches = _prefetch(stream, cfg.model_batch_size)

    def next_batch(self) -> Float[Tensor, "batch_size act_size"]:
        """The next cfg.batch_size rows, or this process's share of them, in the model's dtype, on its device.

        A copy: the caller may keep it. Where this raises, `state` is still what it was after the batch before.
        """
        if self._served > 0 and self._served + self.batch_size > self.capacity // 2:
            self._refill()
        slots = self._order[self._served : self._served + self.batch_size]
        self._served += self.batch_size
        return self._buffer[slots]

    def put_back(self) -> None:
        """The last batch is served again. Where processes share batches: this one read its share, another could not."""
        self._served -= self.batch_size

    @property
    def state(self) -> dict[str, Any]:
        """All that the next batches depend on, once a first one was served: CPU tensors, and what JSON can hold."""
        progress = self._progress
        assert progress.text is not None, "nothing read yet"
        unread = torch.empty(self.capacity - self._served, self.cfg.act_size, dtype=self._buffer.dtype)
        for rows, slots in zip(unread.split(COPIED_ROWS), self._order[self._served :].split(COPIED_ROWS)):
            rows.copy_(self._buffer[slots])
        return {
            "order": self._order.cpu(),
            "unread": unread,
            "rng": self._rng.get_state(),
            "text": progress.text.to_state(),
            "spill": progress.spill.cpu(),
            "row_sum": progress.row_sum.cpu(),
            "rows": progress.rows,
            "tokens_seen": progress.tokens_seen,
        }

    @property
    def mean(self) -> Float[Tensor, "act_size"]:
        """Mean of all training activations so far, of all processes that share batches: each must ask."""
        rows = torch.tensor(float(self._progress.rows), dtype=torch.float64, device=self._buffer.device)
        return (ranks.mean(self._progress.row_sum) / ranks.mean(rows)).to(torch.float32)

    @property
    def tokens_seen(self) -> int:
        """Tokens the language model has read for training, special ones included."""
        return self._progress.tokens_seen

    def held_out_tokens(self) -> Int[Tensor, "window pos"]:
        """cfg.eval_windows windows of the held-out text; see `held_out_windows`."""
        return held_out_windows(self.cfg, self.model.tokenizer, self.cfg.eval_windows, HELD_OUT_CHOICE)

    def _check_memory(self) -> None:
        """Refuse a buffer that does not fit, before the system kills the process for it."""
        cfg = self.cfg
        copies = 1 if cfg.torch_device.type == "cuda" else 2  # one more while its state is saved
        needed = copies * self.capacity * cfg.act_size * cfg.torch_dtype.itemsize
        free = _free_memory(cfg.torch_device)
        if needed > free:
            raise ValueError(
                f"num_batches_in_buffer = {cfg.num_batches_in_buffer}: the buffer (and, on a CPU, a copy to save it)"
                f" takes {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free; give at most"
                f" {cfg.num_batches_in_buffer * free // needed}, or lower model_batch_size = {cfg.model_batch_size}"
            )

    def _refill(self) -> None:
        """Write new rows into the slots already served, then shuffle all unread rows."""
        free = self._order[: self._served]
        filled = 0
        progress = self._progress
        while filled < len(free):
            if not len(progress.spill):
                progress = self._new_rows(progress)
            rows = progress.spill
            fits = min(len(rows), len(free) - filled)
            self._buffer[free[filled : filled + fits]] = rows[:fits]
            progress = replace(progress, spill=rows[fits:])
            filled += fits
        # Only now: had reading failed above, all would still be as it was.
        self._order = _send(torch.randperm(self.capacity, generator=self._rng), self._buffer.device)
        self._served, self._progress = 0, progress

    def _new_rows(self, progress: _Progress) -> _Progress:
        """The progress after one more batch of windows, whose activations at ordinary positions are in `spill`."""
        tokens, position = next(self._token_batches)
        kept = ordinary_positions(tokens, self.model.tokenizer).flatten().nonzero().squeeze(1)
        device = self._buffer.device
        try:
            acts = record(self.model, _send(tokens, device), self.cfg.hook_point).flatten(0, 1)
        except torch.OutOfMemoryError as error:
            size = self.cfg.model_batch_size
            raise ValueError(
                f"model_batch_size = {size}: out of memory on {device}; give {max(1, size // 2)}, or lower seq_len ="
                f" {self.cfg.seq_len} or num_batches_in_buffer = {self.cfg.num_batches_in_buffer}"
            ) from error
        rows = acts[_send(kept, device)]
        return _Progress(
            text=position,
            spill=rows,
            row_sum=progress.row_sum + rows.sum(dim=0, dtype=torch.float64),
            rows=progress.rows + len(rows),
            tokens_seen=progress.tokens_seen + tokens.numel(),
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, as far as the system tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // ranks.local_size()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _prefetch(stream: text.TextStream, windows: int) -> Iterator[tuple[Int[Tensor, "window pos"], text.TextPosition]]:
    """Batches of the stream, and its position after each, the next few being made in a thread (tokenizers release the
    GIL).
    """

    def batch() -> tuple[Tensor, text.TextPosition]:
        return stream.next_windows(windows), stream.position

    executor = ThreadPoolExecutor(1, thread_name_prefix="tokens")
    try:
        pending = deque(executor.submit(batch) for _ in range(PREFETCHED))
        while True:
            ready = pending.popleft().result()
            pending.append(executor.submit(batch))
            yield ready
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
