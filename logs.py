"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints, the state to resume from.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    sweep.json                 the Configs of all its SAEs
    resume.safetensors         all that a resumed run needs, of the latest time it was saved
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        wandb_id, wandb_sent   the id of its W&B run; how many rows that had before an interruption
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000195/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import contextlib
import json
import os
import time
from pathlib import Path
from threading import Thread
from typing import Any

import wandb
from tqdm import tqdm
from wandb import Run

from checkpoint import save_checkpoint
from config import Config
from runtime import ranks
from runtime.checks import explained, one_line, require
from runtime.disk import flush, load_state, save_state, write_durably
from sae import BaseAutoencoder

SWEEP, RESUME, METRICS = "sweep.json", "resume.safetensors", "metrics.jsonl"
WANDB_SECONDS = 60


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
    """Read how far a sweep has come: "group", the number of the group of SAEs in training, and once that has taken a
    step, its "step", "trainers", "store" and "log".

    Raises ValueError when a file is damaged.
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

    With the "log" of `load_progress` it goes on after the last row which that state covers. Whatever W&B does,
    training goes on: where it fails a line says so, and the metrics are in metrics.jsonl. Among processes that share
    batches only the first writes, except for what the others alone know.
    """

    def __init__(self, folder: Path, cfgs: list[Config], group: int = 0, state: dict[str, Any] | None = None) -> None:
        self.folder, self._group = folder, group
        self._writes = ranks.rank() == 0
        self._folders = [folder / cfg.name for cfg in cfgs] if self._writes else []
        sizes = [0] * len(cfgs) if state is None else state["metrics_bytes"]
        self._sent: list[int] = []  # rows that will be logged again and W&B already has
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
            settings=wandb.Settings(silent=True, disable_git=True, console="off"),
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
