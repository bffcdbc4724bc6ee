"""Turn runs and checkpoints into tables, figures and pages of latents.

python results.py runs/<sweep>            the table, its .csv and figures
python results.py wandb:entity/project    the same, in the current folder
python results.py evaluate <checkpoint>   metrics of SAEs, with intervals
python results.py dashboard <checkpoint>  a page with the latents of an SAE
"""

import math
import re
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pandas as pd
import wandb

from analysis.figures import SETTINGS, over_seeds, row_labels, save_figures, wrapped
from config import TYPES
from runtime.checks import parse_json, require
from runtime.cli import Parser

COLUMNS = {  # metric -> heading in the table, factor, decimals
    "l0": ("L0", 1, 1),
    "explained_variance": ("expl. var.", 1, 3),
    "ce_recovered": ("CE recovered", 1, 3),
    "dead_share": ("dead %", 100, 1),
}
SETTING_WIDTH = 14  # of its column, unless a field is wider


def load_results(source: str | Path, fetch_into: Path | None = None) -> pd.DataFrame:
    """Collect one row per SAE, sorted by type (in the order of config.TYPES), layer, dict_size and L0.

    source: a folder (of one SAE, a sweep or many sweeps), "wandb:entity/project" or "wandb:entity/project/sweep".
    fetch_into: folder for the latest checkpoint of each SAE that W&B has; without it none is fetched.
    Columns:
        run, name            of the sweep and of the SAE: their folders' names, or W&B's group and name
        ...                  the fields of Config; a field that is None can read NaN
        step, tokens         how far training has come, which during a run may be past the last evaluation
        l0, mse, ...         the last value of each "eval/..." metric; those in COLUMNS are NaN before an evaluation
        checkpoint           path of the latest checkpoint, None if there is none here
    Raises ValueError or OSError when the source holds no runs, or a file is corrupt; wandb.Error when W&B refuses.
    """
    from_wandb = str(source).startswith("wandb:")
    rows = _wandb_rows(str(source), fetch_into) if from_wandb else _local_rows(Path(source))
    require(rows, f"{source}: holds no runs")
    df = pd.DataFrame(rows)
    df["checkpoint"] = pd.Series([row["checkpoint"] for row in rows], dtype=object)  # a column of str makes None NaN
    rank = {sae_type: i for i, sae_type in enumerate(TYPES)}
    df["layers"] = df["layer"].map(lambda layer: layer if isinstance(layer, tuple) else (layer,))
    by = ["sae_type", "layers", "dict_size", "l0"]
    df = df.sort_values(by, key=lambda c: c.map(rank) if c.name == "sae_type" else c, ignore_index=True)
    return df.drop(columns="layers")


def load_history(folder: str | Path) -> pd.DataFrame:
    """Collect every line of metrics of the SAEs in a folder: run and name as in `load_results`, then "step", "tokens",
    "train/..." and "eval/...", NaN where a line lacks it.

    Raises ValueError when there is no such folder, or a file in it is corrupt.
    """
    rows = [
        {"run": run, "name": name} | row
        for sae_folder, run, name in _sae_folders(Path(folder))
        for row in _read_metrics(sae_folder / "metrics.jsonl")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "name", "step", "tokens"])


def _local_rows(root: Path) -> list[dict]:
    rows = []
    for folder, run, name in _sae_folders(root):
        file = folder / "config.json"
        steps = {int(p.name[5:]): str(p) for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()}
        last: dict[str, float] = {}  # value of each key, like the summary of a W&B run
        for row in _read_metrics(folder / "metrics.jsonl"):
            last |= row
        config = parse_json(file.read_bytes(), str(file))
        rows.append(_row(run, name, config, last, steps[max(steps)] if steps else None, str(file)))
    return rows


