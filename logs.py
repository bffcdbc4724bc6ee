"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints on disk.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    sweep.json                 the Configs of all its SAEs
    resume.safetensors         all that a resumed run needs, of the latest time it was saved
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        wandb_id               of its W&B run
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000195/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import wandb
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from wandb import Run

from config import Config
from disk import load_state, save_state, write_durably
from sae import SAE_TYPES, BaseAutoencoder

SWEEP, RESUME, METRICS = "sweep.json", "resume.safetensors", "metrics.jsonl"
WANDB_SECONDS = 60
CFG, WEIGHTS, COUNTERS = "cfg.json", "sae_weights.safetensors", "counters.safetensors"
SAE_LENS_VERSION = "6.0.0"  # of the format; without it SAELens reads cfg.json as an older one and drops the metadata
ARCHITECTURES = {"vanilla": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


def begin_sweep(folder: Path, cfgs: list[Config]) -> None:
    """Make the folder of a sweep and write down its Configs, for who resumes it."""
    write_durably(folder / SWEEP, json.dumps([cfg.to_dict() for cfg in cfgs], indent=2).encode())


def read_sweep(folder: Path) -> list[Config]:
    """The Configs of a sweep. Raises ValueError when the folder is none, or its file is damaged."""
    file = folder / SWEEP
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the folder of a sweep, such as runs/tiny-20261123-183000")
    try:
        return [Config(**fields) for fields in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); begin the sweep anew") from None


def load_progress(folder: Path) -> dict[str, Any]:
    """How far a sweep has come: the number of its "group" (of SAEs on one stream) in training, and where that one has
    come further than its beginning, its "step", "trainers", "store" and "log".
    """
    return load_state(folder / RESUME) if (folder / RESUME).exists() else {"group": 0}


class RunLog:
    """The output of the SAEs trained together: one W&B run each, grouped by the folder's name.

    With the "log" of `load_progress` it goes on behind what that state has seen. Whatever W&B does, training goes on:
    where it fails a line says so, and the metrics are in metrics.jsonl.
    """

    def __init__(self, folder: Path, cfgs: list[Config], group: int = 0, state: dict[str, Any] | None = None) -> None:
        self.folder, self._group = folder, group
        self._folders = [folder / cfg.name for cfg in cfgs]
        sizes = [0] * len(cfgs) if state is None else state["metrics_bytes"]
        self._sent: list[int] = []  # rows to come that W&B was given before the interruption
        for cfg, sae_folder, size in zip(cfgs, self._folders, sizes):
            sae_folder.mkdir(parents=True, exist_ok=True)
            write_durably(sae_folder / "config.json", json.dumps(cfg.to_dict(), indent=2).encode())
            with (sae_folder / METRICS).open("a+b") as file:
                file.seek(size)
                self._sent.append(file.read().count(b"\n"))
                file.truncate(size)
        self._runs = self._begin_wandb(cfgs)

    def _begin_wandb(self, cfgs: list[Config]) -> list[Run | None]:
        runs: list[Run | None] = []
        offline = False
        for cfg, sae_folder in zip(cfgs, self._folders):
            id_file = sae_folder / "wandb_id"
            run = None
            for mode in dict.fromkeys(["offline"] if offline else [cfg.wandb_mode, "offline"]):
                if not id_file.exists():
                    write_durably(id_file, secrets.token_hex(8).encode())
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
                    tqdm.write(f"W&B cannot be used as {mode} ({_one_line(error)}); metrics are also in {METRICS}")
            runs.append(run)
        return runs

    def log(self, index: int, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Metrics of the SAE cfgs[index] after `step` steps, `tokens` activations."""
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
                tqdm.write(f"W&B failed at step {step} ({_one_line(error)}); metrics go on in {file}")

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> Path:
        path = self.folder / sae.cfg.name / f"step-{step:06d}"
        save_checkpoint(sae, path)
        return path

    def save_state(self, state: dict[str, Any]) -> None:
        """Write, in place of the last one, what `load_progress` gives back to who resumes."""
        log = {"metrics_bytes": [(folder / METRICS).stat().st_size for folder in self._folders]}
        save_state({"group": self._group, "log": log, **state}, self.folder / RESUME)

    def finish(self) -> None:
        """The group is trained: who resumes begins with the next."""
        save_state({"group": self._group + 1}, self.folder / RESUME)

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


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def save_checkpoint(sae: BaseAutoencoder, path: str | Path) -> None:
    """Write the folder `path`, replacing a checkpoint that is there: whole or not at all.

    cfg.json and sae_weights.safetensors are in SAELens' format (BatchTopK as a jumprelu with one threshold for all);
    counters.safetensors holds what only training needs. Raises ValueError when `path` holds anything else.
    """
    path = Path(path)
    foreign = {p.name for p in path.iterdir()} - {CFG, WEIGHTS, COUNTERS} if path.exists() else set()
    if foreign:
        raise ValueError(f"{path}: not replaced, as it holds more than a checkpoint: {', '.join(sorted(foreign)[:3])}")
    weights = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    if sae.cfg.sae_type == "batchtopk":
        weights["threshold"] = sae.threshold.expand(sae.cfg.dict_size).contiguous()
    counters = {name: b for name, b in sae.named_buffers() if name != "threshold"}

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    temporary.mkdir()
    try:
        (temporary / CFG).write_text(json.dumps(_sae_lens_cfg(sae), indent=2))
        save_file(weights, temporary / WEIGHTS)
        save_file(counters, temporary / COUNTERS)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if path.exists():
        replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced)
    else:
        temporary.rename(path)


def _sae_lens_cfg(sae: BaseAutoencoder) -> dict:
    cfg = sae.cfg
    architecture = ARCHITECTURES[cfg.sae_type]
    return {
        "architecture": architecture,
        "d_in": cfg.act_size,
        "d_sae": cfg.dict_size,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
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
        "nn_decompositions": cfg.to_dict(),
    }


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BaseAutoencoder:
    """The SAE saved in the folder `path`, of its exact class, in evaluation mode, on `device` (its cfg says so too).

    Raises ValueError, naming the file and what is wrong with it, when the folder is not a whole checkpoint of ours.
    """
    path = Path(path)
    cfg = replace(_read_config(path / CFG), device=str(device))
    sae = SAE_TYPES[cfg.sae_type](cfg)
    weights, counters = _read_tensors(path / WEIGHTS), _read_tensors(path / COUNTERS)
    expected = {name: p.shape for name, p in sae.named_parameters()}
    buffers = {name: b.shape for name, b in sae.named_buffers() if name != "threshold"}
    if cfg.sae_type == "batchtopk":
        expected["threshold"] = torch.Size([cfg.dict_size])
    _check_shapes(path / WEIGHTS, weights, expected)
    _check_shapes(path / COUNTERS, counters, buffers)
    if cfg.sae_type == "batchtopk":
        threshold = weights["threshold"]
        if not torch.equal(threshold, threshold[:1].expand_as(threshold)):
            raise ValueError(f"{path / WEIGHTS}: threshold differs between latents, a batchtopk has one for all")
        weights["threshold"] = threshold[0]
    sae.to(weights["W_dec"].dtype).load_state_dict(weights | counters)
    return sae.to(device).eval()


def _read_config(file: Path) -> Config:
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; give the folder of a checkpoint, such as runs/<sweep>/<name>/step-000195"
        )
    try:
        cfg = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    fields = cfg.get("nn_decompositions") if isinstance(cfg, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: no field 'nn_decompositions'; this checkpoint was not written by this library")
    known = Config.__dataclass_fields__.keys()
    if fields.keys() != known:
        wrong = ", ".join(sorted(fields.keys() ^ known))
        raise ValueError(f"{file}: nn_decompositions has missing or unknown fields: {wrong}")
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the checkpoint is incomplete")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable as safetensors ({error})") from None


def _check_shapes(file: Path, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"{file}: holds {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{file}: {name} is {list(tensors[name].shape)}; cfg.json says {list(shape)}")
