"""Turn runs and checkpoints into tables, figures and pages of latents.

python results.py runs/<sweep>             the table, and beside it .csv and figures
python results.py wandb:entity/project     the same, in the current folder
python results.py dashboard <checkpoint>   a page with the latents of an SAE
"""

import math
import signal
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import pandas as pd
import wandb
from jaxtyping import Float

from analysis.figures import SETTINGS, row_labels, save_figures
from config import TYPES
from runtime.checks import parse_json, require
from runtime.cli import Parser

COLUMNS = {  # metric -> heading in the table, factor, decimals
    "l0": ("L0", 1, 1),
    "explained_variance": ("expl. var.", 1, 3),
    "ce_recovered": ("CE recovered", 1, 3),
    "dead_share": ("dead %", 100, 1),
}
SETTING_WIDTH = 16  # of its column, at most


def load_results(source: str | Path, *, group: str | None = None) -> pd.DataFrame:
    """Collect one row per SAE, sorted by type (in the order of config.TYPES), dict_size and L0.

    source: a folder (of one SAE, a sweep or many sweeps), or "wandb:entity/project". group: the one sweep to read.
    Columns:
        run, name            of the sweep and of the SAE: their folders' names, or W&B's group and name
        ...                  the fields of Config; a field that is None can read NaN
        step, tokens         how far training has come, which during a run may be past the last evaluation
        l0, mse, ...         the last value of each "eval/..." metric; those in COLUMNS are NaN before an evaluation
        checkpoint           path of the latest checkpoint; None if there is none, and from W&B
    Raises ValueError when the source is missing or holds no runs, or a file in it is corrupt; FileNotFoundError when
    a metrics.jsonl has no config.json beside it; wandb.Error when W&B refuses.
    """
    from_wandb = str(source).startswith("wandb:")
    rows = _wandb_rows(str(source).removeprefix("wandb:"), group) if from_wandb else _local_rows(Path(source), group)
    require(rows, f"{source}: holds no runs" + (f" of the sweep {group!r}" if group is not None else ""))
    df = pd.DataFrame(rows)
    df["checkpoint"] = pd.Series([row["checkpoint"] for row in rows], dtype=object)  # a column of str makes None NaN
    rank = {sae_type: i for i, sae_type in enumerate(TYPES)}
    by = ["sae_type", "dict_size", "l0"]
    return df.sort_values(by, key=lambda c: c.map(rank) if c.name == "sae_type" else c, ignore_index=True)


def load_history(folder: str | Path, *, group: str | None = None) -> pd.DataFrame:
    """Collect every line of metrics of the SAEs in a folder: run and name as in `load_results`, then "step", "tokens",
    "train/..." and "eval/...", NaN where a line lacks it.

    Raises ValueError when there is no such folder, or a file in it is corrupt.
    """
    rows = [
        {"run": run, "name": name} | row
        for sae_folder, run, name in _sae_folders(Path(folder), group)
        for row in _read_metrics(sae_folder / "metrics.jsonl")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "name", "step", "tokens"])


def decoder_cosines(df: pd.DataFrame) -> list[Float[np.ndarray, "latents"] | None]:
    """Compute `latents.nearest_cosines` of each SAE's latest checkpoint; None where there is no checkpoint.

    Raises ValueError when a checkpoint is damaged.
    """
    if df["checkpoint"].isna().all():
        return [None] * len(df)
    from analysis.latents import nearest_cosines_of  # late, with torch: the table alone is there at once

    return [path and nearest_cosines_of(path) for path in df["checkpoint"]]


def _local_rows(root: Path, group: str | None) -> list[dict]:
    rows = []
    for folder, run, name in _sae_folders(root, group):
        file = folder / "config.json"
        steps = {int(p.name[5:]): str(p) for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()}
        last: dict[str, float] = {}  # value of each key, like the summary of a W&B run
        for row in _read_metrics(folder / "metrics.jsonl"):
            last |= row
        config = parse_json(file.read_bytes(), str(file))
        rows.append(_row(run, name, config, last, steps[max(steps)] if steps else None, str(file)))
    return rows


