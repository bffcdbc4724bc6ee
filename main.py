"""Train sparse autoencoders on a transformer's activations.

Two sweeps have names, to be given before all options:
- python main.py         four types at three sparsities each, embedded model
- python main.py gpt2    GPT-2 small, as in the BatchTopK paper

Every field of Config is an option. One that is given several values is swept.
"""

import contextlib
import difflib
import itertools
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

import ranks
from config import SWEEPS, Config, field_docs


def _words(kinds: tuple[type, ...], metavar: str) -> PrimitiveConstructorSpec:
    """An option's words as values, any number of them: what is wrong with them is said here, in one line."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(_value(word, kinds) for word in words),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [],
    )


@dataclass(frozen=True)
class Sweep:
    sweep: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar=f"[{{{','.join(SWEEPS)}}}]")] = "tiny"
    """Named sweep that the options below change."""
    resume: Annotated[tuple | None, _words((str,), "FOLDER"), tyro.conf.arg(help_behavior_hint="")] = None
    """Folder of a sweep that was stopped: go on to the end it would have come to. Takes no other option."""


def _option(field: str, annotation: Any) -> tuple[str, object, None]:
    default = Config.__dataclass_fields__[field].default
    text = f"{field_docs()[field]} (Config's default: {default})"
    if get_origin(annotation) is Literal:
        kinds, metavar = (str,), f"{{{','.join(get_args(annotation))}}}"
    else:
        kinds = get_args(annotation) or (annotation,)
        metavar = "|".join({bool: "{True,False}", NoneType: "None"}.get(kind, kind.__name__.upper()) for kind in kinds)
    return (
        field,
        Annotated[tuple | None, _words(kinds, f"{metavar} ..."), tyro.conf.arg(help=text, help_behavior_hint="")],
        None,
    )


def _value(word: str, kinds: tuple[type, ...]) -> object:
    """The word as a value of one of the kinds, or as it is for Config to refuse in one line."""
    for value in (None, True, False):
        if word == str(value) and type(value) in kinds:
            return value
    for kind in (int, float):
        if kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(word)
    return word


Options = make_dataclass(
    "Options", [_option(f, t) for f, t in get_type_hints(Config).items()], bases=(Sweep,), frozen=True
)
Options.__doc__ = __doc__


def parse(args: list[str]) -> Sweep:
    """The command line's options. Raises ValueError at a word that is none."""
    options, unknown = tyro.cli(Options, prog="main.py", args=args, return_unknown_args=True)
    if unknown:
        names = ["--" + f.name.replace("_", "-") for f in fields(Config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{unknown[0]}: no such option; {hint}python main.py --help lists them")
    return options


def override(cfgs: list[Config], options: Sweep) -> list[Config]:
    """The sweep with the options applied: each Config times every combination of the values given, without repeats."""
    given = {f.name: getattr(options, f.name) for f in fields(Config) if getattr(options, f.name) is not None}
    for field, values in given.items():
        if not values:
            raise ValueError(f"--{field.replace('_', '-')}: no value; give one or several after it")
    if types := given.pop("sae_type", ()):
        known = [cfg for cfg in cfgs if cfg.sae_type in types]
        cfgs = known + [replace(cfgs[0], sae_type=t) for t in types if t not in {cfg.sae_type for cfg in known}]
    combined = [
        replace(cfg, **dict(zip(given, values))) for cfg in cfgs for values in itertools.product(*given.values())
    ]
    return list({cfg.name: cfg for cfg in combined}.values())


def check(cfgs: list[Config]) -> list[Config]:
    """The Configs with act_size filled in, after what can be known about model, text and output without the weights.

    Raises ValueError or OSError when there is no such model or text, they do not fit, or nothing can be written.
    """
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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are a line each
    cfgs = check(cfgs)
    groups: dict[tuple, list[Config]] = {}
    for cfg in cfgs:
        groups.setdefault(cfg.stream, []).append(cfg)

    # Imported late: a mistake is answered at once.
    from transformers.utils.logging import disable_progress_bar

    import results
    from logs import begin_sweep, load_progress
    from training import Stopped

    disable_progress_bar()
    progress = load_progress(folder)
    begun, stopped, own = progress["group"], None, ranks.own(cfgs)
    try:
        for index, group in list(enumerate(groups.values()))[begun:]:
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
    from training import train

    cfg = cfgs[0]
    count = "1 SAE" if len(cfgs) == 1 else f"{len(cfgs)} SAEs"
    print(f"{count} on {cfg.model_name} {cfg.hook_point}, {cfg.num_steps * cfg.batch_size:,} activations", flush=True)
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


class StopAfterStep:
    """While active, SIGTERM and the first Ctrl-C only set `asked`; the second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopAfterStep":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if ranks.world_rank() == 0:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)


def main() -> None:
    if ranks.world_rank() > 0:  # the first process alone speaks, unless another has an error to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    folder = None
    try:
        options = parse(sys.argv[1:])
        if options.resume is not None:
            if len(options.resume) != 1 or options != Options(resume=options.resume):
                raise ValueError("--resume: give it one folder and no other option; the Configs are in the folder")
            from logs import read_sweep

            folder = Path(*options.resume)
            cfgs = read_sweep(folder)
        else:
            if options.sweep not in SWEEPS:
                raise ValueError(f"sweep = {options.sweep!r}: give one of {', '.join(SWEEPS)}")
            cfgs = override(SWEEPS[options.sweep](), options)
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            folder = Path(cfgs[0].output_dir) / f"{options.sweep}-{stamp}"
        ranks.start(cfgs[0].share, cfgs[0].torch_device)
        folder = Path(ranks.from_first(str(folder)))
        with StopAfterStep() as stop:
            run(cfgs, folder, lambda: stop.asked)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        saved = isinstance(error, OSError) and folder is not None and any(folder.glob("resume*.safetensors"))
        hint = f"; {_how_to_go_on(folder)}" if saved else ""
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