def _sae_folders(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Find the folder of each SAE, the name of its sweep and its own."""
    require(root.is_dir(), f"{root}: no such folder")
    for folder in sorted(path.parent for path in root.rglob("metrics.jsonl")):
        yield folder, *folder.resolve().parts[-2:]


def _wandb_rows(source: str, fetch_into: Path | None) -> list[dict]:
    match = re.fullmatch("wandb:([^/]+/[^/]+)(?:/([^/]+))?", source)
    require(match, f'{source}: give "wandb:entity/project", or "wandb:entity/project/sweep"')
    filters = {"group": match[2]} if match[2] else {}
    rows = []
    for run in wandb.Api().runs(match[1], filters=filters, lazy=False):  # lazy would make a request for every run
        sweep, checkpoint = run.group or "", None
        saved = [] if fetch_into is None else [found for found in run.logged_artifacts() if "step" in found.metadata]
        if saved:
            last = max(saved, key=lambda artifact: artifact.metadata["step"])
            checkpoint = last.download(root=str(fetch_into / sweep / run.name / f"step-{last.metadata['step']:06d}"))
        place = f"{source}, run {run.name}"
        rows.append(_row(sweep, run.name, run.config, run.summary_metrics, checkpoint, place))
    return rows


def _row(run: str, name: str, config: dict, last: dict, checkpoint: str | None, place: str) -> dict:
    missing = {"sae_type", "dict_size", *SETTINGS} - config.keys()
    require(not missing, f"{place}: no field {min(missing, default='')!r}; it is not a Config")
    known = config["sae_type"] in list(TYPES)
    require(known, f"{place}: sae_type {config['sae_type']!r} is none of {', '.join(TYPES)}")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}  # pandas hashes
    progress = {"step": last.get("step", 0), "tokens": last.get("tokens", 0)}
    metrics = {key.removeprefix("eval/"): float(last[key]) for key in last if key.startswith("eval/")}  # W&B has "NaN"
    metrics = dict.fromkeys(COLUMNS, math.nan) | metrics
    return {"run": run, "name": name} | config | progress | metrics | {"checkpoint": checkpoint}


def _read_metrics(path: Path) -> list[dict[str, float]]:
    lines = path.read_bytes().splitlines()
    if lines and not lines[-1].endswith(b"}"):
        lines.pop()  # a killed process left it incomplete
    rows = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        wrong = [key for key, value in row.items() if not isinstance(value, int | float)]
        require(not wrong, f"{path}, line {number}: {', '.join(map(repr, wrong[:1]))} is not a number")
    return rows


def format_table(df: pd.DataFrame) -> str:
    """Write plain text of at most 80 columns (or as wide as a long name), a row per SAE, a table for each sweep.

    setting is what decides the SAE's L0, and whatever else tells it from others of its type. CE recovered is the share
    of the loss of zero ablation that the SAE recovers, dead % the share of its latents; "-" means no evaluation yet.
    SAEs that differ in their seed alone are one row: mean, ± a standard deviation.
    """
    if df["run"].nunique() > 1:
        return "\n\n".join(f"{run[:80]}\n{format_table(saes)}" for run, saes in df.groupby("run"))
    table = [("type", "dict", "setting", *(heading for heading, _, _ in COLUMNS.values()))]
    df = over_seeds(df, [*COLUMNS])
    for sae, label in zip(df.itertuples(), row_labels(df, but=["dict_size"])):
        numbers = [
            _number(scale * getattr(sae, name), scale * getattr(sae, f"{name}_std"), decimals)
            for name, (_, scale, decimals) in COLUMNS.items()
        ]
        label = f"{label}, {sae.seeds} seeds" if sae.seeds > 1 else label
        first, *more = wrapped(label, SETTING_WIDTH)
        table.append((sae.sae_type, str(sae.dict_size), first, *numbers))
        table += [("", "", line, *("" for _ in COLUMNS)) for line in more]
    widths = [max(map(len, column)) for column in zip(*table)]
    row = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<><" + ">" * len(COLUMNS), widths))
    return "\n".join(row.format(*cells).rstrip() for cells in table)


def _number(value: float, std: float, decimals: int) -> str:
    if math.isnan(value):
        return "-"
    number = f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"
    return number if math.isnan(std) else f"{number} ±{std:.{decimals}f}".replace("±0.", "±.")


def report(source: str) -> None:
    """Print the table of trained SAEs, write it and its figures, and say what lies where.

    Files go to `source` or, for W&B, to the current folder, and so do its checkpoints. Raises what `load_results` does.
    """
    df = load_results(source, fetch_into=Path.cwd())
    print(f"\n{format_table(df)}\n\ndrawing figures", flush=True)
    folder, history, cosines, norms = Path.cwd(), None, [], []
    if not source.startswith("wandb:"):
        folder, history = Path(source), load_history(source)
    df.to_csv(folder / "results.csv", index=False)
    print(f"table        {folder / 'results.csv'}")
    if saved := df["checkpoint"].notna().sum():
        from analysis.latents import of_checkpoint  # late, with torch: the table alone is there at once

        print(f"checkpoints  {folder}/**/step-*  ({saved})")
        cosines, norms = zip(*(of_checkpoint(path) if path else (None, None) for path in df["checkpoint"]))
    if any(folder.glob("wandb/offline-run-*")):
        print(f"W&B          wandb sync {folder}/wandb/offline-*")
    for figure in save_figures(df, folder, history, cosines, norms)[::2]:
        print(f"figure       {figure}, .pdf")


def main(words: list[str]) -> None:
    """Do what the words ask for."""
    if words and words[0] in ("dashboard", "evaluate"):
        from analysis import dashboard, measure  # late, with torch and the model's library

        {"dashboard": dashboard.command, "evaluate": measure.command}[words[0]](words[1:])
    else:
        report(table_parser().parse_args(words).source)


def table_parser() -> Parser:
    parser = Parser(prog="results.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder of SAEs, or wandb:entity/project[/sweep]")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, wandb.Error) as error:
        print(f"results.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
