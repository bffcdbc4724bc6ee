"""A folder of recorded activations: `python main.py cache` writes it, --activations has a sweep train from it.

acts/
    rows-000-00000.safetensors    rows of the first process, shuffled: [row, act_size] under the name of each hook
    ...
    SHA256SUMS                    for `sha256sum -c SHA256SUMS`
    manifest.json                 what was recorded: "config", "hooks" with their widths, "files" with their rows
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_store import MANIFEST, ActivationsStore
from config import OF_TEXT, Config, Stream, widths_of
from language_model import Model
from runtime import ranks
from runtime.checks import explained, parse_json, require
from runtime.cli import written
from runtime.disk import existing, load_state, save_state, save_tensors, sha256, write_durably
from runtime.progress import Progress

FILE_BYTES = 1 << 29  # of a file's rows, at most
SUMS = "SHA256SUMS"


def check_recorded(cfg: Config) -> None:
    """Compare a Config with the folder of activations that it names.

    Raises ValueError when the folder is not whole, or was recorded from another model, text or hook.
    """
    folder, said = Path(cfg.activations), f"activations = {cfg.activations!r}"
    file, whole = folder / MANIFEST, "give (or put back) a folder that `main.py cache` has written to its end"
    require(file.is_file(), f"{said}: no {MANIFEST} there; {whole}")
    manifest = parse_json(file.read_bytes(), str(file))
    with explained(f"{file}: says too little", KeyError, TypeError, remedy=whole):
        recorded = {field: manifest["config"][field] for field in OF_TEXT}
        hooks, files = dict(manifest["hooks"]), dict(manifest["files"])
    others = [f for f, value in recorded.items() if _last_name(value) != _last_name(getattr(cfg, f))]
    give = " ".join(f"--{field.replace('_', '-')} {written(recorded[field])}" for field in others)
    require(not others, f"{said}: was recorded with other values; give {give}")
    missing = [hook for hook in cfg.widths if hook not in hooks]
    require(not missing, f"{said}: holds no {' and '.join(missing)}; it holds {', '.join(hooks)}")
    gone = [name for name in files if not (folder / name).is_file()]
    require(not gone, f"{said}: {''.join(gone[:1])} is gone; copy the whole folder")


def _last_name(value: object) -> str:
    """Name what may be a path on another machine."""
    return Path(str(value)).name


def write(
    model: Model, cfgs: Sequence[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False
) -> str | None:
    """Record num_tokens rows at all hooks of Configs of one stream; return None, or how far it came until it stopped.

    Called again it goes on where it stopped or was killed. Of processes that share batches each writes its own files.
    Raises: ValueError when the folder holds anything else or has no room, or an activation is not finite; OSError when
    nothing can be written.
    """
    cfg, manifest = cfgs[0], folder / MANIFEST
    stream = {field: getattr(cfg, field) for field in Stream.__dataclass_fields__}
    of = {"config": stream, "hooks": widths_of(cfgs), "processes": ranks.count()}
    saved = _resume_file(folder, ranks.rank())
    state = load_state(saved) if saved.exists() else {}
    is_done = manifest.exists()
    _check_folder(folder, of, parse_json(manifest.read_bytes(), str(manifest)) if is_done else state.get("of", of))
    stopped = None if is_done else _record(model, cfgs, folder, of, state, should_stop)
    is_whole = ranks.meet(stopped is not None, should_stop)
    if is_whole and ranks.rank() == 0:
        if not is_done:
            _finish(folder, of)
        for file in folder.glob("resume-*.state"):
            file.unlink()
    return stopped or (None if is_whole else "other processes were stopped")


def _record(
    model: Model,
    cfgs: Sequence[Config],
    folder: Path,
    of: dict[str, Any],
    state: dict[str, Any],
    should_stop: Callable[[], bool],
) -> str | None:
    """Write this process's files, on from a state; return None, or how far it came until it stopped."""
    cfg, row_bytes = cfgs[0], sum(of["hooks"].values()) * getattr(torch, cfgs[0].dtype).itemsize
    store = ActivationsStore(model, cfgs, state.get("store"))
    if not state:
        _check_room(folder, cfg, row_bytes, store.capacity)
        state = {"of": of, "step": 0, "files": {}, "sums": {}}
    steps_in_file, batches = max(1, FILE_BYTES // (store.batch_size * row_bytes)), []
    progress = Progress(cfg, state["step"])
    for step in range(state["step"] + 1, cfg.num_steps + 1):
        batches.append(store.next_batch())
        progress.advance(step)
        stopped = should_stop() and step < cfg.num_steps
        if len(batches) == steps_in_file or stopped or step == cfg.num_steps:
            name = f"rows-{ranks.rank():03}-{len(state['files']):05}.safetensors"
            state["sums"][name] = _write_file(folder / name, batches, cfg.dtype)
            state["files"][name], state["step"], batches = len(batches) * store.batch_size, step, []
            save_state(state | {"store": store.state}, _resume_file(folder, ranks.rank()))
        if stopped:
            progress.close()
            return f"stopped after {step * cfg.batch_size:,} of {cfg.num_steps * cfg.batch_size:,} activations"
    progress.close()
    return None


def _write_file(file: Path, batches: list[dict[str, Tensor]], dtype: str) -> str:
    """Write batches of rows by hook; return the file's SHA-256."""
    rows = {hook: torch.cat([batch[hook] for batch in batches]).cpu() for hook in batches[0]}
    for hook, acts in rows.items():
        finite = f"dtype = {dtype!r}: at {hook} are activations that are not finite; give another"
        require(torch.stack(acts.aminmax()).isfinite().all(), finite)
    write_durably(file, partial(save_tensors, rows))
    return sha256(file)


def _resume_file(folder: Path, rank: int) -> Path:
    return folder / f"resume-{rank:03}.state"  # no name that a store would read


def _check_folder(folder: Path, of: dict[str, Any], begun: dict[str, Any]) -> None:
    """Refuse a folder with anything but these activations, or a part of them, by as many processes."""
    ours = [f"{kind}-{rank:03}" for rank in range(of["processes"]) for kind in ("rows", "resume")]
    held = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = [name for name in held if not name.startswith((".", *ours)) and name not in (SUMS, MANIFEST)]
    what = "".join(others[:1]) or "other activations"
    alike = not others and {key: begun[key] for key in begun if key != "files"} == of
    require(alike, f"output_dir = {str(folder)!r}: holds {what}; give a new folder")


def _check_room(folder: Path, cfg: Config, row_bytes: int, capacity: int) -> None:
    states = 2 * ranks.count() * capacity * row_bytes  # to go on from; twice, while one is replaced
    needed, free = cfg.num_tokens * row_bytes + states, shutil.disk_usage(existing(folder)).free
    fits = f"num_tokens = {cfg.num_tokens}: they take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free"
    require(needed < free, f"{fits}; give at most {(free - states) // row_bytes}, or another output_dir")


def _finish(folder: Path, of: dict[str, Any]) -> None:
    """Write the checksums and, last, the manifest, whose presence says that the folder is whole."""
    states = [load_state(_resume_file(folder, rank)) for rank in range(of["processes"])]
    files, sums = ({name: value for state in states for name, value in state[key].items()} for key in ("files", "sums"))
    manifest = json.dumps(of | {"files": files}, indent=2).encode()
    sums[MANIFEST] = hashlib.sha256(manifest).hexdigest()
    write_durably(folder / SUMS, "".join(f"{sum}  {name}\n" for name, sum in sums.items()).encode())
    write_durably(folder / MANIFEST, manifest)
