"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints, the state to resume from.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    sweep.json                 the Configs of all its SAEs
    resume.safetensors         all that a resumed run needs, of the latest time it was saved
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        wandb_id, wandb_sent   of its W&B run; after an interruption, how many rows that was given
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000195/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import wandb
from tqdm import tqdm
from wandb import Run

from checkpoint import load_checkpoint, save_checkpoint
from config import Config
from runtime import ranks
from runtime.checks import explained, one_line, require
from runtime.disk import flush, load_state, save_state, write_durably
from sae import BaseAutoencoder

__all__ = ["RunLog", "begin_sweep", "load_checkpoint", "load_progress", "read_sweep", "save_checkpoint"]

SWEEP, RESUME, METRICS = "sweep.json", "resume.safetensors", "metrics.jsonl"
AT_THE_END = {"finish_timeout": 60.0, "finish_timeout_raises": True}  # seconds that W&B is waited for


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
    require(
        file.is_file(), f"{file}: no such file; give the folder of a sweep, such as runs/tiny-20261123-183000-417205"
    )
    with explained(f"{file}: damaged", ValueError, TypeError, KeyError, remedy="begin the sweep anew"):
        sweep = json.loads(file.read_text())
        cfgs, processes = [Config(**fields) for fields in sweep["configs"]], int(sweep["processes"])
        require(cfgs, "no Configs")
    how = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python main.py, without torchrun"
    begun = f"{folder}: begun by {processes} processes, not {ranks.world_size()}; resume it with as many: {how}"
    require(processes == ranks.world_size(), begun)
    return cfgs


def load_progress(folder: Path) -> dict[str, Any]:
    """Read how far a sweep has come: the number of its "group" (of SAEs on one stream) in training, and where that one
    has come further than its beginning, its "step", "trainers", "store" and "log".

    Raises ValueError when a file is damaged, or the processes that share batches do not find the same.
    """
    file = _resume_file(folder)
    state = load_state(file) if file.exists() else {"group": 0}
    found = torch.tensor([state["group"], state.get("step", 0)], dtype=torch.float64)
    shared = f"{folder}: not the same on all machines; give an output_dir on a disk that all of them share"
    require(torch.equal(ranks.mean(found), found), shared)
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
            shorter = f"{metrics}: {len(written)} bytes, {size} when the state was saved; restore the file"
            require(len(written) >= size, shorter)
            sent = max(written.count(b"\n"), int(sent_file.read_text()) if sent_file.exists() else 0)
            if state is not None or sent:
                write_durably(sent_file, str(sent).encode())
            self._sent.append(sent - written[:size].count(b"\n"))
            os.truncate(metrics, size)
        self._runs = self._begin_wandb(cfgs)

    def _begin_wandb(self, cfgs: list[Config]) -> list[Run | None]:
        """Begin each SAE's run, or go on with it; offline once the service cannot be used."""
        asked = os.environ.get("WANDB_RUN_ID")  # by `wandb agent`; wandb.init reads it
        several = f"WANDB_RUN_ID = {asked!r}: one run, and {len(cfgs)} SAEs; give fields one value each, or unset it"
        require(asked is None or len(self._folders) <= 1, several)
        mode, runs = cfgs[0].wandb_mode, []
        for cfg, sae_folder in zip(cfgs, self._folders):
            id_file = sae_folder / "wandb_id"
            try:
                run = self._begin_run(cfg, id_file.read_text() if id_file.exists() else None, mode)
            except Exception as error:  # of a service out of our hands, which keeps the id of a run it could not begin
                tqdm.write(f"W&B cannot be used as {mode} ({one_line(error)}); metrics are also in {METRICS}")
                mode = "offline"
                run = self._begin_run(cfg, None, mode)
            write_durably(id_file, run.id.encode())
            runs.append(run)
        return runs

    def _begin_run(self, cfg: Config, run_id: str | None, mode: str) -> Run:
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
            settings=wandb.Settings(silent=True, disable_git=True, console="off", **AT_THE_END),
        )

    def log(self, index: int, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write down metrics of the SAE cfgs[index] after `step` steps, `tokens` activations."""
        if not self._writes:
            return
        row = {"step": step, "tokens": tokens, **metrics}
        with (self._folders[index] / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        run = self._runs[index] if self._sent[index] == 0 else None
        self._sent[index] = max(0, self._sent[index] - 1)
        try:
            if run is not None:
                run.log(row, step=step)
        except Exception as error:  # of a service out of our hands
            self._runs[index] = None
            file = self._folders[index] / METRICS
            tqdm.write(f"W&B failed at step {step} ({one_line(error)}); metrics go on in {file}")

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> None:
        """Save the SAE as it is after `step` steps."""
        if self._writes:
            save_checkpoint(sae, self.folder / sae.cfg.name / f"step-{step:06d}")

    def save_state(self, state: dict[str, Any]) -> None:
        """Write, in place of the last one, what `load_progress` reads for a later resume."""
        if not self._writes:
            save_state({"store": state["store"]}, _share_file(self.folder, state["step"], ranks.rank()))
        ranks.any_of(False)  # all have written, so what follows makes their files count
        if self._writes:
            for folder in self._folders:
                flush(folder / METRICS)
            log = {"metrics_bytes": [(folder / METRICS).stat().st_size for folder in self._folders]}
            self._commit({"group": self._group, "log": log, **state})

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
        """End the W&B runs, without waiting for a slow service longer than a minute."""
        with ThreadPoolExecutor() as threads:
            ends = [threads.submit(run.finish) for run in self._runs if run is not None]
        if any(end.exception() for end in ends):
            tqdm.write(f"W&B is slow: what it has not been sent lies in {self.folder}/wandb; use `wandb sync`")
