"""Read data sets as documents. A data set is a Hub name or local files, which `datasets` streams.

Its rows are documents, of text or of tokens. One in ten is held out for evaluation, by a hash that no seed changes.
"""

import glob
import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
from datasets import IterableDataset

from runtime.checks import explained, require

STDLIB = "python-stdlib"
COLUMNS = {
    "text": "text",
    "content": "text",
    "tokens": "tokens",
    "input_ids": "tokens",
}  # what each holds, the best first
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}  # of `datasets`
LOCAL_SUFFIXES = (".py", ".txt", *BUILDERS)
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"
LINES_PER_DOCUMENT = 128  # of a .txt file, which may be one huge corpus

# `datasets` warns that its state lacks the shuffle buffer; ours holds one document, and is empty between two.
logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they log an error and then raise it
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 s after each pass over a file; our exit waits for no thread


def is_held_out(key: str) -> bool:
    """Decide whether the document with this key (its path or its content) is in the tenth kept for evaluation."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % 10 == 0


def local_files(dataset_path: str) -> list[Path]:
    """List, sorted, the files that `dataset_path` names as a file, a folder or a glob; none if it is a Hub name.

    Raises: ValueError when a local path is meant but its files are missing, of several kinds, empty or unreadable.
    """
    if dataset_path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    said, allowed = f"dataset_path = {dataset_path!r}:", ", ".join(LOCAL_SUFFIXES)
    path = Path(dataset_path).expanduser()
    is_folder, exists = path.is_dir(), path.exists()
    if re.fullmatch(HUB_NAME, dataset_path) and path.suffix not in LOCAL_SUFFIXES and not exists:
        return []
    pattern = (glob.escape(str(path)) if exists else str(path)) + "/**/*" * is_folder
    found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    files = [p for p in found if p.suffix in LOCAL_SUFFIXES or not is_folder]
    missing = f"no file of {allowed} in that folder" if is_folder else "no such file"
    require(files, f"{said} {missing}; check the path or the glob")
    kinds = ", ".join(suffix or "a name without a suffix" for suffix in sorted({p.suffix for p in files}))
    require(kinds in LOCAL_SUFFIXES, f"{said} found {kinds}; give files of one of {allowed}")
    require(any(p.stat().st_size for p in files), f"{said} every file is empty; give files with text or tokens")
    for file in files:
        require(os.access(file, os.R_OK), f"{said} you may not read {file}; change its permissions")
        with file.open("rb") as content:
            head = content.read(8192)
        if kinds == ".parquet":
            require(head.startswith(b"PAR1"), f"{said} {file} is not parquet; give the file whole or leave it out")
        else:
            require(b"\0" not in head, f"{said} {file} is binary, it has NUL bytes; give text in UTF-8")
    return files


def load_documents(
    dataset_path: str, dataset_name: str | None = None, text_column: str | None = None, *, held_out: bool, seed: int = 0
) -> IterableDataset:
    """Stream the training or the held-out documents of a data set, its files in an order set by `seed` and the epoch.

    A source file (.py) is one document, held out by its path within the folder that all of them share. Every other row
    (128 lines of a .txt file, a row of .jsonl, .parquet or the Hub) is held out by its content. The data set has one
    column, "text" (str) or "tokens" (list of int): text_column, or the first of COLUMNS that is there. Raises:
    ValueError when it cannot be read or has no such column, OSError when it is out of reach.
    """
    said, files = f"dataset_path = {dataset_path!r}:", local_files(dataset_path)
    names, suffix = [str(p) for p in files], files[0].suffix if files else None
    if suffix == ".py":
        root = os.path.commonpath(p.parent for p in files)
        names = [str(p) for p in files if is_held_out(p.relative_to(root).as_posix()) == held_out]
        part = "held-out" if held_out else "training"
        require(names, f"{said} {len(files)} files leave none for the {part} part; add files")
    kind, named = "text", f"text_column = {text_column!r}:"
    if suffix in (".py", ".txt"):
        require(text_column is None, f"{named} {suffix} files have no columns; leave it out")
        dataset = IterableDataset.from_generator(_file_documents, gen_kwargs={"files": names})
    else:
        with (
            explained(f"{said} cannot be reached", OSError, remedy="give other data, or try again", raised=OSError),
            explained(f"{said} cannot be read", ValueError, remedy="give other data"),
        ):
            dataset = datasets.load_dataset(
                BUILDERS.get(suffix, dataset_path),
                None if files else dataset_name,
                data_files=[glob.escape(name) for name in names] or None,  # `datasets` takes file names for globs
                split="train",
                streaming=True,
            )
            columns = dataset.column_names or list(next(iter(dataset), {}))
        found, column = ", ".join(columns) or "none", text_column or next((c for c in COLUMNS if c in columns), None)
        require(column, f"{said} no column of text or tokens among {found}; name it as text_column")
        require(column in columns, f"{named} {dataset_path} has no such column; give one of {found}")
        kind = COLUMNS.get(column) or _kind_of(dataset, column)
        dataset = dataset.select_columns([column])
        dataset = dataset if column == kind else dataset.rename_column(column, kind)
    if suffix != ".py":
        dataset = dataset.filter(lambda row: row[kind] is not None and is_held_out(str(row[kind])) == held_out)
    return dataset.shuffle(seed=seed, buffer_size=1)


def _kind_of(dataset: IterableDataset, column: str) -> str:
    """Say whether a column holds text or tokens."""
    known = (row[column] for row in dataset if row[column] is not None)
    return "text" if isinstance(next(known, ""), str) else "tokens"


def _file_documents(files: list[str]) -> Iterator[dict[str, str]]:
    """Read each .py file as a document, and each 128 lines of a .txt file; no document spans two files."""
    for file in files:
        with open(file, encoding="utf-8", errors="replace") as lines:
            if file.endswith(".py"):
                yield {"text": lines.read()}
            else:
                while document := "".join(islice(lines, LINES_PER_DOCUMENT)):
                    yield {"text": document}
