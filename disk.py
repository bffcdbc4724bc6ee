"""Files and folders that are written whole or not at all, whoever is killed and whenever the power fails."""

import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

REST, CRC = "rest.json", "crc32"  # tensors in a state's file: its JSON, and the checksum of all others
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a killed process leaves is named .<name>.<role>-<process>-<machine><number>. The number is there because a
# process in a container can have the id of the one before the restart.
_LEFT_OVER = re.compile(
    r"\.(?P<name>.+)\.(?P<role>writing|replaced)-(?P<process>[1-9][0-9]{0,8})"
    r"-(?P<machine>[0-9a-f]{8})(?P<number>[0-9a-f]{8})",
    re.DOTALL,
)
_NUMBER = secrets.token_hex(4)


def write_durably(path: str | Path, data: bytes | Callable[[Path], object], size: int = 0) -> None:
    """Make the file or folder `path`, and the folders above it, in place of the file or folder that is there.

    data: a file's bytes; or a function that makes the file or folder, of about `size` bytes, at the path it is given.

    It is written under a hidden name beside `path`, flushed to the disk and renamed: nobody sees a part of it.
    A file is replaced in one step. A folder takes two, as no file system puts one over another: the old one is moved to
    a hidden name, then the new one to `path`. Who reads between the two finds nothing at `path`; who is killed there
    has both of them whole, and the next write into the same parent moves the old one back. That write also removes
    what else killed processes of this machine left, and what those of others left of `path`: one writer has each path.
    When it fails, `path` is as it was and nothing lies beside it.

    Raises OSError with the path, the bytes needed and those free, when the disk, a quota or a limit has no room.
    """
    path = Path(path)
    write = data if callable(data) else lambda file: file.write_bytes(data)
    size = size if callable(data) else len(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, path.name)
    writing, replaced = (_hidden(path, role) for role in ("writing", "replaced"))
    try:
        write(writing)
        for written in (*writing.rglob("*"), writing):
            flush(written)
        if writing.is_dir() and path.is_dir():
            path.rename(replaced)
        writing.replace(path)
        flush(path.parent)
    except BaseException as error:
        _remove(writing)
        _put_back_or_remove(replaced, path)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            free = shutil.disk_usage(path.parent).free
            reason = f"{os.strerror(error.errno)}: {size:,} bytes are needed, {free:,} are free on the disk"
            raise OSError(error.errno, f"{reason}; make room, or raise the quota or ulimit -f", str(path)) from None
        raise
    _put_back_or_remove(replaced, path)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file, readable by whom other files are: safetensors makes it for its owner alone. Raises
    OSError when the system does, where safetensors has an error of its own.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file)
        file.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(file)) from None


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dicts with string keys, of tensors and of what JSON can hold, durably, as one safetensors file."""
    tensors: dict[str, Tensor] = {}

    def strip(branch: dict[str, Any], prefix: str) -> dict[str, Any]:
        rest = {}
        for key, value in branch.items():
            if isinstance(value, Tensor):
                tensors[prefix + key] = value.detach().contiguous()
            elif isinstance(value, dict):
                rest[key] = strip(value, f"{prefix}{key}/")
            else:
                rest[key] = value
        return rest

    rest = json.dumps(strip(state, ""))
    tensors[REST] = torch.frombuffer(bytearray(rest, "utf-8"), dtype=torch.uint8)
    tensors[CRC] = torch.tensor(_crc(tensors))
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_durably(path, lambda file: save_tensors(tensors, file), size)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU. Raises ValueError when the file is damaged."""
    try:
        tensors = load_file(path)
        if tensors.pop(CRC).item() != _crc(tensors):
            raise ValueError("its checksum is another")
        state = json.loads(bytes(tensors.pop(REST).tolist()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to train from the beginning") from None
    for name, tensor in tensors.items():
        *branches, key = name.split("/")
        branch = state
        for part in branches:
            branch = branch[part]
        branch[key] = tensor
    return state


def _crc(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return crc


def flush(path: Path) -> None:
    """Have what was written to the file or folder on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}-{os.getpid()}-{_machine()}{_NUMBER}")


@functools.cache
def _machine() -> str:
    """Of the machine, or the container, in which the ids of processes mean anything."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = f"{boot.read_text()} {processes.stat().st_ino}" if boot.exists() else platform.node()
    return hashlib.blake2b(known.encode(), digest_size=4).hexdigest()


def _sweep(folder: Path, name: str) -> None:
    """Put back or remove what killed processes left in the folder; of other machines, only what they left of `name`."""
    found = [(match, folder / entry) for entry in os.listdir(folder) if (match := _LEFT_OVER.fullmatch(entry))]
    for match, left_over in found:
        process = int(match["process"])
        is_gone = not _is_running(process) or (process == os.getpid() and match["number"] != _NUMBER)
        if is_gone if match["machine"] == _machine() else match["name"] == name:
            if match["role"] == "replaced":
                _put_back_or_remove(left_over, folder / match["name"])
            else:
                _remove(left_over)


def _put_back_or_remove(replaced: Path, path: Path) -> None:
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    elif replaced.exists():
        # Half removed it must not be put back, so it no longer bears that name.
        _remove(replaced.rename(_hidden(path, "writing")))


def _remove(left_over: Path) -> None:
    if left_over.is_dir() and not left_over.is_symlink():
        shutil.rmtree(left_over)
    else:
        left_over.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
