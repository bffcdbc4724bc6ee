"""Train sparse autoencoders on a transformer's activations.

Two sweeps have names, to be given before all options:
- python main.py         four types at three sparsities each, embedded model
- python main.py gpt2    GPT-2 small, as in the BatchTopK paper

Every field of Config is an option. One that is given several values is swept.
"""

import itertools
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

from config import SWEEPS, Config, field_docs


@dataclass(frozen=True)
class Sweep:
    sweep: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar=f"[{{{','.join(SWEEPS)}}}]")] = "tiny"
    """Named sweep that the options below change."""
    resume: str | None = None
    """Folder of a sweep that was stopped: go on to the end it would have come to. Takes no other option."""


def _option(field: str, annotation: object) -> tuple[str, object, tuple]:
    default = Config.__dataclass_fields__[field].default
    text = f"{field_docs()[field]} (Config's default: {default})"
    metavar = None
    if get_origin(annotation) is Literal:  # Config refuses other values, in one line
        annotation, metavar = str, f"[{{{','.join(get_args(annotation))}}} ...]"
    arg = tyro.conf.arg(help=text, help_behavior_hint="", metavar=metavar)
    return field, Annotated[tuple[annotation, ...], arg], ()


Options = make_dataclass(
    "Options", [_option(f, t) for f, t in get_type_hints(Config).items()], bases=(Sweep,), frozen=True
)
Options.__doc__ = __doc__


def override(cfgs: list[Config], options: Sweep) -> list[Config]:
    """The sweep with the options applied: each Config times every combination of the values given, without repeats."""
    given = {f.name: getattr(options, f.name) for f in fields(Config) if getattr(options, f.name)}
    if types := given.pop("sae_type", ()):
        known = [cfg for cfg in cfgs if cfg.sae_type in types]
        cfgs = known + [replace(cfgs[0], sae_type=t) for t in types if t not in {cfg.sae_type for cfg in known}]
    combined = [
        replace(cfg, **dict(zip(given, values))) for cfg in cfgs for values in itertools.product(*given.values())
    ]
    return list({cfg.name: cfg for cfg in combined}.values())


def check(cfgs: list[Config]) -> list[Config]:
    """The Configs with act_size filled in, after what can be known about model and text without loading the model.

    Raises ValueError or OSError when there is no such model or text, or they do not fit.
    """
    import torch

    from activation_store import check_model
    from text import load_documents

    for cfg in cfgs:
        device = cfg.torch_device
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device = {cfg.device!r}: torch sees {torch.cuda.device_count()} GPUs; give cpu or another"
            )
    checked = [check_model(cfg) for cfg in cfgs]
    for path, name in {(cfg.dataset_path, cfg.dataset_name): None for cfg in cfgs}:
        load_documents(path, name, held_out=True)
    return checked


def run(cfgs: list[Config], folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Train the SAEs of a sweep, one pass of the language model for all that can share it, and write the results.

    Goes on where the folder's last run stopped, if there was one. Raises what `training.train` does.
    """
    # Imported late: a mistake on the command line is answered at once.
    from transformers.utils.logging import disable_progress_bar

    import results
    from activation_store import ActivationsStore, load_model
    from logs import RunLog, begin_sweep, load_progress
    from sae import build_sae
    from training import Stopped, train

    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are a line each
    cfgs = check(cfgs)
    groups: dict[tuple, list[Config]] = {}
    for cfg in cfgs:
        groups.setdefault(cfg.stream, []).append(cfg)
    progress = load_progress(folder)
    for index, group in list(enumerate(groups.values()))[progress["group"] :]:
        cfg = group[0]
        saes = "1 SAE" if len(group) == 1 else f"{len(group)} SAEs"
        print(
            f"{saes} on {cfg.model_name} {cfg.hook_point}, {cfg.num_steps * cfg.batch_size:,} activations", flush=True
        )
        state = progress if progress["group"] == index and "step" in progress else None
        model = load_model(cfg)
        store = ActivationsStore(model, cfg, state and state["store"])
        begin_sweep(folder, cfgs)
        log = RunLog(folder, group, index, state and state["log"])
        try:
            train([build_sae(c) for c in group], store, log, state, should_stop)
            log.finish()
        except Stopped as stopped:
            print(f"{stopped}; to go on: python main.py --resume {folder}")
            return
        finally:
            log.close()

    table = results.load_results(folder)
    table.to_csv(folder / "results.csv", index=False)
    print(f"\n{results.format_table(table)}\n")
    print(f"table        {folder / 'results.csv'}")
    print(f"checkpoints  {folder}/<name>/step-*  ({table['checkpoint'].notna().sum()})")
    if any(c.wandb_mode == "offline" for c in cfgs):
        print(f"W&B          wandb sync {folder}/wandb/offline-run-*")
    for figure in results.save_figures(table, folder):
        print(f"plot         {figure}")


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
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)


def main() -> None:
    options = tyro.cli(Options, prog="main.py")
    folder = None
    try:
        if options.resume is not None:
            if options != replace(options, sweep="tiny", **dict.fromkeys((f.name for f in fields(Config)), ())):
                raise ValueError(f"resume = {options.resume!r}: give it alone; its Configs are in the folder")
            from logs import read_sweep

            folder = Path(options.resume)
            cfgs = read_sweep(folder)
        else:
            if options.sweep not in SWEEPS:
                raise ValueError(f"sweep = {options.sweep!r}: give one of {', '.join(SWEEPS)}")
            cfgs = override(SWEEPS[options.sweep](), options)
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            folder = Path(cfgs[0].output_dir) / f"{options.sweep}-{stamp}"
        with StopAfterStep() as stop:
            run(cfgs, folder, lambda: stop.asked)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        saved = folder is not None and (folder / "resume.safetensors").exists()
        hint = f"; to go on: python main.py --resume {folder}" if saved else ""
        print(f"main.py: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
