"""A folder of recorded activations: `python main.py cache` writes it, --activations has a sweep train from it.

acts/
    rows-000-00000.safetensors    rows of the first process, shuffled: [row, act_size] under the name of each hook
    ...
    SHA256SUMS                    for `sha256sum -c SHA256SUMS`
    manifest.json                 what it is of: "config", "hooks" with their widths, "files" with their rows
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from activation_store import ActivationsStore
from config import Config, Stream
from language_model import Model
from runtime import ranks
from runtime.checks import parse_json, require
from runtime.cli import written
from runtime.disk import load_state, save_state, save_tensors, write_durably
from training import progress_bar

FILE_BYTES = 1 << 29  # of a file's rows, at most
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
SHARED = ("model_name", "dataset_path", "dataset_name", "seq_len", "dtype")  # by who records and who trains


def check_recorded(cfg: Config) -> None:
    """Compare a Config with the folder of activations that it names.

    Raises ValueError when the folder is not whole, or was recorded from another model, text or hook.
    """
    folder, said = Path(cfg.activations), f"activations = {cfg.activations!r}"
    file = folder / MANIFEST
    require(file.is_file(), f"{said}: no {MANIFEST} there; give a folder that `main.py cache` has written to its end")
    manifest = parse_json(file.read_bytes(), str(file))
    recorded, hooks = manifest["config"], manifest["hooks"]
    others = [f"--{f.replace('_', '-')} {written(recorded[f])}" for f in SHARED if recorded[f] != getattr(cfg, f)]
    require(not others, f"{said}: was recorded with other fields; give {' '.join(others)}")
    missing = [hook for hook in cfg.widths if hook not in hooks]
    require(not missing, f"{said}: holds no {' and '.join(missing)}; it holds {', '.join(hooks)}")
    gone = [name for name in manifest["files"] if not (folder / name).is_file()]
    require(not gone, f"{said}: {''.join(gone[:1])} is gone; copy the whole folder")


def write(
    model: Model, cfgs: Sequence[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False
) -> str | None:
    """Record num_tokens rows at all hooks of Configs of one stream; return None, or how far it came until it stopped.

    Called again it goes on where it stopped or was killed. Of processes that share batches each writes its own files.
    Raises: ValueError when the folder holds other activations or has no room; OSError when nothing can be written.
    """
    cfg, said = cfgs[0], f"output_dir = {str(folder)!r}"
    saved = _resume_file(folder, ranks.rank())
    state = load_state(saved) if saved.exists() else {}
    store = ActivationsStore(model, cfgs, state.get("store"))
    stream = {field: getattr(cfg, field) for field in Stream.__dataclass_fields__}
    of = {"config": stream, "hooks": store.hooks, "processes": ranks.count()}
    kept = [file.name for file in folder.glob("*.safetensors") if not file.name.startswith("rows-")]
    is_other = (folder / MANIFEST).exists() or kept or state.get("of", of) != of
    require(not is_other, f"{said}: holds other activations; give a new folder")
    row_bytes = sum(store.hooks.values()) * getattr(torch, cfg.dtype).itemsize
    if not state:
        _check_room(folder, cfg, row_bytes)
        state = {"of": of, "step": 0, "files": {}, "sums": {}}
    steps_in_file, batches, stopped = max(1, FILE_BYTES // (store.batch_size * row_bytes)), [], False
    bar = progress_bar(cfg, state["step"])
    for step in range(state["step"] + 1, cfg.num_steps + 1):
        batches.append(store.next_batch())
        bar.update(cfg.batch_size)
        stopped = should_stop() and step < cfg.num_steps
        if len(batches) == steps_in_file or stopped or step == cfg.num_steps:
            name = f"rows-{ranks.rank():03}-{len(state['files']):05}.safetensors"
            rows = {hook: torch.cat([batch[hook] for batch in batches]).cpu() for hook in store.hooks}
            write_durably(folder / name, partial(save_tensors, rows))
            with (folder / name).open("rb") as file:
                state["sums"][name] = hashlib.file_digest(file, "sha256").hexdigest()
            state["files"][name], state["step"], batches = len(batches) * store.batch_size, step, []
            save_state(state | {"store": store.state}, saved)
        if stopped:
            break
    bar.close()
    is_whole = ranks.meet(stopped, should_stop)
    if is_whole and ranks.rank() == 0:
        _finish(folder, of)
    how_far = f"stopped after {state['step'] * cfg.batch_size:,} of {cfg.num_steps * cfg.batch_size:,} activations"
    return how_far if stopped else None if is_whole else "other processes were stopped"


def _resume_file(folder: Path, rank: int) -> Path:
    return folder / f"resume-{rank:03}.state"  # no name that a store would read


def _check_room(folder: Path, cfg: Config, row_bytes: int) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed, free = cfg.num_tokens * row_bytes, shutil.disk_usage(existing).free
    fits = f"num_tokens = {cfg.num_tokens}: they take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free"
    require(needed < free, f"{fits}; give at most {free // row_bytes}, or another output_dir")


def _finish(folder: Path, of: dict[str, Any]) -> None:
    """Write down what all processes have written; the manifest, the last of it, says that the folder is whole."""
    saved = [_resume_file(folder, rank) for rank in range(of["processes"])]
    states = [load_state(file) for file in saved]
    files, sums = ({name: value for state in states for name, value in state[key].items()} for key in ("files", "sums"))
    write_durably(folder / SUMS, "".join(f"{sum}  {name}\n" for name, sum in sums.items()).encode())
    write_durably(folder / MANIFEST, json.dumps(of | {"files": files}, indent=2).encode())
    for file in saved:
        file.unlink()
