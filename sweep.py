"""Run a sweep: Configs -> checks -> model, store, SAEs -> train -> table and figures."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import torch
from huggingface_hub.utils.logging import set_verbosity_error
from transformers.utils.logging import disable_progress_bar

import results
from activation_store import ActivationsStore
from analysis.figures import save_figures
from config import Config, by_stream
from language_model import check_hooks, check_model, load_model
from logs import RunLog, begin_sweep, load_progress, read_sweep
from runtime import ranks
from runtime.checks import explained, require
from runtime.dry_run import describe
from sae import SAE_TYPES
from text import check_text
from training import Stopped, heading, train

if TYPE_CHECKING:  # importing it takes ten seconds
    from transformer_lens.model_bridge import TransformerBridge


def start(name: str, cfgs: list[Config]) -> tuple[list[Config], Path]:
    """Join the other processes, if there are any, and name the folder of a new sweep."""
    ranks.start(cfgs[0].share, cfgs[0].torch_device)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs on several GPUs may start in the same second
    return cfgs, Path(ranks.from_first(f"{cfgs[0].output_dir}/{name}-{stamp}"))


def resume(folder: Path) -> tuple[list[Config], Path]:
    """Read the Configs of a sweep, and join the other processes, if there are any."""
    cfgs = read_sweep(folder)
    ranks.start(cfgs[0].share, cfgs[0].torch_device)
    return cfgs, folder


def check_machine(cfgs: list[Config]) -> None:
    """Raise ValueError when there is no such device, processes cannot share the batches, or nothing can be written."""
    gpus = torch.cuda.device_count()
    for cfg in cfgs:
        shared = f"batch_size = {cfg.batch_size}: {ranks.count()} processes share it; give a multiple of that"
        require(cfg.batch_size % ranks.count() == 0, shared)
        device, said = cfg.torch_device, f"device = {cfg.device!r}"
        own = f"{said}: each process of torchrun has its own; give {device.type}"
        require(device.index is None or ranks.world_size() == 1, own)
        seen = device.type != "cuda" or (device.index or 0) < gpus
        require(seen, f"{said}: torch sees {gpus} GPUs; give cpu or another")
    for output_dir in dict.fromkeys(cfg.output_dir for cfg in cfgs):
        output, said = Path(output_dir).absolute(), f"output_dir = {output_dir!r}"
        existing = next(path for path in (output, *output.parents) if path.exists())
        with explained(f"{said}: {existing} cannot be written to", OSError, remedy="give another"):
            descriptor, file = tempfile.mkstemp(dir=existing)
        os.close(descriptor)
        missing = ranks.in_any(not os.path.exists(ranks.from_first(file)))
        os.unlink(file)
        require(not missing, f"{said}: not the same on all machines; give one that all share")


def check(cfgs: list[Config]) -> list[Config]:
    """Fill in act_size, after what can be known about machine, model and text without the weights.

    Raises ValueError or OSError when there is no such model or text, they do not fit, or nothing can be written.
    """
    check_machine(cfgs)
    cfgs = [check_model(cfg) for cfg in cfgs]
    for cfg in {(c.dataset_path, c.dataset_name, c.model_name, c.seq_len): c for c in cfgs}.values():
        check_text(cfg)
    return cfgs


class _Model:
    """Hold one language model at a time: the next one may need the memory of the last."""

    def __init__(self) -> None:
        self._key, self._model = None, None

    def of(self, cfg: Config) -> "TransformerBridge":
        key = (cfg.model_name, cfg.dtype, cfg.device)
        if key != self._key:
            self._model = None
            self._key, self._model = key, load_model(cfg)
        check_hooks(self._model, cfg)
        return self._model


def run(cfgs: list[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Train the SAEs of a sweep, one pass of the language model for all that can share it, and write the results.

    Goes on where the folder's last run stopped, if there was one. Processes of torchrun all call this. Raises what
    `training.train` does.
    """
    set_verbosity_error()  # retries are a line each
    disable_progress_bar()
    cfgs = check(cfgs)
    progress, groups, own, model = load_progress(folder), by_stream(cfgs), ranks.own(cfgs), _Model()
    left, stopped = list(enumerate(groups))[progress["group"] :], None
    if folder.exists() and progress == {"group": 0}:
        print("no state was saved: from the beginning", flush=True)
    if not left:
        print("this sweep has been trained to its end", flush=True)
    for _, (cfg, *_) in reversed(left):
        model.of(cfg)  # before anything is trained, so that a hook which a later group lacks is told now
    try:
        for index, group in left:
            state = progress if "step" in progress else None
            progress = {}
            if trained_here := [cfg for cfg in group if cfg in own]:
                begin = partial(begin_sweep, folder, cfgs)
                _train_group(trained_here, index, folder, state, should_stop, model, begin)
    except Stopped as error:
        stopped = str(error)
    ranks.say_done(stopped is not None)
    while ranks.world_rank() == 0 and not ranks.all_done() and not should_stop():
        time.sleep(0.5)
    if stopped is None and ranks.world_rank() == 0 and (not ranks.all_done() or ranks.any_stopped()):
        stopped = "other processes were stopped"
    ranks.finish()
    if ranks.world_rank() > 0:
        return
    if stopped is not None:
        program = "python" if ranks.world_size() == 1 else "torchrun ..."
        print(f"{stopped}; to go on: {program} main.py --resume {folder}")
        return

    table = results.load_results(folder)
    table.to_csv(folder / "results.csv", index=False)
    print(f"\n{results.format_table(table)}\n")
    print(f"table        {folder / 'results.csv'}")
    print(f"checkpoints  {folder}/<name>/step-*  ({table['checkpoint'].notna().sum()})")
    if any(cfg.wandb_mode == "offline" for cfg in cfgs):
        print(f"W&B          wandb sync {folder}/wandb/offline-run-*")
    for figure in save_figures(table, folder, results.load_history(folder), results.decoder_cosines(table))[::2]:
        print(f"figure       {figure}, .pdf")


def _train_group(
    cfgs: list[Config],
    index: int,
    folder: Path,
    state: dict[str, Any] | None,
    should_stop: Callable[[], bool],
    model: _Model,
    begin: Callable[[], None],
) -> None:
    """Train the SAEs that share a stream."""
    on = f", on from step {state['step']:,}" if state else ""
    print(f"{heading(cfgs)}{on}", flush=True)
    store = ActivationsStore(model.of(cfgs[0]), cfgs, state and state["store"])
    saes = [SAE_TYPES[cfg.sae_type](cfg) for cfg in cfgs]  # `train` places them
    begin()  # writes, now that all that can be refused was
    log = RunLog(folder, cfgs, index, state and state["log"])
    with contextlib.closing(log):
        train(saes, store, log, state, should_stop)
        log.finish()


def estimate(cfgs: list[Config]) -> None:
    """Print what a run would be, without asking the Hub for anything."""
    require(ranks.world_size() == 1, "--dry-run: it estimates one process; give it without torchrun")
    check_machine(cfgs)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a newer version of the model is not fetched either
    for line in describe(cfgs):
        print(line, flush=True)