def _sae_folders(root: Path, group: str | None) -> Iterator[tuple[Path, str, str]]:
    """Find the folder of each SAE, the name of its sweep and its own."""
    require(root.is_dir(), f"{root}: no such folder")
    for folder in sorted(path.parent for path in root.rglob("metrics.jsonl")):
        run, name = folder.resolve().parts[-2:]
        if group in (None, run):
            yield folder, run, name


def _wandb_rows(project: str, group: str | None) -> list[dict]:
    require(project.count("/") == 1 and all(project.split("/")), f'wandb:{project}: give "wandb:entity/project"')
    filters = {"group": group} if group is not None else {}
    runs = wandb.Api().runs(project, filters=filters, lazy=False)  # lazy would make a request for every run
    place = f"wandb:{project}, run "
    return [_row(r.group or "", r.name, r.config, r.summary_metrics, None, place + r.name) for r in runs]


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
    """Write plain text of at most 80 columns, a row per SAE, and a table for each sweep if there are several.

    setting is what decides the SAE's L0, and whatever else tells it from others of its type. CE recovered is the share
    of the loss of zero ablation that the SAE recovers, dead % the share of its latents; "-" means no evaluation yet.
    """
    if df["run"].nunique() > 1:
        return "\n\n".join(f"{run[:80]}\n{format_table(saes)}" for run, saes in df.groupby("run"))
    table = [("type", "dict", "setting", *(heading for heading, _, _ in COLUMNS.values()))]
    for sae, label in zip(df.itertuples(), row_labels(df, but=["dict_size"])):
        numbers = [_number(scale * getattr(sae, name), decimals) for name, (_, scale, decimals) in COLUMNS.items()]
        whole = label.replace(" ", "\0").replace(",\0", ", ")  # no line ends between a field and its value
        first, *more = (line.replace("\0", " ") for line in textwrap.wrap(whole, SETTING_WIDTH))
        table.append((sae.sae_type, str(sae.dict_size), first, *numbers))
        table += [("", "", line, *("" for _ in COLUMNS)) for line in more]
    widths = [max(map(len, column)) for column in zip(*table)]
    row = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<><" + ">" * len(COLUMNS), widths))
    return "\n".join(row.format(*cells).rstrip() for cells in table)


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"


def report(source: str, group: str | None = None) -> None:
    """Print the table of trained SAEs, write it and its figures, and say what lies where.

    Files go to `source`, to the folder of the sweep that `group` names or, for W&B, to the current folder. Raises what
    `load_results` does.
    """
    df = load_results(source, group=group)
    print(f"\n{format_table(df)}\n", flush=True)
    folder, history, cosines = Path.cwd(), None, []
    if not source.startswith("wandb:"):
        folder = next(path for path in (Path(source, group or ""), Path(source)) if path.is_dir())
        history, cosines = load_history(source, group=group), decoder_cosines(df)
    df.to_csv(folder / "results.csv", index=False)
    print(f"table        {folder / 'results.csv'}")
    if saved := df["checkpoint"].notna().sum():
        print(f"checkpoints  {folder}/**/step-*  ({saved})")
    if any(folder.glob("wandb/offline-run-*")):
        print(f"W&B          wandb sync {folder}/wandb/offline-run-*")
    for figure in save_figures(df, folder, history, cosines)[::2]:
        print(f"figure       {figure}, .pdf")


def main(words: list[str]) -> None:
    """Do what the words ask for."""
    if words[:1] == ["dashboard"]:
        from analysis.dashboard import command  # late, with torch and the model's library

        command(words[1:])
    else:
        options = table_parser().parse_args(words)
        report(options.source, options.group)


def table_parser() -> Parser:
    parser = Parser(prog="results.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder of one SAE, a sweep or many; or wandb:entity/project")
    parser.add_argument("--group", metavar="NAME", help="only the sweep of this name")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, wandb.Error) as error:
        print(f"results.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
