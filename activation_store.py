"""Windows of tokens -> hooked activations, any number of hooks, aligned rows -> shuffled batches.

The store streams: it holds one buffer for each hook, refills the half that has been read, and serves every row once.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from config import Config
from language_model import Model, ordinary_positions, record
from runtime import ranks
from runtime.checks import explained
from runtime.machine import check_buffer, send
from text import TextPosition, TextStream, held_out_windows

COPIED_ROWS = 1 << 16  # at a time from a GPU
PREFETCHED = 8  # batches of windows: documents are tokenised many at a time


@dataclass(frozen=True)
class _Progress:
    """What a store has read."""

    text: TextPosition | None  # None before the first batch of windows
    spill: dict[str, Tensor]  # by hook, [rows, act_size] that found no slot yet


class ActivationsStore:
    """Serve the activations at all hooks that some Configs read or write, on the training text, in shuffled batches.

    A row is one token: its activations at every hook stand at the same place. The buffers hold num_batches_in_buffer
    batches of the model. Once half of them has been read, that half is refilled and the unread rows of old and new are
    shuffled together. Deterministic in cfg.text_seed; a store made with the `state` of another goes on from there.
    cfgs: of one stream (Config.stream), with their widths. Raises ValueError when the buffers do not fit into memory.
    """

    def __init__(self, model: Model, cfgs: Sequence[Config], state: dict[str, Any] | None = None) -> None:
        cfg = cfgs[0]
        assert all(c.stream == cfg.stream and all(c.widths.values()) for c in cfgs), "one stream, and known widths"
        self.model, self.cfg = model, cfg
        self.capacity = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
        self.batch_size = cfg.batch_size // ranks.count()
        widths = {hook: width for c in cfgs for hook, width in c.widths.items()}
        self._device, dtype = cfg.torch_device, getattr(torch, cfg.dtype)
        check_buffer(cfg, self.capacity, sum(widths.values()) * dtype.itemsize)
        make = dict(dtype=dtype, device=self._device)
        self.hooks = tuple(widths)
        self._buffers = {hook: torch.empty(self.capacity, width, **make) for hook, width in widths.items()}
        self._rng = torch.Generator().manual_seed(cfg.text_seed)
        if state is None:
            # Slots in the order they are served; those before _served are free.
            self._order = torch.arange(self.capacity, device=self._device)
            self._served = self.capacity
            self._progress = _Progress(None, {hook: buffer[:0] for hook, buffer in self._buffers.items()})
        else:
            self._load(state)
        self._stream, self._ready = TextStream(cfg, model.tokenizer, self._progress.text), deque[Future]()
        # The next windows are made in a thread, as tokenizers release the GIL; it ends with the store.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    def next_batch(self) -> dict[str, Float[Tensor, "batch_size act_size"]]:
        """Serve the next cfg.batch_size rows, or this process's share of them, by hook, in the model's dtype.

        Copies: the caller may keep them. Where this raises, `state` is still what it was after the batch before.
        """
        if self._served > 0 and self._served + self.batch_size > self.capacity // 2:
            self._refill()
        slots = self._order[self._served : self._served + self.batch_size]
        self._served += self.batch_size
        return {hook: buffer[slots] for hook, buffer in self._buffers.items()}

    def put_back(self) -> None:
        """Serve the last batch again: not everything was trained on it."""
        self._served -= self.batch_size

    @property
    def state(self) -> dict[str, Any]:
        """All that the next batches depend on, once a first one was served: CPU tensors, and what JSON can hold."""
        progress = self._progress
        assert progress.text is not None, "nothing read yet"
        return vars(progress) | {
            "order": self._order.cpu(),
            "unread": {hook: self._unread(buffer) for hook, buffer in self._buffers.items()},
            "rng": self._rng.get_state(),
            "text": progress.text.to_state(),
            "spill": {hook: rows.cpu() for hook, rows in progress.spill.items()},
        }

    def _unread(self, buffer: Float[Tensor, "capacity act_size"]) -> Float[Tensor, "rows act_size"]:
        unread = torch.empty(self.capacity - self._served, buffer.shape[1], dtype=buffer.dtype)
        for rows, slots in zip(unread.split(COPIED_ROWS), self._order[self._served :].split(COPIED_ROWS)):
            rows.copy_(buffer[slots])
        return unread

    def _load(self, state: dict[str, Any]) -> None:
        self._order = state["order"].to(self._device)
        self._rng.set_state(state["rng"])
        for hook, unread in state["unread"].items():
            self._served = self.capacity - len(unread)
            slots = self._order[self._served :].split(COPIED_ROWS)
            for some, rows in zip(slots, unread.split(COPIED_ROWS)):
                self._buffers[hook][some] = rows.to(self._device)
        spill = {hook: rows.to(self._device) for hook, rows in state["spill"].items()}
        self._progress = _Progress(TextPosition.from_state(state["text"]), spill)

    def held_out_tokens(self) -> Int[Tensor, "window pos"]:
        """Choose cfg.eval_windows windows of the held-out text; see `held_out_windows`."""
        return held_out_windows(self.cfg, self.model.tokenizer, self.cfg.eval_windows)

    def _refill(self) -> None:
        """Write new rows into the slots already served, then shuffle all unread rows."""
        free = self._order[: self._served]
        filled, progress = 0, self._progress
        while filled < len(free):
            if progress.text is None or not len(next(iter(progress.spill.values()))):
                progress = self._new_rows()
            slots = free[filled : filled + len(next(iter(progress.spill.values())))]
            for hook, rows in progress.spill.items():
                self._buffers[hook][slots] = rows[: len(slots)]
            progress = replace(progress, spill={hook: rows[len(slots) :] for hook, rows in progress.spill.items()})
            filled += len(slots)
        # Only now: had reading failed above, all would still be as it was.
        self._order = send(torch.randperm(self.capacity, generator=self._rng), self._device)
        self._served, self._progress = 0, progress

    def _new_rows(self) -> _Progress:
        """Read one more batch of windows: its activations at ordinary positions are the new spill."""
        while len(self._ready) <= PREFETCHED:
            self._ready.append(self._thread.submit(_read, self._stream, self.cfg.model_batch_size))
        tokens, position = self._ready.popleft().result()
        kept = ordinary_positions(tokens, self.model.tokenizer).flatten().nonzero().squeeze(1)
        size, buffer = self.cfg.model_batch_size, self.cfg.num_batches_in_buffer
        lower = f"give {max(1, size // 2)}, or lower seq_len = {self.cfg.seq_len} or num_batches_in_buffer = {buffer}"
        problem = f"model_batch_size = {size}: out of memory on {self._device}"
        with explained(problem, torch.OutOfMemoryError, remedy=lower):
            acts = record(self.model, send(tokens, self._device), list(self._buffers))
        kept = send(kept, self._device)
        return _Progress(position, {hook: acts[hook].flatten(0, 1)[kept] for hook in self._buffers})


def _read(stream: TextStream, windows: int) -> tuple[Int[Tensor, "window pos"], TextPosition]:
    """Read the next windows of a text, and where it stands after them."""
    return stream.next_windows(windows), stream.position
