"""Files and checkpoints written by processes that are killed at every line, and on a full disk."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import load_checkpoint, save_checkpoint
from config import Config
from results import load_results
from runtime import disk
from runtime.disk import save_tensors, write_durably
from sae import BaseAutoencoder, build_sae

FORK = multiprocessing.get_context("fork")


def sae(seed: int, dict_size: int = 4) -> BaseAutoencoder:
    return build_sae(Config(sae_type="topk", act_size=3, dict_size=dict_size, target_l0=2, seed=seed, device="cpu"))


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Do the work in a child process; returns its exit code, and the error it ended with."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        try:
            work()
            sender.send("")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    child = FORK.Process(target=run)
    child.start()
    sender.close()
    child.join()
    return child.exitcode, receiver.recv() if child.exitcode == 0 else ""


def killed_at(line: int, work: Callable[[], object]) -> Callable[[], object]:
    """Make `work` kill its process where it comes to its line-th line of disk.py and checkpoint.py."""
    left = line

    def trace(frame: object, event: str, _: object) -> Callable | None:
        nonlocal left
        if frame.f_code.co_filename not in (disk.__file__, checkpoint.__file__):
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()
        sys.settrace(None)

    return traced


def seed_of(folder: Path) -> int:
    """Load the SAE there; returns the seed, of which it has every number."""
    loaded = load_checkpoint(folder)
    expected = sae(loaded.cfg.seed).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    return loaded.cfg.seed


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_whoever_may_read_other_files_may_read_tensors(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    save_checkpoint(sae(0), tmp_path / "sae")
    disk.save_state({"a": torch.zeros(2)}, tmp_path / "state")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o666 & ~mask}


@pytest.mark.parametrize("existing", [True, False])
def test_killed_at_any_line_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is slow, and who is killed keeps the power
    kills, gaps, replaced = 0, 0, 0
    for line in range(1, 1000, 1 if existing else 5):
        parent = tmp_path / "sweep" / f"killed-at-{line}"
        parent.mkdir(parents=True)
        (parent / "config.json").write_text(json.dumps(Config().to_dict()))
        (parent / "metrics.jsonl").write_text("")
        path = parent / "step-000010"
        if existing:
            save_checkpoint(sae(1), path)
        code, error = in_child(killed_at(line, lambda path=path: save_checkpoint(sae(2), path)))
        assert (code, error) in ((-signal.SIGKILL, ""), (0, ""))
        if code == 0:
            assert seed_of(path) == 2
            break
        kills += 1

        visible = {p.name for p in parent.iterdir() if not p.name.startswith(".")} - {"config.json", "metrics.jsonl"}
        assert visible <= {"step-000010"}
        assert list(load_results(parent)["checkpoint"]) == ([str(path)] if visible else [None])
        if visible:
            replaced += seed_of(path) == 2
        elif existing:
            gaps += 1
            hidden = [p for p in parent.iterdir() if p.name.startswith(".step-000010.")]
            assert sorted(seed_of(p) for p in hidden) == [1, 2]

        save_checkpoint(sae(3), path)
        assert set(os.listdir(parent)) == {"step-000010", "config.json", "metrics.jsonl"} and seed_of(path) == 3
    assert kills > 10 and replaced > 0 and (gaps > 0) == existing


def test_a_file_killed_at_any_line_is_the_old_or_the_new(tmp_path: Path) -> None:
    found = []
    for line in range(1, 1000):
        write_durably(tmp_path / "state", b"old")
        assert os.listdir(tmp_path) == ["state"]
        code, _ = in_child(killed_at(line, lambda: write_durably(tmp_path / "state", b"new")))
        found.append((tmp_path / "state").read_bytes())
        if code == 0:
            break
    assert len(found) > 10 and found == sorted(found, reverse=True) and set(found) == {b"old", b"new"}


def test_a_rename_that_fails_puts_the_old_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save_checkpoint(sae(1), tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="Input/output error"):
            save_checkpoint(sae(2), tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"] and seed_of(tmp_path / "c") == 1


def test_a_write_that_fails_after_one_that_was_killed_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The killed one had moved it away, and had not put the new one in its place."""
    save_checkpoint(sae(1), tmp_path / ".c.replaced")
    with pytest.raises(ZeroDivisionError):
        write_durably(tmp_path / "c", lambda folder: 1 / 0)
    assert os.listdir(tmp_path) == ["c"] and seed_of(tmp_path / "c") == 1


def test_a_file_is_made_with_its_folders_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state"
    write_durably(str(path), b"1")
    write_durably(path, lambda file: save_tensors({"x": torch.ones(3)}, file))
    write_durably(path, b"2")
    assert path.read_bytes() == b"2" and os.listdir(path.parent) == ["state"]
    with pytest.raises(OSError, match="Is a directory"):
        write_durably(path.parent, b"3")
    assert path.read_bytes() == b"2" and os.listdir(tmp_path / "a") == ["b"]


def test_all_is_flushed_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def noted(descriptor: int, fsync: Callable = os.fsync) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(self: Path, target: Path, replace: Callable = Path.replace) -> None:
        done.append("renamed")
        replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    save_checkpoint(sae(1), tmp_path / "c")
    assert sorted(path.name for path in done[:3]) == ["cfg.json", "counters.safetensors", "sae_weights.safetensors"]
    assert done[3] == done[0].parent and done[4:] == ["renamed", tmp_path]


# ---- no room ----


def limited(work: Callable[[], object], limit: int) -> Callable[[], object]:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work()

    return run


def assert_no_room(error: str, reason: str, path: Path) -> None:
    assert error.startswith(f"OSError: {path}: not written (") and reason in error and "\n" not in error
    free = re.search(r"; ([0-9,]+) bytes are free there; make room", error)
    assert int(free[1].replace(",", "")) <= shutil.disk_usage(path.parent).total


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_file_size_limit_is_named_and_the_old_checkpoint_is_there(tmp_path: Path, limit: int) -> None:
    save_checkpoint(sae(1), tmp_path / "c")
    big = sae(2, dict_size=1000)
    for path in (tmp_path / "c", tmp_path / "d"):
        code, error = in_child(limited(lambda path=path: save_checkpoint(big, path), limit))
        assert code == 0
        assert_no_room(error, "File too large", path)
        assert os.listdir(tmp_path) == ["c"] and seed_of(tmp_path / "c") == 1
    code, error = in_child(limited(lambda: write_durably(tmp_path / "c" / "f", bytes(5000)), limit))
    assert_no_room(error, "File too large", tmp_path / "c" / "f")
    assert seed_of(tmp_path / "c") == 1 and "f" not in os.listdir(tmp_path / "c")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_is_there(small_disk: Path) -> None:
    path = small_disk / "c"
    save_checkpoint(sae(1), path)
    for target in (path, small_disk / "d"):
        with pytest.raises(OSError) as error:
            save_checkpoint(sae(2, dict_size=10_000), target)
        assert_no_room(f"OSError: {error.value}", "No space left on device", target)
        assert os.listdir(small_disk) == ["c"] and seed_of(path) == 1
    for kilobytes in range(4, 128, 8):  # from a disk with no room for a part of it to one with room for all
        (small_disk / "other").write_bytes(bytes(1024 * (112 - kilobytes)) if kilobytes < 112 else b"")
        try:
            save_checkpoint(sae(2, dict_size=1000), path)
        except OSError as error:
            assert "No space left" in str(error) and sorted(os.listdir(small_disk)) == ["c", "other"]
            assert seed_of(path) == 1
        else:
            break
    assert kilobytes > 20 and load_checkpoint(path).cfg.dict_size == 1000
