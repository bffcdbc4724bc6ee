"""Files and folders that are written whole or not at all, whoever is killed and whenever the power fails."""

import contextlib
import functools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.checks import explained, require

ERRORS = (OSError, SafetensorError)
REST, CRC = "rest.json", "crc32"  # tensors in a state's file: its JSON, and the checksum of all others


def write_durably(path: str | Path, data: bytes | Callable[[Path], object]) -> None:
    """Make the file or folder `path`, and the folders above it, in place of the file or folder that is there.

    data: a file's bytes; or a function that makes the file or folder at the path it is given.

    It is written under a hidden name beside `path`, flushed to the disk and renamed: nobody sees a part of it. A file
    is replaced in one step. A folder takes two, because no file system puts one over another: the old one is moved to a
    hidden name, then the new one to `path`. A process killed between the two leaves both of them whole under hidden
    names, and the next write to `path` begins by moving the old one back. Each path has one writer at a time.
    When a write fails, `path` is as it was and nothing lies beside it.

    Raises: OSError with the path and the bytes free, when the disk, a quota or a limit has no room.
    """
    path = Path(path)
    write = data if callable(data) else lambda file: file.write_bytes(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing, replaced = (path.with_name(f".{path.name}.{role}") for role in ("writing", "replaced"))
    _put_back(replaced, path)
    _remove(writing)
    remedy = f"{shutil.disk_usage(path.parent).free:,} bytes are free there; make room, or raise a quota or limit"
    with contextlib.ExitStack() as cleaning, explained(f"{path}: not written", *ERRORS, remedy=remedy, raised=OSError):
        cleaning.callback(_put_back, replaced, path)
        cleaning.callback(_remove, writing)
        write(writing)
        for written in (*writing.rglob("*"), writing):
            flush(written)
        if writing.is_dir() and path.is_dir():
            path.rename(replaced)
        writing.replace(path)
        flush(path.parent)


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
    tensors[CRC] = torch.tensor(_crc(tensors))
    write_durably(path, lambda file: save_tensors(tensors, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on the CPU. Raises: ValueError when the file is damaged."""
    remedy = "remove it to train from the beginning"
    with explained(f"{path}: damaged", SafetensorError, KeyError, ValueError, remedy=remedy):
        tensors = load_file(path)
        require(tensors.pop(CRC).item() == _crc(tensors), "its checksum is another")
        state = json.loads(bytes(tensors.pop(REST).tolist()))
    for name, tensor in tensors.items():
        *branches, key = name.split("/")
        functools.reduce(dict.__getitem__, branches, state)[key] = tensor
    return state


def _crc(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return crc


def flush(path: Path) -> None:
    """Return once what was written to the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(replaced: Path, path: Path) -> None:
    """Undo the first of a folder's two steps, or remove what was left after the second."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    _remove(replaced)


def _remove(left_over: Path) -> None:
    if left_over.is_dir() and not left_over.is_symlink():
        shutil.rmtree(left_over)
    else:
        left_over.unlink(missing_ok=True)
