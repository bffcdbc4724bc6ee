"""Runs and checkpoints -> tables, feature dashboards, and what figures.py draws.

python results.py runs/<sweep>             the table, and beside it .csv and figures
python results.py wandb:entity/project     the same, in the current folder
python results.py dashboard <checkpoint>   a page with the latents of an SAE
"""

import json
import math
import re
import signal
import sys
import textwrap
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # before what takes seconds to import
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import pandas as pd
import wandb
from jaxtyping import Float

from cli import Parser
from figures import TYPES, plot_pareto, row_labels, save_figures

__all__ = [
    "TYPES",
    "decoder_cosines",
    "feature_dashboard",
    "format_table",
    "load_history",
    "load_results",
    "plot_pareto",
    "save_figures",
]

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from sae import BaseAutoencoder

METRICS = (
    "l0", "l1", "mse", "explained_variance", "ce", "ce_clean", "ce_zero", "ce_mean", "ce_degradation", "ce_recovered",
    "ce_recovered_mean", "kl", "dead_share",
)  # fmt: skip
SETTING_WIDTH = 16  # of its column, at most
CHECKPOINT = re.compile("step-[0-9]{1,18}")


def load_results(source: str | Path, *, group: str | None = None) -> pd.DataFrame:
    """One row per SAE, sorted by type (in the order of TYPES), dict_size and l0; with `group`, of that sweep alone.

    source: a folder (of one SAE, a sweep or many sweeps), or "wandb:entity/project".
    Columns:
        run, name            of the sweep and of the SAE: their folders' names, or W&B's group and name
        ...                  the fields of Config; a field that is None can read NaN
        step, tokens         how far training has come, which while it runs may be past the last evaluation
        l0, mse, ...         the last value of each "eval/..." metric; those in METRICS are NaN before an evaluation
        checkpoint           path of the latest checkpoint; None where there is none, and from W&B
    Raises ValueError when the source is missing or holds no runs, or a file in it is corrupt; FileNotFoundError when
    a metrics.jsonl has no config.json beside it; wandb.Error when W&B refuses.
    """
    if str(source).startswith("wandb:"):
        rows = _wandb_rows(str(source).removeprefix("wandb:"), group)
    else:
        rows = _local_rows(Path(source), group)
    if not rows:
        raise ValueError(f"{source}: holds no runs" + (f" of the sweep {group!r}" if group is not None else ""))
    df = pd.DataFrame(rows)
    df["checkpoint"] = pd.Series(
        [row["checkpoint"] for row in rows], dtype=object
    )  # a column of str would make None NaN
    rank = {sae_type: i for i, sae_type in enumerate(TYPES)}
    by = ["sae_type", "dict_size", "l0"]
    return df.sort_values(by, key=lambda c: c.map(rank) if c.name == "sae_type" else c, ignore_index=True)


def load_history(folder: str | Path, *, group: str | None = None) -> pd.DataFrame:
    """Every line of metrics of the SAEs in a folder: run and name as in `load_results`, then "step", "tokens",
    "train/..." and "eval/...", NaN where a line does not have it.

    Raises ValueError when there is no such folder, or a file in it is corrupt.
    """
    rows = [
        {"run": run, "name": name} | row
        for sae_folder, run, name in _sae_folders(Path(folder), group)
        for row in _read_metrics(sae_folder / "metrics.jsonl")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "name", "step", "tokens"])


def decoder_cosines(df: pd.DataFrame) -> list[Float[np.ndarray, "latents"] | None]:
    """`evaluation.nearest_cosines` of each SAE's latest checkpoint; None where there is none.

    Raises ValueError when a checkpoint is damaged.
    """
    from evaluation import nearest_cosines  # with torch, imported late: the table alone is there at once
    from logs import load_checkpoint

    return [path and nearest_cosines(load_checkpoint(path).W_dec).numpy() for path in df["checkpoint"]]


