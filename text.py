"""Text in, packed token windows out: everything before the language model.

A data set is a Hub name or local files, read by `datasets` streaming. Its rows are documents: text, or
tokens already. One document in ten is held out for evaluation, by a hash that no seed or machine changes.
"""

import glob
import hashlib
import logging
import os
import random
import reprlib
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import ranks
from errors import one_line

if TYPE_CHECKING:  # slow to import, and a wrong path is answered at once
    from datasets import IterableDataset

STDLIB = "python-stdlib"
TEXT_COLUMNS = ("text", "content")
TOKEN_COLUMNS = ("tokens", "input_ids")
LOCAL_SUFFIXES = (".py", ".txt", ".jsonl", ".parquet")
LINES_PER_DOCUMENT = 128  # of a .txt file, which may be one huge corpus
TOKENISED_DOCUMENTS = 64  # at a time
MIXED_TOKENS = 1 << 19  # tokens of windows that wait to be mixed
READ_ATTEMPTS = 5
HEAD = 8192  # bytes of a file that show whether it is binary

# It warns that a shuffle buffer is not in a data set's state. Ours holds one document, and is empty between two.
logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)


def is_held_out(key: str) -> bool:
    """Whether the document with this key (its path or its content) is one of the tenth kept for evaluation."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % 10 == 0


def local_files(dataset_path: str) -> list[Path]:
    """The local files, sorted, that `dataset_path` names as a file, a folder or a glob; empty when it is a Hub name.

    Raises ValueError when a path or glob is meant but matches nothing, files of several kinds, only empty files, or
    files that may not be read or are not of the kind that their names say.
    """
    if dataset_path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    path = Path(dataset_path).expanduser()
    pattern = glob.escape(str(path)) if path.exists() else str(path)
    if path.is_dir():
        pattern += "/**/*"
    files = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    if path.is_dir():
        files = [p for p in files if p.suffix in LOCAL_SUFFIXES]
    allowed = ", ".join(LOCAL_SUFFIXES)
    meant_locally = path.suffix in LOCAL_SUFFIXES or glob.has_magic(dataset_path) or path.is_absolute()
    if not files and (meant_locally or path.exists() or dataset_path.startswith(".")):
        missing = f"no file of {allowed} in that folder" if path.is_dir() else "no such file"
        raise ValueError(f"dataset_path {dataset_path!r}: {missing}; check the path or the glob")
    suffixes = sorted({p.suffix for p in files})
    if len(suffixes) > 1 or not set(suffixes) <= set(LOCAL_SUFFIXES):
        found = ", ".join(suffix or "a name without a suffix" for suffix in suffixes)
        raise ValueError(f"dataset_path {dataset_path!r}: found {found}; give files of one of {allowed}")
    if files and not any(p.stat().st_size for p in files):
        raise ValueError(f"dataset_path {dataset_path!r}: every file is empty; give files with text or tokens")
    for file in files:
        if not os.access(file, os.R_OK):
            raise ValueError(f"dataset_path {dataset_path!r}: you may not read {file}; change its permissions")
        with file.open("rb") as content:
            head = content.read(HEAD)
        if file.suffix == ".parquet" and not head.startswith(b"PAR1"):
            raise ValueError(
                f"dataset_path {dataset_path!r}: {file} is not parquet; give the file whole or leave it out"
            )
        if file.suffix != ".parquet" and b"\0" in head:
            raise ValueError(f"dataset_path {dataset_path!r}: {file} is binary, it has NUL bytes; give text in UTF-8")
    return files


def load_documents(
    dataset_path: str, dataset_name: str | None = None, *, held_out: bool, seed: int = 0
) -> "IterableDataset":
    """Stream `documents`, the order of the files shuffled by `seed` and the epoch."""
    return documents(dataset_path, dataset_name, held_out=held_out).shuffle(seed=seed, buffer_size=1)


def documents(dataset_path: str, dataset_name: str | None = None, *, held_out: bool) -> "IterableDataset":
    """Stream the training or the held-out documents of a data set in their order.

    Source files (.py) are documents, held out by their path relative to the folder they share; every other
    row (128 lines of a .txt file, a row of .jsonl, .parquet or the Hub) is held out by its content.

    Returns: a data set with one column, "text" (str) or "tokens" (list of int).
    Raises: ValueError when there is no such file, it cannot be read, or it has no column of text or tokens.
    """
    files = local_files(dataset_path)
    from datasets import IterableDataset

    suffix = files[0].suffix if files else None
    if suffix == ".py":
        root = Path(sysconfig.get_paths()["stdlib"]) if dataset_path == STDLIB else _common_folder(files)
        kept = [str(p) for p in files if is_held_out(p.relative_to(root).as_posix()) == held_out]
        if not kept:
            split = "held-out" if held_out else "training"
            raise ValueError(
                f"dataset_path {dataset_path!r}: {len(files)} files leave none for the {split} part; add files"
            )
        return IterableDataset.from_generator(_file_documents, gen_kwargs={"files": kept})

    if suffix == ".txt":
        dataset = IterableDataset.from_generator(_file_documents, gen_kwargs={"files": [str(p) for p in files]})
        column = "text"
    else:
        try:
            if suffix == ".jsonl":
                dataset = _load("json", files)
            elif suffix == ".parquet":
                dataset = _load("parquet", files)
            else:
                dataset = _load(dataset_path, name=dataset_name)
            columns = dataset.column_names or list(next(iter(dataset), {}))
        except OSError as error:
            problem = f"cannot be reached ({one_line(error)}); give other data, or try again"
            raise OSError(f"dataset_path {dataset_path!r}: {problem}") from None
        except ValueError as error:  # of pyarrow and the JSON decoder too
            raise ValueError(f"dataset_path {dataset_path!r}: cannot be read ({error}); give other data") from None
        found = [c for c in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if c in columns]
        if not found:
            expected = ", ".join((*TEXT_COLUMNS, *TOKEN_COLUMNS))
            raise ValueError(
                f"dataset_path {dataset_path!r}: no column of text or tokens among {', '.join(columns) or 'none'};"
                f" name one of them {expected}"
            )
        column = found[0]
        dataset = dataset.select_columns([column])
        kind = "tokens" if column in TOKEN_COLUMNS else "text"
        if column != kind:
            dataset = dataset.rename_column(column, kind)
        column = kind
    return dataset.filter(lambda row: row[column] is not None and is_held_out(str(row[column])) == held_out)


def _load(builder: str, files: list[Path] | None = None, **options: object) -> "IterableDataset":
    import datasets

    data_files = None
    if files is not None:
        data_files = [glob.escape(str(p)) for p in files]  # `datasets` takes file names for globs
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # it raises what it logs
    return datasets.load_dataset(builder, data_files=data_files, split="train", streaming=True, **options)


def _common_folder(files: list[Path]) -> Path:
    return Path(os.path.commonpath([p.parent for p in files]))


def _file_documents(files: list[str]) -> Iterator[dict[str, str]]:
    """A .py file is a document, and so are 128 lines of a .txt file: of one file, whatever the order of the files."""
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as lines:
            if file.endswith(".py"):
                yield {"text": lines.read()}
            else:
                while document := "".join(islice(lines, LINES_PER_DOCUMENT)):
                    yield {"text": document}


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token every window starts with: the tokenizer's BOS, or its EOS where it has no BOS (GPT-NeoX, Qwen)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r} has neither a BOS nor an EOS token; choose another model_name"
    )


class _Packer:
    """Packs documents into windows: each starts with BOS, each document ends with EOS, no token is lost."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.bos = bos_token_id(tokenizer)
        self.pending: list[int] = []  # fewer than a window of them

    def pack(self, documents: list[dict]) -> Int[Tensor, "window seq_len"]:
        """The windows that these documents complete.

        Raises ValueError when a row is neither a string nor a list of ids of the tokenizer's vocabulary.
        """
        eos, vocab_size = self.tokenizer.eos_token_id, len(self.tokenizer)
        for tokens in _tokenised(documents, self.tokenizer):
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise ValueError(
                    f"token {max(tokens) if min(tokens) >= 0 else min(tokens)} is outside the vocabulary of"
                    f" {vocab_size} of {self.tokenizer.name_or_path!r}; the data set was tokenised for another model"
                )
            self.pending.extend(tokens)
            if eos is not None:
                self.pending.append(eos)
        full = len(self.pending) // (self.seq_len - 1) * (self.seq_len - 1)
        windows = torch.tensor(self.pending[:full], dtype=torch.int64).view(-1, self.seq_len - 1)
        del self.pending[:full]
        return torch.cat([windows.new_full((len(windows), 1), self.bos), windows], dim=1)


