"""Turn documents (runtime/documents.py) into packed windows of tokens: all that comes before the language model."""

import copy
import random
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from config import Config
from runtime import ranks
from runtime.checks import explained, require
from runtime.documents import load_documents, local_files

TOKENISED_DOCUMENTS = 64  # at a time
MIXED_TOKENS = 1 << 21  # tokens of the windows that wait to be mixed: fewer are of too few documents
READ_ATTEMPTS = 5
HELD_OUT_CHOICE = 32  # times as many windows as are drawn


def token_windows(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[Int[Tensor, "seq_len"]]:
    """Pack documents into windows of `seq_len` tokens: each window starts with BOS, each document ends with EOS.

    No token is lost except at the very end, where a rest shorter than a window is dropped.
    Raises: ValueError when a row is neither a string nor a list of ids of the tokenizer's vocabulary.
    """
    pending, documents = [], iter(documents)
    while some := list(islice(documents, TOKENISED_DOCUMENTS)):
        yield from _pack(some, tokenizer, seq_len, pending)


def _pack(
    documents: list[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int, pending: list[int]
) -> Int[Tensor, "window seq_len"]:
    """Append the documents' tokens to those pending, then take all full windows from the front of them."""
    bos, eos, vocab_size = tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)
    bos = eos if bos is None else bos  # GPT-NeoX, Qwen
    remedy = f"is outside the vocabulary of {vocab_size} of {tokenizer.name_or_path!r}; tokenise it for this model"
    for tokens in _tokenised(documents, tokenizer):
        low, high = min(tokens, default=0), max(tokens, default=0)
        require(low >= 0 and high < vocab_size, f"token {low if low < 0 else high} {remedy}")
        pending.extend(tokens)
        if eos is not None:
            pending.append(eos)
    full = len(pending) // (seq_len - 1) * (seq_len - 1)
    windows = torch.tensor(pending[:full], dtype=torch.int64).view(-1, seq_len - 1)
    del pending[:full]
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def _tokenised(documents: list[dict], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    if "tokens" in documents[0]:
        rows = [document["tokens"] for document in documents]
        for row in rows:
            kinds = set(map(type, row)) if isinstance(row, Iterable) else {type(row), None}
            are_ids = None not in kinds and all(issubclass(kind, Integral) and kind is not bool for kind in kinds)
            require(are_ids, f"tokens are {reprlib.repr(row)}; the column must hold lists of ids")
        return rows
    texts = [document["text"] for document in documents]
    for text in texts:
        require(isinstance(text, str), f"a text is {reprlib.repr(text)}; the column must hold strings")
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def held_out_windows(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, count: int, choice: int = HELD_OUT_CHOICE
) -> Int[Tensor, "window pos"]:
    """Sample `count` held-out windows, the same at every call, or fewer if the text is too short.

    They are drawn from the first `choice` times as many, since one long document can be many windows in a row.
    Raises: ValueError when the held-out text does not fill one window, or cannot be read.
    """
    stream = load_documents(cfg.dataset_path, cfg.dataset_name, cfg.text_column, held_out=True)
    first = list(islice(token_windows(stream, tokenizer, cfg.seq_len), choice * count))
    said = f"dataset_path = {cfg.dataset_path!r}: its held-out tenth"
    require(first, f"{said} does not fill a window of seq_len {cfg.seq_len}; give more text")
    return torch.stack(random.Random(0).sample(first, min(count, len(first))))


@dataclass
class TextPosition:
    """Hold all that the next windows of a TextStream depend on."""

    epoch: int
    rng: random.Random
    documents: dict[str, Any] | None = None  # the data set's own state, ready for JSON; None before the first read
    pending: list[int] = field(default_factory=list)  # tokens, fewer than a window of them
    packed: deque[Int[Tensor, "seq_len"]] = field(default_factory=deque)  # windows that are not in the pool yet
    pool: list[Int[Tensor, "seq_len"]] = field(default_factory=list)
    all_read: bool = False
    windows: int = 0  # packed in this epoch

    def copy(self) -> "TextPosition":
        """Copy each field, but not the windows themselves, which nothing changes."""
        return TextPosition(**{name: copy.copy(value) for name, value in vars(self).items()})

    def to_state(self) -> dict[str, Any]:
        """Return the fields as tensors and values that JSON can hold."""
        return vars(self) | {
            "rng": torch.tensor(self.rng.getstate()[1]),
            "pending": torch.tensor(self.pending, dtype=torch.int32),
            "packed": torch.stack(list(self.packed)).int() if self.packed else torch.empty(0, 0),
            "pool": torch.stack(self.pool).int() if self.pool else torch.empty(0, 0),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TextPosition":
        rng = random.Random(0)
        version, _, gauss = rng.getstate()
        rng.setstate((version, tuple(state["rng"].tolist()), gauss))
        packed, pool = deque(state["packed"].long()), list(state["pool"].long())
        return cls(**(state | {"rng": rng, "pending": state["pending"].tolist(), "packed": packed, "pool": pool}))


class TextStream:
    """The training text as windows of tokens, epoch after epoch, each epoch in another order.

    Every window waits in a pool for a random time, as a long document is many windows in a row. Processes that share
    batches each read their own part of the text. A stream made with another's `position` continues it exactly.
    """

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase, position: TextPosition | None = None) -> None:
        self._cfg, self._tokenizer, self._said = cfg, tokenizer, f"dataset_path = {cfg.dataset_path!r}:"
        documents = load_documents(
            cfg.dataset_path, cfg.dataset_name, cfg.text_column, held_out=False, seed=cfg.text_seed
        )
        strategy = "examples" if local_files(cfg.dataset_path) else "auto"  # a share of a few files could be very small
        self._documents = split_dataset_by_node(documents, ranks.rank(), ranks.count(), strategy)
        self._pool_size = max(1, MIXED_TOKENS // cfg.seq_len)
        self._begin(0 if position is None else position.epoch)
        if position is not None:
            self._at = position.copy()

    @property
    def position(self) -> TextPosition:
        """A copy of where the stream stands now, which reading on does not change."""
        return self._at.copy()

    def next_windows(self, count: int) -> Int[Tensor, "count seq_len"]:
        """Return the next windows.

        Raises: ValueError when the text cannot be used, OSError when it cannot be read, even after several attempts.
        """
        return torch.stack([self._next() for _ in range(count)])

    def _begin(self, epoch: int) -> None:
        self._documents.set_epoch(epoch)
        self._unread: Iterator[dict] | None = None  # to be started from the position
        self._at = TextPosition(epoch, random.Random(f"{self._cfg.text_seed} {epoch}"))

    def _next(self) -> Int[Tensor, "seq_len"]:
        while True:
            at = self._at
            if at.packed:
                window = at.packed.popleft()
                if len(at.pool) == self._pool_size:
                    place = at.rng.randrange(self._pool_size)
                    window, at.pool[place] = at.pool[place], window
                    return window
                at.pool.append(window)
            elif not at.all_read:
                self._read()
            elif at.pool:
                return at.pool.pop()
            else:
                if at.epoch == 0:
                    tokens = f"{at.windows * self._cfg.seq_len:,} training tokens of {self._cfg.dataset_path}"
                    tqdm.write(f"all {tokens} read: starting over, reshuffled")
                self._begin(at.epoch + 1)

    def _read(self) -> None:
        """Pack a few more documents; at the end of the text, shuffle the pool for good."""
        at = self._at
        if documents := self._read_documents():
            with explained(f"{self._said} cannot be used", ValueError, remedy="give other data"):
                windows = _pack(documents, self._tokenizer, self._cfg.seq_len, at.pending)
            at.packed.extend(windows)
            at.windows += len(windows)
            return
        share = f", share {ranks.rank() + 1} of {ranks.count()}" if ranks.count() > 1 else ""
        problem = f"its training text{share} does not fill a window of seq_len {self._cfg.seq_len}"
        require(at.windows, f"{self._said} {problem}; give more text")
        at.rng.shuffle(at.pool)
        at.all_read = True

    @retry(
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and "shutdown" not in str(error)),  # at exit
        wait=wait_exponential(multiplier=0.5),
        stop=stop_after_attempt(READ_ATTEMPTS),
        reraise=True,
    )
    def _read_documents(self) -> list[dict]:
        """Read the next few documents; if reading fails, start again from the last position."""
        unread, self._unread = self._unread, None
        problem, remedy = f"{self._said} reading failed {READ_ATTEMPTS} times", "check the files or the network"
        with explained(problem, Exception, remedy=remedy, raised=OSError):  # whatever the library that reads raises
            if unread is None:
                if self._at.documents is not None:
                    self._documents.load_state_dict(self._at.documents)
                unread = iter(self._documents)
            documents = list(islice(unread, TOKENISED_DOCUMENTS))
            self._at.documents = self._documents.state_dict()
        self._unread = unread
        return documents
