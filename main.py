"""Train the sparse autoencoders of a sweep: python main.py --help."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import cli

if __name__ == "__main__":  # before torch is imported, which takes a second
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if answer := cli.answer(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what is piped into `head` ends there
        print(answer)
        sys.exit()

import ranks
from config import Config, by_stream


def check_machine(cfgs: list[Config]) -> None:
    """Raises ValueError when there is no such device, processes cannot share the batches, or nothing can be written."""
    import torch

    for cfg in cfgs:
        if cfg.batch_size % ranks.count():
            raise ValueError(
                f"batch_size = {cfg.batch_size}: {ranks.count()} processes share it; give a multiple of that"
            )
        device = cfg.torch_device
        if device.index is not None and ranks.world_size() > 1:
            raise ValueError(f"device = {cfg.device!r}: each process of torchrun has its own; give {device.type}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device = {cfg.device!r}: torch sees {torch.cuda.device_count()} GPUs; give cpu or another"
            )
        output = Path(cfg.output_dir).absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=existing) as file:
                is_shared = not ranks.in_any(not os.path.exists(ranks.from_first(file.name)))
        except OSError as error:
            raise ValueError(
                f"output_dir = {cfg.output_dir!r}: {existing} cannot be written to ({error.strerror}); give another"
            ) from None
        if not is_shared:
            raise ValueError(f"output_dir = {cfg.output_dir!r}: not the same on all machines; give one that all share")


def check(cfgs: list[Config]) -> list[Config]:
    """The Configs with act_size filled in, after what can be known about model, text and output without the weights.

    Raises ValueError or OSError when there is no such model or text, they do not fit, or nothing can be written.
    """
    check_machine(cfgs)

    import datasets

    from activation_store import check_model, check_text

    checked = [check_model(cfg) for cfg in cfgs]
    texts = {(c.dataset_path, c.dataset_name, c.model_name, c.seq_len): c for c in checked}
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # of 5 s after a pass over a file: our exit waits for no thread
    for cfg in texts.values():
        check_text(cfg)
    return checked


def run(cfgs: list[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Train the SAEs of a sweep, one pass of the language model for all that can share it, and write the results.

    Goes on where the folder's last run stopped, if there was one. Processes of torchrun all call this. Raises what
    `training.train` does.
    """
    from huggingface_hub.utils.logging import set_verbosity_error  # late: a mistake is answered at once

    set_verbosity_error()  # retries are a line each
    cfgs = check(cfgs)

    from transformers.utils.logging import disable_progress_bar

    import results
    from logs import begin_sweep, load_progress
    from training import Stopped

    disable_progress_bar()
    progress = load_progress(folder)
    groups = by_stream(cfgs)
    if folder.exists() and progress == {"group": 0}:
        print("no state was saved: from the beginning", flush=True)
    if progress["group"] == len(groups):
        print("it had ended", flush=True)
    begun, stopped, own = progress["group"], None, ranks.own(cfgs)
    try:
        for index, group in list(enumerate(groups))[begun:]:
            state = progress if index == begun and "step" in progress else None
            if trained_here := [cfg for cfg in group if cfg in own]:
                _train_group(trained_here, index, folder, state, should_stop, lambda: begin_sweep(folder, cfgs))
    except Stopped as error:
        stopped = error
    if ranks.finish(stopped is not None):
        print(f"{stopped or 'other processes were stopped'}; {_how_to_go_on(folder)}")
        return
    if ranks.world_rank() > 0:
        return

    table = results.load_results(folder)
    table.to_csv(folder / "results.csv", index=False)
    print(f"\n{results.format_table(table)}\n")
    print(f"table        {folder / 'results.csv'}")
    print(f"checkpoints  {folder}/<name>/step-*  ({table['checkpoint'].notna().sum()})")
    if any(c.wandb_mode == "offline" for c in cfgs):
        print(f"W&B          wandb sync {folder}/wandb/offline-run-*")
    figures = results.save_figures(table, folder, results.load_history(folder), results.decoder_cosines(table))
    for figure in figures[::2]:
        print(f"figure       {figure}, .pdf")


def estimate(cfgs: list[Config]) -> None:
    """Print what a run would be."""
    if ranks.world_size() > 1:
        raise ValueError("--dry-run: it estimates one process; give it without torchrun")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    check_machine(cfgs)
    import huggingface_hub.constants

    from dry_run import describe

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a newer version of the model is not fetched either

    for line in describe(cfgs):
        print(line, flush=True)


def _train_group(
    cfgs: list[Config],
    index: int,
    folder: Path,
    state: dict[str, Any] | None,
    should_stop: Callable[[], bool],
    begin: Callable[[], None],
) -> None:
    """Train SAEs that share a stream. A function of its own: the next group needs the memory of this one's model."""
    from activation_store import ActivationsStore, load_model
    from logs import RunLog
    from sae import SAE_TYPES
    from training import heading, train

    cfg = cfgs[0]
    on = f", on from step {state['step']:,}" if state else ""
    print(f"{heading(cfgs)}{on}", flush=True)
    store = ActivationsStore(load_model(cfg), cfg, state and state["store"])
    saes = [SAE_TYPES[c.sae_type](c) for c in cfgs]  # `train` places them
    begin()  # writes, now that all that can be refused was
    log = RunLog(folder, cfgs, index, state and state["log"])
    try:
        train(saes, store, log, state, should_stop)
        log.finish()
    finally:
        log.close()


def _how_to_go_on(folder: Path) -> str:
    program = "python" if ranks.world_size() == 1 else "torchrun ..."
    return f"to go on: {program} main.py --resume {folder}"


def _saved(folder: Path | None) -> str:
    """How to go on, where a state was saved."""
    return _how_to_go_on(folder) if folder is not None and any(folder.glob("resume*.safetensors")) else ""


class StopAfterStep:
    """While active, says after each step whether SIGTERM or Ctrl-C asked to stop.

    A second Ctrl-C stops at once, as does one before the first step, where there is nothing to save: KeyboardInterrupt.
    Not so where processes wait for each other: of these some would have begun.
    """

    def __init__(self) -> None:
        self.asked, self.has_begun = False, ranks.world_size() > 1

    def __call__(self) -> bool:
        self.has_begun = True
        return self.asked

    def __enter__(self) -> "StopAfterStep":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and (self.asked or not self.has_begun):
            raise KeyboardInterrupt
        self.asked = True
        if ranks.world_rank() == 0:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)


def main() -> None:
    if ranks.world_rank() > 0:  # the first process alone speaks, unless another has an error to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    folder = None
    try:
        options = cli.parse(sys.argv[1:])
        if options.resume is not None:
            from logs import read_sweep

            folder = Path(options.resume)
            cfgs = read_sweep(folder)
        else:
            cfgs = options.configs()
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs on several GPUs may start in the same second
            folder = Path(cfgs[0].output_dir) / f"{options.sweep}-{stamp}"
        if options.dry_run:
            estimate(cfgs)
            return
        ranks.start(cfgs[0].share, cfgs[0].torch_device)
        folder = Path(ranks.from_first(str(folder)))
        with StopAfterStep() as stop:
            run(cfgs, folder, stop)
    except KeyboardInterrupt:
        if ranks.world_rank() == 0:
            print(f"main.py: stopped at once; {_saved(folder) or 'no state was saved'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        hint = f"; {saved}" if isinstance(error, OSError) and (saved := _saved(folder)) else ""
        process = f"rank {ranks.world_rank()}: " if ranks.world_size() > 1 else ""
        print(f"main.py: {process}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    # Python's own end is slow after so many imports, and hangs or aborts while pyarrow's threads read ahead.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
