"""Train sparse autoencoders on a transformer's activations.

`python main.py` trains the tiny sweep on the embedded model; `python main.py gpt2` the one of the BatchTopK paper.
Every field of Config is an option; one that is given several values sweeps over them.
"""

import itertools
import sys
from dataclasses import dataclass, fields, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import tyro

from config import SWEEPS, Config, field_docs


@dataclass(frozen=True)
class Sweep:
    sweep: Annotated[Literal[tuple(SWEEPS)], tyro.conf.Positional] = "tiny"
    """Named sweep that the options below change."""


def _option(field: str, annotation: object) -> tuple[str, object, tuple]:
    default = Config.__dataclass_fields__[field].default
    text = f"{field_docs()[field]} (Config's default: {default})"
    return field, Annotated[tuple[annotation, ...], tyro.conf.arg(help=text, help_behavior_hint="")], ()


Options = make_dataclass(
    "Options", [_option(f, t) for f, t in get_type_hints(Config).items()], bases=(Sweep,), frozen=True
)
Options.__doc__ = __doc__


def override(cfgs: list[Config], options: Sweep) -> list[Config]:
    """The sweep with the options applied: each Config times every combination of the values given, without repeats."""
    given = {f.name: getattr(options, f.name) for f in fields(Config) if getattr(options, f.name)}
    combined = [
        replace(cfg, **dict(zip(given, values))) for cfg in cfgs for values in itertools.product(*given.values())
    ]
    return list({cfg.name: cfg for cfg in combined}.values())


def run(cfgs: list[Config], folder: Path) -> None:
    """Train the SAEs of a sweep, one pass of the language model for all that can share it, and write the results."""
    # Imported late: a mistake on the command line is answered at once.
    import results
    from activation_store import ActivationsStore, check_model, load_model
    from logs import RunLog
    from sae import build_sae
    from training import train

    groups: dict[tuple, list[Config]] = {}
    for cfg in map(check_model, cfgs):
        groups.setdefault(cfg.stream, []).append(cfg)
    for group in groups.values():
        cfg = group[0]
        print(f"{len(group)} SAEs on {cfg.model_name} {cfg.hook_point}, {cfg.num_steps * cfg.batch_size:,} activations")
        model = load_model(cfg)
        store = ActivationsStore(model, cfg)
        log = RunLog(folder, group)
        train([build_sae(c) for c in group], store, log)
        log.close()

    table = results.load_results(folder)
    table.to_csv(folder / "results.csv", index=False)
    figures = results.save_figures(table, folder)
    print(results.format_table(table))
    print(f"table        {folder / 'results.csv'}")
    for figure in figures:
        print(f"plot         {figure}")
    print(f"checkpoints  {folder}/<name>/step-*  ({table['checkpoint'].notna().sum()})")
    if any(c.wandb_mode == "offline" for c in cfgs):
        print(f"W&B, offline: wandb sync {folder}/wandb/offline-run-*")


def main() -> None:
    options = tyro.cli(Options, prog="main.py")
    try:
        cfgs = override(SWEEPS[options.sweep](), options)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        run(cfgs, Path(cfgs[0].output_dir) / f"{options.sweep}-{stamp}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
