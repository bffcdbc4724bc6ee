"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints, the state to resume from.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    sweep.json                 the Configs of all its SAEs
    resume.safetensors         all that a resumed run needs, of the latest time it was saved
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        wandb_id               the id of its W&B run
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000146/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from tqdm import tqdm
from wandb import Run

from checkpoint import save_checkpoint
from config import Config
from runtime import ranks
from runtime.checks import explained, one_line, parse_json, require
from runtime.disk import flush, load_state, save_state, write_durably
from sae import BaseAutoencoder

SWEEP, RESUME, METRICS = "sweep.json", "resume.safetensors", "metrics.jsonl"
ARTIFACT_NAME = 128  # letters, at most
WANDB_SECONDS, UPLOAD_SECONDS = 60, 3600  # to wait, at the end, for what has not been sent


def begin_sweep(folder: Path, cfgs: list[Config]) -> None:
    """Make the folder of a sweep and write down its Configs and the number of processes, for a later resume."""
    if ranks.world_rank() == 0:
        sweep = {"processes": ranks.world_size(), "configs": [cfg.to_dict() for cfg in cfgs]}
        write_durably(folder / SWEEP, json.dumps(sweep, indent=2).encode())


def read_sweep(folder: Path) -> list[Config]:
    """Read the Configs of a sweep.

    Raises ValueError when the folder is none, its file is damaged, or it was begun by another number of processes.
    """
    file = folder / SWEEP
    missing = f"{file}: no such file; give the folder of a sweep, such as runs/tiny-lm-20261123-183000-417205"
    require(file.is_file(), missing)
    with explained(f"{file}: damaged", ValueError, TypeError, KeyError, remedy="begin the sweep anew"):
        sweep = json.loads(file.read_text())
        cfgs, processes = [Config(**fields) for fields in sweep["configs"]], int(sweep["processes"])
        require(cfgs, "no Configs")
    how = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python main.py, without torchrun"
    begun = f"{folder}: begun by {processes} processes, not {ranks.world_size()}; resume it with as many: {how}"
    require(processes == ranks.world_size(), begun)
    return cfgs


def load_progress(folder: Path) -> dict[str, Any]:
    """Read how far a sweep has come: "group", the number of the group of SAEs in training, and once that has taken a
    step, its "step", "trainers" and "store". Raises ValueError when a file is damaged.
    """
    file = _resume_file(folder)
    state = load_state(file) if file.exists() else {"group": 0}
    if ranks.rank() > 0 and "step" in state:
        state["store"] = load_state(_share_file(folder, state["step"], ranks.rank()))["store"]
    return state


def _resume_file(folder: Path) -> Path:
    return folder / (f"resume-team-{ranks.team()}.safetensors" if ranks.team() > 0 else RESUME)


def _share_file(folder: Path, step: int | str, rank: int | str) -> Path:
    """Name the file for a process that shares batches and is not the first."""
    return folder / f"resume-step-{step}-rank-{rank}.safetensors"