def token_windows(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[Int[Tensor, "seq_len"]]:
    """Pack documents into windows of `seq_len` tokens, each starting with BOS, documents ended by EOS.

    No token is lost but the rest, shorter than a window, at the end of the last document.
    Raises ValueError when a row is neither a string nor a list of ids of the tokenizer's vocabulary.
    """
    packer, documents = _Packer(tokenizer, seq_len), iter(documents)
    while some := list(islice(documents, TOKENISED_DOCUMENTS)):
        yield from packer.pack(some)


def _tokenised(documents: list[dict], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    if "tokens" in documents[0]:
        for tokens in (document["tokens"] for document in documents):
            if not isinstance(tokens, Iterable) or not all(
                issubclass(kind, Integral) and kind is not bool for kind in set(map(type, tokens))
            ):
                raise ValueError(f"tokens are {reprlib.repr(tokens)}; the column must hold lists of ids")
            yield tokens
        return
    texts = [document["text"] for document in documents]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a text is {reprlib.repr(text)}; the column must hold strings")
    yield from tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class TextPosition:
    """Where a TextStream stands: all that its next windows depend on."""

    epoch: int
    documents: dict[str, Any] | None  # state of the data set, ready for JSON; None at the beginning
    pending: list[int]
    packed: list[Int[Tensor, "seq_len"]]
    pool: list[Int[Tensor, "seq_len"]]
    rng: tuple
    all_read: bool
    windows: int

    def to_state(self) -> dict[str, Any]:
        """As tensors and what JSON can hold."""
        return {
            "epoch": self.epoch,
            "documents": self.documents,
            "pending": torch.tensor(self.pending, dtype=torch.int32),
            "packed": torch.stack(self.packed).int() if self.packed else torch.empty(0, 0),
            "pool": torch.stack(self.pool).int() if self.pool else torch.empty(0, 0),
            "rng": torch.tensor(self.rng[1]),
            "all_read": self.all_read,
            "windows": self.windows,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TextPosition":
        version, _, gauss = random.Random(0).getstate()
        return cls(
            epoch=state["epoch"],
            documents=state["documents"],
            pending=state["pending"].tolist(),
            packed=list(state["packed"].long()),
            pool=list(state["pool"].long()),
            rng=(version, tuple(state["rng"].tolist()), gauss),
            all_read=state["all_read"],
            windows=state["windows"],
        )


class TextStream:
    """The training text as windows of tokens, epoch after epoch, each in another order, from `seed`; of processes that
    share batches, each has its part of it.

    Every window waits in a pool for a random time: a long document is many windows in a row, which a buffer of
    activations alone would serve too close together. A stream made with the `position` of another continues it exactly.
    """

    def __init__(
        self,
        dataset_path: str,
        dataset_name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        seed: int,
        position: TextPosition | None = None,
    ) -> None:
        self._dataset_path, self._seed = dataset_path, seed
        from datasets.distributed import split_dataset_by_node

        documents = load_documents(dataset_path, dataset_name, held_out=False, seed=seed)
        strategy = "examples" if local_files(dataset_path) else "auto"  # a share of files, if few, could be very small
        self._documents = split_dataset_by_node(documents, ranks.rank(), ranks.count(), strategy)
        self._packer = _Packer(tokenizer, seq_len)
        self._pool_size = max(1, MIXED_TOKENS // seq_len)
        self._begin(0 if position is None else position.epoch)
        if position is not None:
            self._read_until = position.documents
            self._packer.pending = list(position.pending)
            self._packed, self._pool = deque(position.packed), list(position.pool)
            self._rng.setstate(position.rng)
            self._all_read, self._windows = position.all_read, position.windows

    @property
    def position(self) -> TextPosition:
        return TextPosition(
            epoch=self._epoch,
            documents=self._read_until,
            pending=list(self._packer.pending),
            packed=list(self._packed),
            pool=list(self._pool),
            rng=self._rng.getstate(),
            all_read=self._all_read,
            windows=self._windows,
        )

    def next_windows(self, count: int) -> Int[Tensor, "count seq_len"]:
        """The next windows.

        Raises: ValueError when the whole text is not one window, or a row is not text or tokens; OSError when the text
        cannot be read, even after several attempts.
        """
        return torch.stack([self._next() for _ in range(count)])

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._documents.set_epoch(epoch)
        self._read_until: dict[str, Any] | None = None  # as the data set says it
        self._unread: Iterator[dict] | None = None  # to be begun there
        self._rng = random.Random(f"{self._seed} {epoch}")
        self._packer.pending = []
        self._packed: deque[Tensor] = deque()  # windows that are not in the pool yet
        self._pool: list[Tensor] = []
        self._all_read = False
        self._windows = 0  # packed in this epoch

    def _next(self) -> Int[Tensor, "seq_len"]:
        while True:
            if self._packed:
                window = self._packed.popleft()
                if len(self._pool) == self._pool_size:
                    place = self._rng.randrange(self._pool_size)
                    window, self._pool[place] = self._pool[place], window
                    return window
                self._pool.append(window)
            elif not self._all_read:
                self._read()
            elif self._pool:
                return self._pool.pop()
            else:
                if self._epoch == 0:
                    tokens = self._windows * self._packer.seq_len
                    tqdm.write(
                        f"all {tokens:,} training tokens of {self._dataset_path} read: starting over, reshuffled"
                    )
                self._begin(self._epoch + 1)

    def _read(self) -> None:
        """Pack a few more documents; at the end of the text, shuffle the pool for good."""
        documents = self._read_documents()
        if documents:
            windows = self._packer.pack(documents)
            self._packed.extend(windows)
            self._windows += len(windows)
            return
        if self._windows == 0:
            share = f", in share {ranks.rank() + 1} of {ranks.count()}" if ranks.count() > 1 else ""
            raise ValueError(
                f"dataset_path = {self._dataset_path!r}: no {self._packer.seq_len} tokens of training text{share}; give"
                " more"
            )
        self._rng.shuffle(self._pool)
        self._all_read = True

    @retry(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential(multiplier=0.5),
        stop=stop_after_attempt(READ_ATTEMPTS),
        reraise=True,
    )
    def _read_documents(self) -> list[dict]:
        """The next few documents; where reading fails it is tried again from the same place."""
        if self._unread is None:
            if self._read_until is not None:
                self._documents.load_state_dict(self._read_until)
            self._unread = iter(self._documents)
        try:
            documents = list(islice(self._unread, TOKENISED_DOCUMENTS))
            self._read_until = self._documents.state_dict()
            return documents
        except ValueError:
            raise
        except Exception as error:  # of whatever library reads
            self._unread = None
            raise OSError(
                f"dataset_path = {self._dataset_path!r}: reading failed {READ_ATTEMPTS} times"
                f" ({type(error).__name__}: {error}); check the files or the network"
            ) from error