def _local_rows(root: Path, group: str | None) -> list[dict]:
    rows = []
    for folder, run, name in _sae_folders(root, group):
        config = _parse((folder / "config.json").read_bytes(), f"{folder / 'config.json'}")
        if missing := {"sae_type", "dict_size", "top_k", "l1_coeff"} - config.keys():
            raise ValueError(f"{folder / 'config.json'}: no field {min(missing)!r}; it is not a Config")
        steps = {int(p.name[5:]): str(p) for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name) and p.is_dir()}
        checkpoint = steps[max(steps)] if steps else None
        last: dict[str, float] = {}  # of each key, as the summary of a W&B run has it
        for row in _read_metrics(folder / "metrics.jsonl"):
            last |= row
        rows.append(_row(run, name, config, last, checkpoint))
    return rows


def _sae_folders(root: Path, group: str | None) -> Iterator[tuple[Path, str, str]]:
    """The folder of each SAE, the name of its sweep and its own."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for folder in sorted(path.parent for path in root.rglob("metrics.jsonl")):
        run, name = folder.resolve().parts[-2:]
        if group in (None, run):
            yield folder, run, name


def _wandb_rows(project: str, group: str | None) -> list[dict]:
    if project.count("/") != 1 or not all(project.split("/")):
        raise ValueError(f'wandb:{project}: give "wandb:entity/project"')
    filters = {"group": group} if group is not None else {}
    runs = wandb.Api().runs(project, filters=filters, lazy=False)  # lazy would make a request for every run
    return [_row(run.group or "", run.name, run.config, run.summary_metrics, None) for run in runs]


def _row(run: str, name: str, config: dict, last: dict, checkpoint: str | None) -> dict:
    progress = {"step": last.get("step", 0), "tokens": last.get("tokens", 0)}
    metrics = {key.removeprefix("eval/"): float(last[key]) for key in last if key.startswith("eval/")}  # W&B has "NaN"
    missing = dict.fromkeys(METRICS, math.nan)
    return {"run": run, "name": name} | config | progress | missing | metrics | {"checkpoint": checkpoint}


def _read_metrics(path: Path) -> list[dict[str, float]]:
    lines = path.read_bytes().splitlines()
    if lines and not lines[-1].endswith(b"}"):
        lines.pop()  # a killed process left it incomplete
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line, f"{path}, line {number}")
        if wrong := [key for key, value in row.items() if not isinstance(value, int | float)]:
            raise ValueError(f"{path}, line {number}: {wrong[0]!r} is not a number")
        rows.append(row)
    return rows


def _parse(text: bytes, place: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds {type(value).__name__}, not an object of fields")
    return value


def format_table(df: pd.DataFrame) -> str:
    """Plain text of at most 80 columns, a row per SAE; a table per sweep, under its name, where df has several.

    setting is what decides the SAE's L0 (k of TopK and BatchTopK, l1_coeff of the others) and what else tells it from
    others of its type. CE recovered is the share of the loss of zero ablation that the SAE gives back, dead % that of
    latents. "-" where there is no evaluation yet.
    """
    if df["run"].nunique() > 1:
        return "\n\n".join(f"{run[:80]}\n{format_table(saes)}" for run, saes in df.groupby("run"))
    table = [("type", "dict", "setting", "L0", "expl. var.", "CE recovered", "dead %")]
    for sae, label in zip(df.itertuples(), row_labels(df, but=["dict_size"])):
        numbers = (sae.l0, 1), (sae.explained_variance, 3), (sae.ce_recovered, 3), (100 * sae.dead_share, 1)
        whole = label.replace(" ", "\0").replace(",\0", ", ")  # no line ends between a field and its value
        first, *more = (line.replace("\0", " ") for line in textwrap.wrap(whole, SETTING_WIDTH))
        table.append((sae.sae_type, str(sae.dict_size), first, *(_number(*number) for number in numbers)))
        table += [("", "", line, "", "", "", "") for line in more]
    widths = [max(map(len, column)) for column in zip(*table)]
    row = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<><>>>>", widths))
    return "\n".join(row.format(*cells).rstrip() for cells in table)


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"


def feature_dashboard(
    sae: "BaseAutoencoder",
    path: str | Path = "dashboard.html",
    *,
    model: "TransformerBridge | None" = None,
    windows: int = 1024,
    dataset_path: str | None = None,
    dataset_name: str | None = None,
) -> Path:
    """Write one HTML file, which needs no network, with a table of the SAE's latents and what is known of each:

    density, largest activation, histogram, the contexts that activate it most, contexts from each quarter of its
    activations, the tokens it promotes and suppresses (`dashboard.direct_effects`) and the nearest decoder rows.

    sae: of any type; only its evaluation counts. model: the language model of sae.cfg, loaded when not given.
    windows: context windows of sae.cfg.seq_len held-out tokens to read; special tokens are not read.
    dataset_path, dataset_name: the text, as in Config; that of sae.cfg when not given.
    Returns the path. Raises ValueError or OSError when the model or the held-out text cannot be read.
    """
    from dashboard import write_dashboard  # which imports torch and the model's library: seconds, for a table

    path = Path(path)
    write_dashboard(sae, path, model, windows, dataset_path, dataset_name)
    return path


def dashboard(options: Namespace) -> None:
    """The page of the latents of one SAE, from the folder of a checkpoint or the Hub."""
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils.logging import disable_progress_bar

    from config import Config
    from pretrained import load_pretrained

    disable_progress_bar()
    set_verbosity_error()  # retries are a line each
    device = Config().torch_device
    sae = load_pretrained(options.checkpoint, device, model_name=options.model_name, hook_name=options.hook_name)
    folder = Path(options.checkpoint)
    beside = folder.resolve().with_name(f"{folder.resolve().name}.html")
    path = feature_dashboard(
        sae,
        options.output or (beside if folder.is_dir() else Path(f"{sae.cfg.name}.html")),
        windows=options.windows,
        dataset_path=options.dataset_path,
        dataset_name=options.dataset_name,
    )
    print(f"{sae.cfg.dict_size:,} latents, {path.stat().st_size / 1e6:.1f} MB: {path}")


def table(options: Namespace) -> None:
    """The table of trained SAEs, results.csv, and figures: those that need checkpoints from a folder alone."""
    df = load_results(options.source, group=options.group)
    print(format_table(df), flush=True)
    if options.source.startswith("wandb:"):
        folder, history, cosines = Path.cwd(), None, []
    else:
        source = Path(options.source)
        folder = source / options.group if options.group and (source / options.group).is_dir() else source
        history, cosines = load_history(source, group=options.group), decoder_cosines(df)
    df.to_csv(folder / "results.csv", index=False)
    figures = save_figures(df, folder, history, cosines)
    drawn = f"and, as .png and .pdf,\n{', '.join(path.stem for path in figures[::2])}" if figures else "(no figure yet)"
    print(f"\nwritten in {folder}: results.csv {drawn}")


def main(words: list[str]) -> None:
    if words[:1] == ["dashboard"]:
        dashboard(dashboard_parser().parse_args(words[1:]))
    else:
        table(table_parser().parse_args(words))


def table_parser() -> Parser:
    parser = Parser(prog="results.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder of one SAE, a sweep or many; or wandb:entity/project")
    parser.add_argument("--group", metavar="NAME", help="only the sweep of this name")
    return parser


def dashboard_parser() -> Parser:
    parser = Parser(prog="results.py dashboard", description=dashboard.__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of an SAE, or user/repo:folder of the Hub")
    parser.add_argument("--windows", type=int, default=1024, help="context windows of text to read (default: 1024)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: beside the folder, as .html)")
    parser.add_argument("--dataset-path", metavar="PATH", help="text, as for main.py (default: that of its Config)")
    parser.add_argument("--dataset-name", metavar="NAME", help="configuration of that data set, if it has several")
    parser.add_argument("--model-name", metavar="NAME", help="the model, where the files do not say or say it wrongly")
    parser.add_argument("--hook-name", metavar="HOOK", help="the hook, likewise, as in blocks.8.hook_resid_pre")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, wandb.Error) as error:
        print(f"results.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
