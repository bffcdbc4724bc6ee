"""Text in, packed token windows out: everything before the language model.

A data set is a Hub name or local files, read by `datasets` streaming. Its rows are documents: text, or
tokens already. One document in ten is held out for evaluation, by a hash that no seed or machine changes.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from numbers import Integral
from pathlib import Path

import torch
from datasets import IterableDataset, load_dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

STDLIB = "python-stdlib"
TEXT_COLUMNS = ("text", "content")
TOKEN_COLUMNS = ("tokens", "input_ids")
LOCAL_SUFFIXES = (".py", ".txt", ".jsonl", ".parquet")
LINES_PER_DOCUMENT = 128  # of a .txt file, which may be one huge corpus
SHUFFLE_DOCUMENTS = 1000
TOKENISE_DOCUMENTS = 64


def is_held_out(key: str) -> bool:
    """Whether the document with this key (its path or its content) is one of the tenth kept for evaluation."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % 10 == 0


def local_files(dataset_path: str) -> list[Path]:
    """The local files, sorted, that `dataset_path` names as a file, a folder or a glob; empty when it is a Hub name.

    Raises ValueError when a path or glob is meant but matches nothing, files of several kinds, or only empty files.
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
    return files


def load_documents(
    dataset_path: str, dataset_name: str | None = None, *, held_out: bool, seed: int = 0
) -> IterableDataset:
    """Stream the training or the held-out documents of a data set, shuffled by `seed` and the epoch.

    Source files (.py) are documents, held out by their path relative to the folder they share; every other
    row (128 lines of a .txt file, a row of .jsonl, .parquet or the Hub) is held out by its content.

    Returns: a data set with one column, "text" (str) or "tokens" (list of int).
    Raises: ValueError when there is no such file or no column of text or tokens.
    """
    files = local_files(dataset_path)
    suffix = files[0].suffix if files else None
    if suffix == ".py":
        root = Path(sysconfig.get_paths()["stdlib"]) if dataset_path == STDLIB else _common_folder(files)
        kept = [str(p) for p in files if is_held_out(p.relative_to(root).as_posix()) == held_out]
        if not kept:
            split = "held-out" if held_out else "training"
            raise ValueError(
                f"dataset_path {dataset_path!r}: {len(files)} files leave none for the {split} part; add files"
            )
        dataset = IterableDataset.from_generator(_file_documents, gen_kwargs={"files": kept})
        return dataset.shuffle(seed=seed, buffer_size=SHUFFLE_DOCUMENTS)

    if suffix == ".txt":
        dataset = IterableDataset.from_generator(_file_documents, gen_kwargs={"files": [str(p) for p in files]})
        column = "text"
    else:
        if suffix == ".jsonl":
            dataset = _load("json", files)
        elif suffix == ".parquet":
            dataset = _load("parquet", files)
        else:
            dataset = _load(dataset_path, name=dataset_name)
        columns = dataset.column_names or list(next(iter(dataset), {}))
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
    dataset = dataset.filter(lambda row: row[column] is not None and is_held_out(str(row[column])) == held_out)
    return dataset.shuffle(seed=seed, buffer_size=SHUFFLE_DOCUMENTS)


def _load(builder: str, files: list[Path] | None = None, **options: object) -> IterableDataset:
    # `datasets` takes file names for globs.
    data_files = None if files is None else [glob.escape(str(p)) for p in files]
    return load_dataset(builder, data_files=data_files, split="train", streaming=True, **options)


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


def token_windows(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[Int[Tensor, "seq_len"]]:
    """Pack documents into windows of `seq_len` tokens, each starting with BOS, documents ended by EOS.

    No token is lost but the rest, shorter than a window, at the end of the last document.
    Raises ValueError when a row is neither a string nor a list of ids of the tokenizer's vocabulary.
    """
    bos, eos = bos_token_id(tokenizer), tokenizer.eos_token_id
    separator = [] if eos is None else [eos]
    vocab_size = len(tokenizer)
    pending: list[int] = []
    for tokens in _tokenised(documents, tokenizer):
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(
                f"token {max(tokens) if min(tokens) >= 0 else min(tokens)} is outside the vocabulary of {vocab_size}"
                f" of {tokenizer.name_or_path!r}; the data set was tokenised for another model"
            )
        pending.extend(tokens)
        pending.extend(separator)
        full = len(pending) // (seq_len - 1) * (seq_len - 1)
        for start in range(0, full, seq_len - 1):
            yield torch.tensor([bos, *pending[start : start + seq_len - 1]])
        del pending[:full]


def _tokenised(documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    texts: list[str] = []
    for document in documents:
        if "tokens" in document:
            if not all(isinstance(token, Integral) for token in document["tokens"][:1]):
                raise ValueError(f"tokens start with {document['tokens'][0]!r}; the column must hold lists of ids")
            yield document["tokens"]
            continue
        if not isinstance(document["text"], str):
            raise ValueError(f"a text is {document['text']!r}; the column must hold strings")
        texts.append(document["text"])
        if len(texts) == TOKENISE_DOCUMENTS:
            yield from _encode(texts, tokenizer)
            texts = []
    if texts:
        yield from _encode(texts, tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
