"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints on disk.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    sweep.json                 the Configs of all its SAEs
    resume.safetensors         all that a resumed run needs, of the latest time it was saved
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        wandb_id, wandb_sent   of its W&B run; after an interruption, how many rows that was given
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000195/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import wandb
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from wandb import Run

import ranks
from config import Config
from disk import flush, load_state, save_state, save_tensors, write_durably
from errors import one_line
from sae import SAE_TYPES, BaseAutoencoder

SWEEP, RESUME, METRICS = "sweep.json", "resume.safetensors", "metrics.jsonl"
WANDB_SECONDS = 60
CFG, WEIGHTS, COUNTERS = "cfg.json", "sae_weights.safetensors", "counters.safetensors"
SAE_LENS_VERSION = "6.0.0"  # of the format; without it SAELens reads cfg.json as an older one and drops the metadata
CFG_BYTES = 2**20  # far more than any cfg.json of ours
DTYPES = {  # of the numbers of an SAE and of its counters, as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip
ARCHITECTURES = {"vanilla": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


def begin_sweep(folder: Path, cfgs: list[Config]) -> None:
    """Make the folder of a sweep and write down its Configs and the number of processes, for who resumes it."""
    if ranks.world_rank() == 0:
        sweep = {"processes": ranks.world_size(), "configs": [cfg.to_dict() for cfg in cfgs]}
        write_durably(folder / SWEEP, json.dumps(sweep, indent=2).encode())


def read_sweep(folder: Path) -> list[Config]:
    """The Configs of a sweep.

    Raises ValueError when the folder is none, its file is damaged, or it was begun by another number of processes.
    """
    file = folder / SWEEP
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the folder of a sweep, such as runs/tiny-20261123-183000-417205")
    try:
        sweep = json.loads(file.read_text())
        cfgs, processes = [Config(**fields) for fields in sweep["configs"]], int(sweep["processes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error}); begin the sweep anew") from None
    if processes != ranks.world_size():
        raise ValueError(
            f"{folder}: begun by {processes} processes, not {ranks.world_size()}; resume it with as many: "
            + (f"torchrun --nproc-per-node {processes}" if processes > 1 else "python main.py, without torchrun")
        )
    return cfgs


def load_progress(folder: Path) -> dict[str, Any]:
    """How far a sweep has come: the number of its "group" (of SAEs on one stream) in training, and where that one has
    come further than its beginning, its "step", "trainers", "store" and "log".
    Raises ValueError when a file is damaged, or the processes that share batches do not find the same.
    """
    file = _resume_file(folder)
    state = load_state(file) if file.exists() else {"group": 0}
    found = torch.tensor([state["group"], state.get("step", 0)], dtype=torch.float64)
    if not torch.equal(ranks.mean(found), found):
        raise ValueError(f"{folder}: not the same on all machines; give an output_dir on a disk that all of them share")
    if ranks.rank() > 0 and "step" in state:
        state["store"] = load_state(_share_file(folder, state["step"], ranks.rank()))["store"]
    return state


def _resume_file(folder: Path) -> Path:
    return folder / (f"resume-team-{ranks.team()}.safetensors" if ranks.team() > 0 else RESUME)


def _share_file(folder: Path, step: int | str, rank: int | str) -> Path:
    """What a process beside the first of those that share batches needs to resume."""
    return folder / f"resume-step-{step}-rank-{rank}.safetensors"


class RunLog:
    """The output of the SAEs trained together: one W&B run each, grouped by the folder's name.

    With the "log" of `load_progress` it goes on behind what that state has seen. Whatever W&B does, training goes on:
    where it fails a line says so, and the metrics are in metrics.jsonl. Of processes that share batches the first alone
    writes, but for what only the others know.
    """

    def __init__(self, folder: Path, cfgs: list[Config], group: int = 0, state: dict[str, Any] | None = None) -> None:
        self.folder, self._group = folder, group
        self._writes = ranks.rank() == 0
        self._folders = [folder / cfg.name for cfg in cfgs] if self._writes else []
        sizes = [0] * len(cfgs) if state is None else state["metrics_bytes"]
        self._sent: list[int] = []  # rows to come that W&B was given before an interruption
        for cfg, sae_folder, size in zip(cfgs, self._folders, sizes):
            sae_folder.mkdir(parents=True, exist_ok=True)
            write_durably(sae_folder / "config.json", json.dumps(cfg.to_dict(), indent=2).encode())
            metrics, sent_file = sae_folder / METRICS, sae_folder / "wandb_sent"
            metrics.touch()
            written = metrics.read_bytes()
            if len(written) < size:
                raise ValueError(f"{metrics}: {len(written)} bytes, {size} when the state was saved; restore the file")
            sent = max(written.count(b"\n"), int(sent_file.read_text()) if sent_file.exists() else 0)
            if state is not None or sent:
                write_durably(sent_file, str(sent).encode())
            self._sent.append(sent - written[:size].count(b"\n"))
            os.truncate(metrics, size)
        self._runs = self._begin_wandb(cfgs)

    def _begin_wandb(self, cfgs: list[Config]) -> list[Run | None]:
        runs: list[Run | None] = []
        offline = False
        for cfg, sae_folder in zip(cfgs, self._folders):
            id_file = sae_folder / "wandb_id"
            run = None
            for mode in dict.fromkeys(["offline"] if offline else [cfg.wandb_mode, "offline"]):
                if not id_file.exists():
                    # The first SAE is the run that `wandb agent` asked for; what it asks for has one.
                    of_agent = os.environ.pop("WANDB_RUN_ID", None) if ranks.world_rank() == 0 else None
                    write_durably(id_file, (of_agent or secrets.token_hex(8)).encode())
                try:
                    run = wandb.init(
                        project=cfg.wandb_project,
                        name=cfg.name,
                        id=id_file.read_text(),
                        resume="allow",
                        group=self.folder.name,
                        config=cfg.to_dict(),
                        mode=mode,
                        dir=self.folder,
                        reinit="create_new",
                        settings=wandb.Settings(silent=True, disable_git=True, console="off"),
                    )
                    break
                except Exception as error:  # of a service out of our hands
                    offline = True
                    id_file.unlink()  # its service keeps the id of a run that it could not begin
                    tqdm.write(f"W&B cannot be used as {mode} ({one_line(error)}); metrics are also in {METRICS}")
            runs.append(run)
        return runs

    def log(self, index: int, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Metrics of the SAE cfgs[index] after `step` steps, `tokens` activations."""
        if not self._writes:
            return
        row = {"step": step, "tokens": tokens, **metrics}
        with (self._folders[index] / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._sent[index] > 0:
            self._sent[index] -= 1
            return
        run = self._runs[index]
        if run is not None:
            try:
                run.log(row, step=step)
            except Exception as error:
                self._runs[index] = None
                file = self._folders[index] / METRICS
                tqdm.write(f"W&B failed at step {step} ({one_line(error)}); metrics go on in {file}")

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> None:
        if self._writes:
            save_checkpoint(sae, self.folder / sae.cfg.name / f"step-{step:06d}")

    def save_state(self, state: dict[str, Any]) -> None:
        """Write, in place of the last one, what `load_progress` gives back to who resumes."""
        if not self._writes:
            save_state({"store": state["store"]}, _share_file(self.folder, state["step"], ranks.rank()))
        ranks.any_of(False)  # all have written, so what follows makes their files count
        if self._writes:
            for folder in self._folders:
                flush(folder / METRICS)
            log = {"metrics_bytes": [(folder / METRICS).stat().st_size for folder in self._folders]}
            self._commit({"group": self._group, "log": log, **state})

    def finish(self) -> None:
        """The group is trained: who resumes begins with the next."""
        if self._writes:
            self._commit({"group": self._group + 1})

    def _commit(self, state: dict[str, Any]) -> None:
        save_state(state, _resume_file(self.folder))
        others = [_share_file(self.folder, state.get("step", ""), rank) for rank in range(1, ranks.count())]
        for file in self.folder.glob("*" + _share_file(self.folder, "*", "*").name + "*"):  # half-written ones too
            if file not in others:
                file.unlink()

    def close(self) -> None:
        """End the W&B runs, waiting for a slow service no longer than a minute."""
        threads = [Thread(target=_finish, args=[run], daemon=True) for run in self._runs if run is not None]
        for thread in threads:
            thread.start()
        until = time.monotonic() + WANDB_SECONDS
        for thread in threads:
            thread.join(max(0, until - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            tqdm.write(f"W&B is slow: what it has not been sent lies in {self.folder}/wandb; use `wandb sync`")


def _finish(run: Run) -> None:
    with contextlib.suppress(Exception):
        run.finish()


def save_checkpoint(sae: BaseAutoencoder, path: str | Path) -> None:
    """Write the folder `path`, replacing a checkpoint that is there: whole or not at all, as `write_durably` does.

    cfg.json and sae_weights.safetensors are in SAELens' format (BatchTopK as a jumprelu with one threshold for all);
    counters.safetensors holds what only training needs. cfg.json has our Config as well, and the SHA-256 of each file.
    Raises ValueError when `path` holds anything else, OSError when the disk has no room.
    """
    path = Path(path)
    held = {p.name for p in path.iterdir()} if path.is_dir() else {path.name} if path.exists() else set()
    if foreign := held - {CFG, WEIGHTS, COUNTERS}:
        raise ValueError(f"{path}: not replaced, as it holds more than a checkpoint: {', '.join(sorted(foreign)[:3])}")
    files = _tensors(sae)
    cfg = _sae_lens_cfg(sae.cfg, sae.W_dec.dtype) | {"nn_decompositions": sae.cfg.to_dict()}

    def write(folder: Path) -> None:
        folder.mkdir()
        for file, tensors in files.items():
            save_tensors(tensors, folder / file)
        sums = {file: _sha256(folder / file) for file in files}
        sums[CFG] = _sha256_of_cfg(cfg | {"sha256": sums})
        (folder / CFG).write_text(json.dumps(cfg | {"sha256": sums}, indent=2))

    write_durably(path, write, size=sum(t.nbytes for tensors in files.values() for t in tensors.values()) + 2**13)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BaseAutoencoder:
    """The SAE saved in the folder `path`, of its exact class, in evaluation mode, on `device` (its cfg says so too).

    Raises ValueError, naming the file and what is wrong with it, when the folder is not a whole checkpoint of ours,
    exactly as it was saved, or its numbers are not finite. Links are followed: caches are made of them.
    """
    path = Path(path)
    saved, cfg, dtype = _read_cfg(path / CFG)
    for file in (WEIGHTS, COUNTERS):
        if not (path / file).is_file():
            raise ValueError(f"{path / file}: no such file; the checkpoint is incomplete")
    size, needed = (path / WEIGHTS).stat().st_size, 2 * cfg.act_size * cfg.dict_size * dtype.itemsize
    if size < needed:  # no memory is asked for that the file could not fill
        raise ValueError(f"{path / WEIGHTS}: truncated: it has {size:,} bytes, by cfg.json at least {needed:,}")

    sae = SAE_TYPES[cfg.sae_type](replace(cfg, device=str(device))).to(dtype)
    files = {name: _read_tensors(path / name, like, saved["sha256"][name]) for name, like in _tensors(sae).items()}
    if cfg.sae_type == "batchtopk":
        threshold = files[WEIGHTS]["threshold"]
        if not torch.equal(threshold, threshold[:1].expand_as(threshold)):
            raise ValueError(f"{path / WEIGHTS}: threshold differs between latents, a batchtopk has one for all")
        files[WEIGHTS]["threshold"] = threshold[0]
    sae.load_state_dict(files[WEIGHTS] | files[COUNTERS])
    return sae.to(device).eval()


def _tensors(sae: BaseAutoencoder) -> dict[str, dict[str, Tensor]]:
    """What each safetensors file of a checkpoint holds."""
    weights = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    if sae.cfg.sae_type == "batchtopk":
        weights["threshold"] = sae.threshold.expand(sae.cfg.dict_size).contiguous()
    return {WEIGHTS: weights, COUNTERS: {name: b for name, b in sae.named_buffers() if name != "threshold"}}


def _sae_lens_cfg(cfg: Config, dtype: torch.dtype) -> dict:
    architecture = ARCHITECTURES[cfg.sae_type]
    return {
        "architecture": architecture,
        "d_in": cfg.act_size,
        "d_sae": cfg.dict_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if cfg.input_unit_norm else "none",
        "reshape_activations": "hook_z" if cfg.site == "z" else "none",
        **({"k": cfg.top_k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_point,
            "context_size": cfg.seq_len,
            "prepend_bos": True,
            "seqpos_slice": [None],
            "dataset_path": cfg.dataset_path,
            "training_architecture": cfg.sae_type,
        },
    }


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a configuration that anybody may have written. Raises ValueError when it is none."""
    if file.stat().st_size > CFG_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size:,} bytes; a configuration has at most {CFG_BYTES:,}")
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: holds {type(fields).__name__}, not an object of fields")
    return fields


def _read_cfg(file: Path) -> tuple[dict, Config, torch.dtype]:
    """cfg.json, our Config in it and the format of the weights, once all three agree and are as they were saved."""
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; give the folder of a checkpoint, such as runs/<sweep>/<name>/step-000195"
        )
    saved = read_json(file)
    fields = saved.get("nn_decompositions")
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: no field 'nn_decompositions'; this checkpoint was not written by this library")
    _check_names(f"{file}: nn_decompositions", fields, Config.__dataclass_fields__)
    for field, value in fields.items():
        if isinstance(value, list | dict):
            raise ValueError(f"{file}: nn_decompositions: {field} holds a {type(value).__name__}; give a plain value")
    try:
        cfg = Config(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if cfg.act_size is None:
        raise ValueError(f"{file}: act_size = None: give the width of the activations")

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES if dtype.is_floating_point}
    dtype = saved.get("dtype")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{file}: dtype is not one of {', '.join(dtypes)}")
    expected = _sae_lens_cfg(cfg, dtypes[dtype])
    metadata = saved["metadata"] if isinstance(saved.get("metadata"), dict) else {}
    _check_agree(f"{file}: metadata.", metadata, expected["metadata"])
    _check_names(f"{file}: metadata", metadata, expected.pop("metadata"))
    _check_agree(f"{file}: ", saved, expected)
    _check_names(f"{file}", saved, expected.keys() | {"metadata", "nn_decompositions", "sha256"})

    sums = saved["sha256"] if isinstance(saved["sha256"], dict) else {}
    _check_names(f"{file}: sha256", sums, {CFG, WEIGHTS, COUNTERS})
    if not all(isinstance(value, str) for value in sums.values()) or sums[CFG] != _sha256_of_cfg(saved):
        raise ValueError(f"{file}: does not match its own SHA-256; it was changed after it was saved")
    return saved, cfg, dtypes[dtype]


def _check_names(place: str, found: dict, expected: Iterable[str]) -> None:
    if found.keys() != set(expected):
        missing, unknown = sorted(set(expected) - found.keys()), sorted(found.keys() - set(expected))
        raise ValueError(f"{place}: {missing} are missing, {unknown[:3]} are unknown; this library did not write it so")


def _check_agree(place: str, found: dict, expected: dict) -> None:
    for name, value in expected.items():
        if name not in found or type(found[name]) is not type(value) or found[name] != value:
            raise ValueError(f"{place}{name} is missing or not {value!r}, which nn_decompositions says")


def _read_tensors(file: Path, like: dict[str, Tensor], sha256: str) -> dict[str, Tensor]:
    """The tensors of a file, which must have the names, shapes and formats of `like`, and the sum."""
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            _check_names(f"{file}", found, like)
            for name, tensor in like.items():
                shape, dtype = found[name].get_shape(), found[name].get_dtype()
                if shape != list(tensor.shape) or dtype != DTYPES[tensor.dtype]:
                    says = f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"
                    raise ValueError(f"{file}: {name} is {dtype} {shape}; cfg.json says {says}")
            if _sha256(file) != sha256:
                raise ValueError(f"{file}: does not match its SHA-256 in cfg.json; it is damaged, or of another SAE")
            tensors = opened.get_tensors()
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable as safetensors ({one_line(error)})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} has numbers that are not finite; the training diverged, lower lr")
    return tensors


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sha256_of_cfg(cfg: dict) -> str:
    """Of all that cfg.json says, but for this sum."""
    sums = {file: value for file, value in cfg["sha256"].items() if file != CFG}
    return hashlib.sha256(json.dumps(cfg | {"sha256": sums}, sort_keys=True).encode()).hexdigest()
