"""Rows of activations, at any number of hooks and aligned -> shuffled batches. The rows come from a language model that
reads the training text, or from tensors and files.

A store streams: it holds one buffer for each hook, refills the half that has been read, and serves every row once.
"""

import random
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from config import Config
from evaluation import HeldOut, HeldOutRows
from language_model import Model, ordinary_positions, record
from runtime import ranks
from runtime.checks import explained, require
from runtime.machine import check_buffer, send
from text import TextPosition, TextStream, held_out_windows

COPIED_ROWS = 1 << 16  # at a time from a GPU
PREFETCHED = 8  # batches of windows: documents are tokenised many at a time
BLOCK = 256  # rows of a file that are read at a time


@dataclass(frozen=True)
class BlockPosition:
    """Hold how many blocks of recorded rows this process has read, and in which epoch."""

    epoch: int = 0
    blocks: int = 0

    def to_state(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, int]) -> "BlockPosition":
        return cls(**state)


Position = TextPosition | BlockPosition


@dataclass(frozen=True)
class _Progress:
    """What a store has read."""

    position: Position | None  # None before the first read
    spill: dict[str, Tensor]  # by hook, [rows, act_size] that found no slot yet


class Store:
    """Serve the rows of a source at all hooks that some Configs read or write, in shuffled batches.

    A row is one token: its activations at every hook stand at the same place. The buffers hold num_batches_in_buffer
    batches of the model. Once half of them has been read, that half is refilled and the unread rows of old and new are
    shuffled together. Deterministic in cfg.text_seed; a store made with the `state` of another goes on from there.
    cfgs: of one stream (Config.stream), with their widths. Raises ValueError when the buffers do not fit into memory.
    """

    position_type: type[Position]

    def __init__(self, cfgs: Sequence[Config], state: dict[str, Any] | None) -> None:
        cfg = cfgs[0]
        assert all(c.stream == cfg.stream and all(c.widths.values()) for c in cfgs), "one stream, and known widths"
        self.cfg = cfg
        self.capacity = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
        self.batch_size = cfg.batch_size // ranks.count()
        self.hooks = {hook: width for c in cfgs for hook, width in c.widths.items()}
        self._device, dtype = cfg.torch_device, getattr(torch, cfg.dtype)
        check_buffer(cfg, self.capacity, sum(self.hooks.values()) * dtype.itemsize)
        make = dict(dtype=dtype, device=self._device)
        self._buffers = {hook: torch.empty(self.capacity, width, **make) for hook, width in self.hooks.items()}
        self._rng = torch.Generator().manual_seed(cfg.text_seed)
        if state is None:
            # Slots in the order they are served; those before _served are free.
            self._order = torch.arange(self.capacity, device=self._device)
            self._served = self.capacity
            self._progress = _Progress(None, {hook: buffer[:0] for hook, buffer in self._buffers.items()})
        else:
            self._load(state)

    def held_out(self) -> HeldOut | HeldOutRows:
        """Return what dictionaries are evaluated on, which is never served."""
        raise NotImplementedError

    def read(self, position: Position | None) -> tuple[Position, dict[str, Float[Tensor, "rows act_size"]]]:
        """Read the rows that follow a position (None: the first), by hook, and where the source stands after them."""
        raise NotImplementedError

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
        assert progress.position is not None, "nothing read yet"
        return vars(progress) | {
            "order": self._order.cpu(),
            "unread": {hook: self._unread(buffer) for hook, buffer in self._buffers.items()},
            "rng": self._rng.get_state(),
            "position": progress.position.to_state(),
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
        self._progress = _Progress(self.position_type.from_state(state["position"]), spill)

    def _refill(self) -> None:
        """Write new rows into the slots already served, then shuffle all unread rows."""
        free = self._order[: self._served]
        filled, progress = 0, self._progress
        while filled < len(free):
            if progress.position is None or not len(next(iter(progress.spill.values()))):
                progress = _Progress(*self.read(progress.position))
            slots = free[filled : filled + len(next(iter(progress.spill.values())))]
            for hook, rows in progress.spill.items():
                self._buffers[hook][slots] = rows[: len(slots)]
            progress = replace(progress, spill={hook: rows[len(slots) :] for hook, rows in progress.spill.items()})
            filled += len(slots)
        # Only now: had reading failed above, all would still be as it was.
        self._order = send(torch.randperm(self.capacity, generator=self._rng), self._device)
        self._served, self._progress = 0, progress


class ActivationsStore(Store):
    """Serve the activations of a language model on the training text, from where its dictionaries may read."""

    position_type = TextPosition

    def __init__(self, model: Model, cfgs: Sequence[Config], state: dict[str, Any] | None = None) -> None:
        super().__init__(cfgs, state)
        self.model = model
        self._stream = TextStream(self.cfg, model.tokenizer, self._progress.position)
        # The next windows are made in a thread, as tokenizers release the GIL; it ends with the store.
        self._ready, self._thread = deque[Future](), ThreadPoolExecutor(1, thread_name_prefix="tokens")
        weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    def held_out(self) -> HeldOut:
        return HeldOut(self.model, self.held_out_tokens())

    def held_out_tokens(self) -> Int[Tensor, "window pos"]:
        """Choose cfg.eval_windows windows of the held-out text; see `held_out_windows`."""
        return held_out_windows(self.cfg, self.model.tokenizer, self.cfg.eval_windows)

    def read(self, position: TextPosition | None) -> tuple[TextPosition, dict[str, Tensor]]:
        """Record the activations of one more batch of windows at ordinary positions. The text is read in order."""
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
        return position, {hook: acts[hook].flatten(0, 1)[kept] for hook in self._buffers}


def _read(stream: TextStream, windows: int) -> tuple[Int[Tensor, "window pos"], TextPosition]:
    """Read the next windows of a text, and where it stands after them."""
    return stream.next_windows(windows), stream.position


Rows = Tensor | np.ndarray  # [row, act_size]


class _Block(NamedTuple):
    """Some rows that are read together."""

    by_name: Mapping[str, Rows]
    rows: slice


class TensorStore(Store):
    """Serve activations that were recorded before: of any model, on any data.

    x: the rows [row, act_size] of the hook that the dictionaries read, as a tensor or a numpy array, which may be a
    memmap; or such rows for each hook, by its name; or a folder whose .safetensors files hold them, under the names of
    the hooks or as "x" and "y". y: the rows of the hook that transcoders write.
    They may come in any order: blocks of 256 rows are read in a random one, another in each epoch, and mixed in the
    buffer. Processes that share batches each read their own blocks.
    model: where it is given, the dictionaries are evaluated on text, as by an ActivationsStore; otherwise on the last
    tenth of the rows, which are never served.
    Raises: ValueError when the rows do not fit the Configs or each other, or a file cannot be read.
    """

    position_type = BlockPosition

    def __init__(
        self,
        x: Rows | Mapping[str, Rows] | str | Path,
        y: Rows | None = None,
        *,
        cfgs: Sequence[Config],
        model: Model | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(cfgs, state)
        self.model, self._epoch_order = model, (-1, [])
        if isinstance(x, str | Path):
            files = sorted(Path(x).glob("*.safetensors"))
            require(files, f"{x}: holds no .safetensors files; give a folder of them")
            parts = {str(file): _mapped(file) for file in files}
        else:
            parts = {"activations": x if isinstance(x, Mapping) else {"x": x} if y is None else {"x": x, "y": y}}
        blocks = []
        for said, by_name in parts.items():
            by_hook = self._by_hook(by_name, said)
            rows = len(next(iter(by_hook.values())))
            blocks += [_Block(by_hook, slice(start, min(start + BLOCK, rows))) for start in range(0, rows, BLOCK)]
        held_out = 0 if model else -(-len(blocks) // 10)
        self._blocks, self._held_out = blocks[: len(blocks) - held_out], blocks[len(blocks) - held_out :]
        few = f"{len(blocks)} blocks of up to {BLOCK} rows are too few; give more activations"
        require(len(self._blocks) >= ranks.count(), few)

    def _by_hook(self, by_name: Mapping[str, Rows], said: str) -> dict[str, Rows]:
        """Find the rows of each hook, and check that they fit."""
        found, lengths = {}, set()
        for hook, width in self.hooks.items():
            name = hook if hook in by_name else "x" if hook == self.cfg.reads[0] else "y"
            require(name in by_name, f"{said}: no {hook} in {', '.join(by_name)}; give the rows of each hook")
            found[hook] = by_name[name]
            shape = list(found[hook].shape)
            wrong = f"{said}: {name} = {found[hook].dtype} {shape}; give floating-point rows [row, {width}]"
            real = "float" in str(found[hook].dtype)
            require(real and len(shape) == 2 and shape[1] == width and shape[0], wrong)
            lengths.add(shape[0])
        require(len(lengths) == 1, f"{said}: {' and '.join(map(str, sorted(lengths)))} rows; give as many at each hook")
        return found

    def held_out(self) -> HeldOut | HeldOutRows:
        cfg, blocks = self.cfg, self._held_out
        if self.model is not None:
            return HeldOut(self.model, held_out_windows(cfg, self.model.tokenizer, cfg.eval_windows))
        most = max(1, cfg.eval_windows * (cfg.seq_len - 1) // BLOCK)
        read = [self._rows_of(block) for block in blocks[:: -(-len(blocks) // most)]]
        return HeldOutRows({hook: torch.cat([rows[hook] for rows in read]) for hook in self.hooks})

    def read(self, position: BlockPosition | None) -> tuple[BlockPosition, dict[str, Tensor]]:
        """Read the next block of this epoch's order."""
        at = position or BlockPosition()
        if at.blocks == len(self._order_in(at.epoch)):
            if at.epoch == 0:
                rows = sum(block.rows.stop - block.rows.start for block in self._blocks)
                tqdm.write(f"all {rows:,} rows read: starting over, reshuffled")
            at = BlockPosition(at.epoch + 1)
        block = self._blocks[self._order_in(at.epoch)[at.blocks]]
        return replace(at, blocks=at.blocks + 1), self._rows_of(block)

    def _order_in(self, epoch: int) -> list[int]:
        """List this process's blocks in the order of an epoch."""
        if self._epoch_order[0] != epoch:
            order = list(range(len(self._blocks)))
            random.Random(f"{self.cfg.text_seed} {epoch}").shuffle(order)
            self._epoch_order = epoch, order[ranks.rank() :: ranks.count()]
        return self._epoch_order[1]

    def _rows_of(self, block: _Block) -> dict[str, Tensor]:
        read = {hook: rows[block.rows] for hook, rows in block.by_name.items()}
        tensors = {hook: r if isinstance(r, Tensor) else torch.from_numpy(np.array(r)) for hook, r in read.items()}
        return {hook: t.to(self._device, self._buffers[hook].dtype) for hook, t in tensors.items()}


def _mapped(file: Path) -> dict[str, Tensor]:
    """Map a file of tensors into memory: what is not used is not read."""
    with explained(f"{file}: cannot be read", SafetensorError, OSError, remedy="give whole safetensors files"):
        return load_file(file)
