"""Files and folders that are written whole or not at all, whoever is killed and whenever the power fails."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.checks import explained

ERRORS = (OSError, SafetensorError)
REST = "rest.json"  # the tensor in a state's file that holds its JSON


def write_durably(path: str | Path, data: bytes | Callable[[Path], object]) -> None:
    """Make the file or folder `path`, and the folders above it, in place of the file or folder that is there.

    data: a file's bytes; or a function that makes the file or folder at the path it is given.
    It is written under a hidden name beside `path`, flushed and renamed: nobody sees a part of it, and when the write
    fails `path` is as it was. An old folder is moved to a hidden name first, and moved back by the next write if a kill
    came between. Raises: OSError with the path and the bytes free, when the disk, a quota or a limit has no room.
    """
    path = Path(path)
    write = data if callable(data) else lambda file: file.write_bytes(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing, replaced = (path.with_name(f".{path.name}.{role}") for role in ("writing", "replaced"))
    _remove(writing)
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    remedy = f"{shutil.disk_usage(path.parent).free:,} bytes are free there; make room, or raise a quota or limit"
    with contextlib.ExitStack() as cleaning, explained(f"{path}: not written", *ERRORS, remedy=remedy, raised=OSError):
        cleaning.callback(_remove, writing)
        write(writing)
        for written in (*writing.rglob("*"), writing):
            flush(written)
        if writing.is_dir() and path.is_dir():
            _remove(replaced)
            path.rename(replaced)
            cleaning.callback(lambda: path.exists() or replaced.rename(path))
        writing.replace(path)
        flush(path.parent)
        _remove(replaced)


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def existing(path: Path) -> Path:
    """Find the path itself, or the nearest folder above it that exists."""
    return next(found for found in (path.absolute(), *path.absolute().parents) if found.exists())


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file, with the permissions of any new file: safetensors would let only its owner read it."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file)
    file.chmod(mode)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dicts with string keys, of tensors and of what JSON can hold, durably, as one safetensors file."""
    tensors: dict[str, Tensor] = {}

    def strip(branch: dict[str, Any], prefix: str) -> dict[str, Any]:
        tensors.update({prefix + k: v.detach().contiguous() for k, v in branch.items() if isinstance(v, Tensor)})
        rest = {k: v for k, v in branch.items() if not isinstance(v, Tensor)}
        return {k: strip(v, f"{prefix}{k}/") if isinstance(v, dict) else v for k, v in rest.items()}

    rest = json.dumps(strip(state, ""))
    tensors[REST] = torch.frombuffer(bytearray(rest, "utf-8"), dtype=torch.uint8)
    write_durably(path, lambda file: save_tensors(tensors, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on the CPU. Raises: ValueError when the file is damaged."""
    remedy = "remove it to train from the beginning"
    with explained(f"{path}: damaged", SafetensorError, KeyError, ValueError, remedy=remedy):
        tensors = load_file(path)
        state = json.loads(bytes(tensors.pop(REST).tolist()))
    for name, tensor in tensors.items():
        *branches, key = name.split("/")
        functools.reduce(dict.__getitem__, branches, state)[key] = tensor
    return state


def flush(path: Path) -> None:
    """Return once what was written to the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(left_over: Path) -> None:
    if left_over.is_dir() and not left_over.is_symlink():
        shutil.rmtree(left_over)
    else:
        left_over.unlink(missing_ok=True)