class RunLog:
    """The output of the SAEs trained together: one W&B run each, grouped by the folder's name.

    Resumed from `step`, it passes over the rows that were logged after that step before the interruption: training
    repeats them exactly. Whatever W&B does, training goes on: where it fails a line says so, and the metrics are in
    metrics.jsonl. Among processes that share batches only the first writes, except for what the others alone know.
    """

    def __init__(self, folder: Path, cfgs: list[Config], group: int = 0, step: int = 0) -> None:
        self.folder, self._group = folder, group
        self._writes = ranks.rank() == 0
        self._folders = [folder / cfg.name for cfg in cfgs] if self._writes else []
        self._repeated: list[int] = []  # rows that will be logged again
        for cfg, sae_folder in zip(cfgs, self._folders):
            sae_folder.mkdir(parents=True, exist_ok=True)
            write_durably(sae_folder / "config.json", json.dumps(cfg.to_dict(), indent=2).encode())
            metrics = sae_folder / METRICS
            metrics.touch()
            *lines, unfinished = metrics.read_bytes().split(b"\n")
            os.truncate(metrics, metrics.stat().st_size - len(unfinished))
            self._repeated.append(sum(parse_json(line, str(metrics))["step"] > step for line in lines))
        self._runs = self._begin_wandb(cfgs)

    def _begin_wandb(self, cfgs: list[Config]) -> list[Run | None]:
        """Begin each SAE's run, or go on with it: offline once the service cannot be used, or not at all."""
        mode, runs = cfgs[0].wandb_mode, []
        for cfg, sae_folder in zip(cfgs, self._folders):
            run, id_file = None, sae_folder / "wandb_id"
            run_id = id_file.read_text() if id_file.exists() else None  # then wandb takes WANDB_RUN_ID, an agent's
            for tried in dict.fromkeys([mode, "offline"]):
                mode = tried
                try:
                    run = self._begin_run(cfg, run_id, mode)
                    write_durably(id_file, run.id.encode())
                    break
                except Exception as error:  # W&B may fail in any way, and keeps the id of a run that it could not begin
                    tqdm.write(f"W&B cannot be used as {mode} ({one_line(error)}); metrics are also in {METRICS}")
                    run_id = None
            runs.append(run)
        return runs

    def _begin_run(self, cfg: Config, run_id: str | None, mode: str) -> Run:
        seconds = (UPLOAD_SECONDS if cfg.wandb_artifacts else WANDB_SECONDS) / len(self._folders)
        return wandb.init(
            project=cfg.wandb_project,
            name=cfg.name,
            id=run_id,
            resume="allow",
            group=self.folder.name,
            config=cfg.to_dict(),
            mode=mode,
            dir=self.folder,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, disable_git=True, console="off", finish_timeout=seconds, finish_timeout_raises=True
            ),
        )

    def log(self, index: int, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write down metrics of the SAE cfgs[index] after `step` steps, `tokens` activations."""
        if not self._writes:
            return
        if self._repeated[index]:
            self._repeated[index] -= 1
            return
        row = {"step": step, "tokens": tokens, **metrics}
        with (self._folders[index] / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._tell_wandb(index, step, lambda run: run.log(row, step=step))

    def _tell_wandb(self, index: int, step: int, tell: Callable[[Run], object]) -> None:
        """Pass something to an SAE's W&B run, and go on without W&B once that fails."""
        try:
            if self._runs[index] is not None:
                tell(self._runs[index])
        except Exception as error:  # of a service out of our hands
            self._runs[index] = None
            file = self._folders[index] / METRICS
            tqdm.write(f"W&B failed at step {step} ({one_line(error)}); metrics go on in {file}")

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> None:
        """Save the SAE as it is after `step` steps, and upload it where wandb_artifacts asks for that."""
        if not self._writes:
            return
        folder = self.folder / sae.cfg.name
        save_checkpoint(sae, folder / f"step-{step:06d}")
        if sae.cfg.wandb_artifacts:
            upload = partial(_upload, folder=folder / f"step-{step:06d}", step=step)
            self._tell_wandb(self._folders.index(folder), step, upload)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write, in place of the last one, what `load_progress` reads for a later resume."""
        if not self._writes:
            save_state({"store": state["store"]}, _share_file(self.folder, state["step"], ranks.rank()))
        ranks.any_of(False)  # all have written, so what follows makes their files count
        if self._writes:
            for folder in self._folders:
                flush(folder / METRICS)
            self._commit({"group": self._group, **state})

    def finish(self) -> None:
        """Note that the group is trained, so that a resume begins with the next."""
        if self._writes:
            self._commit({"group": self._group + 1})

    def _commit(self, state: dict[str, Any]) -> None:
        save_state(state, _resume_file(self.folder))
        others = [_share_file(self.folder, state.get("step", ""), rank) for rank in range(1, ranks.count())]
        for file in self.folder.glob("*" + _share_file(self.folder, "*", "*").name + "*"):  # half-written ones too
            if file not in others:
                file.unlink()

    def close(self) -> None:
        """End the W&B runs, without waiting long for a slow service."""
        for run in filter(None, self._runs):
            try:
                run.finish()
            except Exception as error:  # of a service out of our hands, or because it is slow
                unsent = f"what it has not been sent lies in {self.folder}/wandb; use `wandb sync`"
                tqdm.write(f"W&B failed at the end ({one_line(error)}); {unsent}")


def _upload(run: Run, folder: Path, step: int) -> None:
    """Log a checkpoint as an artifact of an SAE's run."""
    artifact = wandb.Artifact(folder.parent.name[-ARTIFACT_NAME:], type="model", metadata={"step": step})
    for file in folder.iterdir():
        artifact.add_file(str(file), policy="immutable")  # which makes no copy
    run.log_artifact(artifact)
