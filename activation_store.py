"""Rows of activations, at any number of hooks and aligned -> shuffled batches. The rows come from a language model that
reads the training text, or from tensors and files.

A store streams: it holds one buffer for each hook, refills the half that has been read, and serves every row once.
"""

import random
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from config import Config, widths_of
from evaluation import HeldOut, HeldOutRows
from language_model import Model, ordinary_positions, record
from runtime import ranks
from runtime.checks import explained, parse_json, require
from runtime.machine import Clock, check_buffer, send
from text import TextPosition, TextStream, held_out_windows

COPIED_ROWS = 1 << 16  # at a time from a GPU
PREFETCHED = 8  # batches of windows: documents are tokenised many at a time
BLOCK = 256  # rows of a file that are read at a time
FLOATS = ("float16", "bfloat16", "float32", "float64")
MANIFEST = "manifest.json"  # of a folder that cache.py wrote


@dataclass(frozen=True)
class BlockPosition:
    """Hold how many blocks of recorded rows this process has read, in all epochs, and how many rows there are."""

    blocks: int
    rows: int

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
    cfgs: of one stream (Config.stream), with their widths. Raises ValueError when they are not, or when the buffers do
    not fit into memory.
    """

    position_type: type[Position]

    def __init__(self, model: Model | None, cfgs: Sequence[Config], state: dict[str, Any] | None) -> None:
        require(len({cfg.stream for cfg in cfgs}) == 1, "cfgs: give one or several, alike in model, text and batches")
        require(all(all(cfg.widths.values()) for cfg in cfgs), "act_size = None: give the width at each hook")
        self.model, self.cfg = model, (cfg := cfgs[0])
        self.capacity = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
        self.batch_size = cfg.batch_size // ranks.count()
        self.hooks = widths_of(cfgs)
        self._device, dtype = cfg.torch_device, getattr(torch, cfg.dtype)
        check_buffer(cfg, self.capacity, sum(self.hooks.values()) * dtype.itemsize)
        make = dict(dtype=dtype, device=self._device)
        self._buffers = {hook: torch.empty(self.capacity, width, **make) for hook, width in self.hooks.items()}
        self.clock = Clock(self._device)  # of reading
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
        return HeldOut(self.model, self.held_out_tokens())

    def held_out_tokens(self) -> Int[Tensor, "window pos"]:
        """Choose cfg.eval_windows windows of the held-out text; see `held_out_windows`."""
        return held_out_windows(self.cfg, self.model.tokenizer, self.cfg.eval_windows)

    def is_at_an_end(self, position: Position | None) -> bool:
        """Say whether an epoch ends here: what has been read is then served before the next one begins."""
        return False

    def read(self, position: Position | None) -> tuple[Position, dict[str, Float[Tensor, "rows act_size"]]]:
        """Read the rows that follow a position (None: the first), by hook, and where the source stands after them."""
        raise NotImplementedError

    def next_batch(self) -> dict[str, Float[Tensor, "batch_size act_size"]]:
        """Serve the next cfg.batch_size rows, or this process's share of them, by hook, in the model's dtype.

        Copies: the caller may keep them. Where this raises, `state` is still what it was after the batch before.
        """
        if self._served > 0 and self._served + self.batch_size > self.capacity // 2:
            with self.clock.running():
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
        free, unread = self._order[: self._served], self._order[self._served :]
        filled, progress = 0, self._progress
        while filled < len(free):
            if progress.position is None or not len(next(iter(progress.spill.values()))):
                if len(unread) + filled >= self.batch_size and self.is_at_an_end(progress.position):
                    break
                progress = _Progress(*self.read(progress.position))
            slots = free[filled : filled + len(next(iter(progress.spill.values())))]
            for hook, rows in progress.spill.items():
                self._buffers[hook][slots] = rows[: len(slots)]
            progress = replace(progress, spill={hook: rows[len(slots) :] for hook, rows in progress.spill.items()})
            filled += len(slots)
        # Only now: had reading failed above, all would still be as it was.
        self._served, self._progress = len(free) - filled, progress
        order = send(torch.randperm(self.capacity - self._served, generator=self._rng), self._device)
        if self._served:
            order = torch.cat([free[filled:], torch.cat([free[:filled], unread])[order]])
        self._order = order


class ActivationsStore(Store):
    """Serve the activations of a language model on the training text, from where its dictionaries may read."""

    position_type = TextPosition

    def __init__(self, model: Model, cfgs: Sequence[Config], state: dict[str, Any] | None = None) -> None:
        super().__init__(model, cfgs, state)
        self._stream = TextStream(self.cfg, model.tokenizer, self._progress.position)
        # The next windows are made in a thread, as tokenizers release the GIL; it ends with the store.
        self._ready, self._thread = deque[Future](), ThreadPoolExecutor(1, thread_name_prefix="tokens")
        weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

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


class TensorStore(Store):
    """Serve activations that were recorded before: of any model, on any data.

    x: the rows [row, act_size] of the hook that the dictionaries read, as a tensor or a numpy array, which may be a
    memmap; or such rows for each hook, by its name; or a folder whose .safetensors files hold them, under the names of
    the hooks or as "x" and "y". y: the rows of the hook that transcoders write.
    They may come in any order: blocks of 256 rows are read in a random one, another in each epoch, and mixed in the
    buffer of num_batches_in_buffer * model_batch_size * (seq_len - 1) rows. An epoch serves each row once. Processes
    that share batches each read their own blocks.
    model: where it is given, the dictionaries are evaluated on text, as by an ActivationsStore; otherwise on the last
    tenth of the rows, which are never served: on eval_windows * (seq_len - 1) of them at most.
    Raises: ValueError when the rows do not fit the Configs, each other or the state, or a file cannot be read.
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
        super().__init__(model, cfgs, state)
        (reads, writes), *others = {(cfg.reads, cfg.writes) for cfg in cfgs}
        self._named = {} if others or len(reads) > 1 else {writes[0]: "y", reads[0]: "x"}
        require(y is None or isinstance(x, Rows), "y: x holds the rows of each hook by its name; leave y out")
        unread = "y: these Configs write what they read; give them a target_site, such as mlp_out, and target_size"
        require(y is None or "y" in self._named.values(), unread)
        if isinstance(x, str | Path):
            parts = _files(Path(x))
        else:
            parts = {"activations": x if isinstance(x, Mapping) else {"x": x} if y is None else {"x": x, "y": y}}
        self._parts = [self._by_hook(by_name, said) for said, by_name in parts.items()]
        rows = [len(next(iter(part.values()))) for part in self._parts]
        self._first = list(accumulate((-(-count // BLOCK) for count in rows), initial=0))  # block of each part
        self._trained = self._first[-1] - (0 if model else -(-self._first[-1] // 10))
        few = f"activations: {sum(rows)} rows are too few; give {BLOCK} for each process, and more to hold out"
        require(self._trained >= ranks.count(), few)
        self._rows, self._own = sum(rows), len(range(ranks.rank(), self._trained, ranks.count()))
        self._order_of: tuple[int, list[int]] = (-1, [])
        if at := self._progress.position:
            same = f"activations: {self._rows} rows, and {at.rows} when training began; give those of then"
            require(at.rows == self._rows, same)

    def _by_hook(self, by_name: Mapping[str, Rows], said: str) -> dict[str, Rows]:
        """Find the rows of each hook, and check that they fit."""
        found, lengths = {}, set()
        for hook, width in self.hooks.items():
            name = hook if hook in by_name else self._named.get(hook)
            require(
                name in by_name, f"{said}: no {hook} in {', '.join(by_name)}; give the rows of each hook by its name"
            )
            rows = found[hook] = by_name[name]
            fits = isinstance(rows, Rows) and str(rows.dtype).removeprefix("torch.") in FLOATS
            fits = fits and len(rows) and list(rows.shape[1:]) == [width]
            is_now = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Rows) else type(rows).__name__
            require(fits, f"{said}: {name} = {is_now}; give rows [row, {width}], of {', '.join(FLOATS)}")
            lengths.add(len(rows))
        require(len(lengths) == 1, f"{said}: {' and '.join(map(str, sorted(lengths)))} rows; give as many at each hook")
        return found

    def held_out(self) -> HeldOut | HeldOutRows:
        if self.model is not None:
            return super().held_out()
        most = max(1, self.cfg.eval_windows * (self.cfg.seq_len - 1) // BLOCK)
        blocks = range(self._trained, self._first[-1])
        read = [self._block(number) for number in blocks[:: -(-len(blocks) // most)]]
        held_out = {hook: torch.cat([rows[hook] for rows in read]) for hook in self.hooks}
        for hook, rows in held_out.items():
            finite = f"activations: held-out rows at {hook} have numbers that are not finite; leave such rows out"
            require(torch.stack(rows.aminmax()).isfinite().all(), finite)
        return HeldOutRows(held_out)

    def is_at_an_end(self, position: BlockPosition | None) -> bool:
        return position is not None and position.blocks % self._own == 0

    def read(self, position: BlockPosition | None) -> tuple[BlockPosition, dict[str, Tensor]]:
        """Read the next block in the order of this epoch."""
        blocks = position.blocks if position else 0
        epoch, place = divmod(blocks, self._own)
        if (epoch, place) == (1, 0):
            tqdm.write("all rows to train on have been read: starting over, reshuffled")
        if self._order_of[0] != epoch:
            order = list(range(self._trained))
            random.Random(f"{self.cfg.text_seed} {epoch}").shuffle(order)
            self._order_of = epoch, order[ranks.rank() :: ranks.count()]
        return BlockPosition(blocks + 1, self._rows), self._block(self._order_of[1][place])

    def _block(self, number: int) -> dict[str, Tensor]:
        """Read the rows of a block at each hook."""
        part = bisect_right(self._first, number) - 1
        start = (number - self._first[part]) * BLOCK
        read = {hook: rows[start : start + BLOCK] for hook, rows in self._parts[part].items()}
        tensors = {
            hook: r.detach() if isinstance(r, Tensor) else torch.from_numpy(np.array(r)) for hook, r in read.items()
        }
        return {hook: t.to(self._device, self._buffers[hook].dtype) for hook, t in tensors.items()}


def _files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Map files of tensors into memory: what is not used is not read. Those of a manifest are whole, and no others."""
    manifest = folder / MANIFEST
    if manifest.exists():
        rows = parse_json(manifest.read_bytes(), str(manifest))["files"]
    else:
        rows = {file.name: None for file in sorted(folder.glob("*.safetensors"))}
    require(rows, f"{folder}: holds no .safetensors files; give a folder of them")
    found = {}
    for name, count in rows.items():
        with explained(
            f"{folder / name}: cannot be read", SafetensorError, OSError, remedy="give whole safetensors files"
        ):
            found[str(folder / name)] = tensors = load_file(folder / name)
        whole = count is None or all(len(tensor) == count for tensor in tensors.values())
        require(whole, f"{folder / name}: not {count} rows, as {MANIFEST} says; copy the whole folder")
    return found
