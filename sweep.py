"""Run a sweep: Configs -> checks -> model, store, SAEs -> train -> table and figures."""

import contextlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import huggingface_hub.constants

import cache
import results
from activation_store import ActivationsStore, TensorStore
from config import Config, by_stream, widths_of
from interop.pretrained import new_sae
from language_model import Model, check_hooks, load_model
from logs import RunLog, begin_sweep, load_progress, read_sweep
from runtime import ranks
from runtime.checks import require
from runtime.dry_run import describe
from runtime.preflight import check, check_machine
from sae import SAE_TYPES
from training import Stopped, heading, train


def begin(cfgs: list[Config], name: str, resumed: str | None) -> tuple[list[Config], Path]:
    """Join the other processes, if there are any; return the Configs and the folder of a new sweep or a resumed one."""
    cfgs = cfgs if resumed is None else read_sweep(Path(resumed))
    ranks.start(cfgs[0].share, cfgs[0].torch_device)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs on several GPUs may start in the same second
    return cfgs, Path(resumed or ranks.from_first(f"{cfgs[0].output_dir}/{name}-{stamp}"))


def _model_of(cfg: Config, held: dict[tuple, Model]) -> Model:
    """Load a language model in place of the last one: the next may need its memory."""
    key = (cfg.model_name, cfg.dtype, cfg.device)
    if key not in held:
        held.clear()
        held[key] = load_model(cfg)
    return held[key]


def run(cfgs: list[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False) -> str | None:
    """Train the SAEs of a sweep, one pass of the language model for all that can share it, and write the results.

    Goes on where the folder's last run stopped, if there was one. Processes of torchrun all call this. Returns None, or
    how far it came when it was stopped. Raises what `training.train` does.
    """
    cfgs, progress, held, stopped = check(cfgs, folder), load_progress(folder), {}, None
    # Every hook is tried before anything is trained; the model of the first group is the last to be loaded.
    to_train = [cfg for group in reversed(by_stream(cfgs)[progress["group"] :]) for cfg in group]
    known = {cfg.name: check_hooks(_model_of(cfg, held), cfg) for cfg in to_train}
    cfgs = [known.get(cfg.name, cfg) for cfg in cfgs]
    for cfg in known.values():
        if cfg.init_from:
            new_sae(cfg)  # a mistake in it is told before anything is trained
    own, left = ranks.own(cfgs), list(enumerate(by_stream(cfgs)))[progress["group"] :]
    if folder.exists() and progress == {"group": 0}:
        print("no state was saved; starting from the beginning", flush=True)
    if not left:
        print("this sweep has been trained to its end", flush=True)
    try:
        for index, group in left:
            state = progress if "step" in progress else None
            progress = {}
            if trained_here := [cfg for cfg in group if cfg in own]:
                on = f", on from step {state['step']:,}" if state else ""
                print(f"{heading(trained_here)}{on}", flush=True)
                model, saved = _model_of(group[0], held), state and state["store"]
                if folder_of := group[0].activations:
                    store = TensorStore(folder_of, cfgs=trained_here, model=model, state=saved)
                else:
                    store = ActivationsStore(model, trained_here, saved)
                saes = [SAE_TYPES[cfg.sae_type](cfg) if state else new_sae(cfg) for cfg in trained_here]  # placed later
                begin_sweep(folder, cfgs)  # the first thing written: all that can be refused was checked before
                with contextlib.closing(RunLog(folder, trained_here, index, state["step"] if state else 0)) as log:
                    train(saes, store, log, state, should_stop)
                    log.finish()
                del store, saes  # before the next group's are made
    except Stopped as error:
        stopped = str(error)
    is_whole = ranks.meet(stopped is not None, should_stop)
    if ranks.world_rank() == 0 and is_whole:
        results.report(str(folder))
    return stopped if is_whole or stopped else "other processes were stopped"


def record(cfgs: list[Config], should_stop: Callable[[], bool] = lambda: False) -> str | None:
    """Write the activations that a sweep reads and writes into its output_dir; see `cache.write`."""
    cfg, folder = cfgs[0], Path(cfgs[0].output_dir)
    ranks.start(cfg.share, cfg.torch_device)
    require(ranks.count() == ranks.world_size(), "share = 'saes': processes share what is recorded; leave it out")
    several = "cache: several streams of activations; give one value to each field of model, text and batches"
    require(len(by_stream(cfgs)) == 1, several)
    require(not cfg.activations, f"activations = {cfg.activations!r}: they are recorded already; leave it out")
    cfgs, model = check(cfgs, folder), load_model(cfg)
    cfgs = [check_hooks(model, c) for c in {(c.reads, c.writes): c for c in cfgs}.values()]
    hooks = len(widths_of(cfgs))
    where = f"{hooks} hook{'s' * (hooks > 1)} of {cfg.model_name} into {folder}"
    print(f"recording {cfg.num_steps * cfg.batch_size:,} activations at {where}", flush=True)
    return cache.write(model, cfgs, folder, should_stop)


def estimate(cfgs: list[Config]) -> None:
    """Print what a run would be, without asking the Hub for anything."""
    require(ranks.world_size() == 1, "--dry-run: it estimates one process; give it without torchrun")
    check_machine(cfgs, Path(cfgs[0].output_dir))
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a newer version of the model is not fetched either
    for line in describe(cfgs):
        print(line, flush=True)
