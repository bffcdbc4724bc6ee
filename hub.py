"""The Hugging Face Hub: SAEs pushed with a card that describes them, and loaded again.

user/repo/                       a repository: of one SAE, of a sweep, of anybody
    README.md                    the card of the SAE pushed last, which the Hub shows
    <Config.name>/               one folder an SAE, as logs.save_checkpoint writes it; SAELens opens it as it is
        README.md                its card
        cfg.json  sae_weights.safetensors  counters.safetensors

The address and the token are huggingface_hub's: HF_ENDPOINT, and `hf auth login` or HF_TOKEN.
"""

import copy
import glob
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import HfApi

from config import Config
from errors import one_line
from figures import TYPES, row_labels
from logs import save_checkpoint
from pretrained import load_pretrained, repo_and_folder
from results import METRICS, load_results
from sae import BaseAutoencoder

SAME = ["model_name", "layer", "site", "dataset_path", "dataset_name", "seq_len"]  # where metrics may be compared


def push_to_hub(
    sae: BaseAutoencoder,
    repo_id: str,
    *,
    sweep: str | Path | None = None,
    folder: str | None = None,
    private: bool = False,
) -> str:
    """Put the SAE into the Hub's repository "user/repo", made if there is none, in one commit; returns its address.

    folder: where it lies in the repository; the SAE's name when not given. Of folders and files of this machine, which
    its Config may name, only their names are published.
    sweep: the folder of the sweep that trained it, such as runs/tiny-20261123-183000-417205; its metrics and its place
    on the Pareto front then stand on the card.
    Raises ValueError, one line, when the SAE is not of the sweep or the Hub refuses.
    """
    public = copy.copy(sae)
    public.cfg = _public(sae.cfg)
    folder = public.cfg.name if folder is None else folder
    repo_and_folder(f"{repo_id}:{folder}")
    card = model_card(sae, repo_id, folder, None if sweep is None else load_results(sweep))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        save_checkpoint(public, root / folder)
        for place in (root, root / folder):
            (place / "README.md").write_text(card)
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=root, commit_message=f"SAE {folder}")
        except Exception as error:  # of a service out of our hands
            remedy = "it takes a network, and `hf auth login` with a token that may write"
            raise ValueError(f"{repo_id}: not pushed to the Hub ({one_line(error)}); {remedy}") from None
    return f"{api.endpoint}/{repo_id}/tree/main/{folder}"


def from_pretrained(repo_id: str, folder: str | None = None, device: str | torch.device = "cpu") -> BaseAutoencoder:
    """`pretrained.load_pretrained` of what `push_to_hub` put into "user/repo"; without `folder`, of its top level."""
    return load_pretrained(repo_id if folder is None else f"{repo_id}:{folder}", device)


def model_card(sae: BaseAutoencoder, repo_id: str, folder: str, sweep: pd.DataFrame | None) -> str:
    """Markdown: what the SAE is, how to load it, its metrics and its place in the sweep, its Config.

    sweep: `load_results` of the runs it was trained with, where they are at hand.
    Raises ValueError when the SAE is not among them.
    """
    cfg = _public(sae.cfg)
    parts = [
        "---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n- nn-decompositions\n---",
        f"# {cfg.name}",
        f"A {TYPES[cfg.sae_type][0]} sparse autoencoder: {cfg.dict_size} latents of the {cfg.act_size} activations at"
        f" `{cfg.hook_point}` of `{cfg.model_name}`.",
        "## Load it",
        f'```python\nfrom sae_lens import SAE  # SAELens\n\nsae = SAE.from_pretrained("{repo_id}", "{folder}")\n```',
        "```python\nfrom hub import from_pretrained  # NN Decompositions\n\n"
        f'sae = from_pretrained("{repo_id}", "{folder}")\n```',
    ]
    if sweep is not None:
        rows = sweep[sweep["name"] == sae.cfg.name]
        if rows.empty or sweep["run"].nunique() > 1:
            raise ValueError(
                f"sweep: not that of {sae.cfg.name}, or several; give the folder of the one that trained it"
            )
        row = rows.iloc[0]
        parts += ["## On held-out text", *_metrics_part(row)]
        if not math.isnan(row["l0"]):
            places = sweep[SAME].astype(object).fillna("")  # None equals nothing
            alike = (places == places.loc[row.name]).all(axis=1)
            parts += ["## In its sweep", *_sweep_part(sweep[alike], sae.cfg.name)]
    fields = {name: value for name, value in cfg.to_dict().items() if name not in ("device", "output_dir")}
    parts += ["## Config", _markdown_table(["field", "value"], [[name, f"`{fields[name]}`"] for name in fields])]
    return "\n\n".join(parts) + "\n"


def _metrics_part(row: pd.Series) -> list[str]:
    if math.isnan(row["l0"]):
        return ["Not evaluated yet."]
    table = _markdown_table(["metric", "value"], [[name, f"{row[name]:.6g}"] for name in METRICS])
    return [f"After {row['step']:,} steps, {row['tokens']:,} tokens; cross-entropies (ce) in nats per token.", table]


def _sweep_part(sweep: pd.DataFrame, name: str) -> list[str]:
    """Is it on the fronts of the sweep's SAEs of the same activations, and all of these."""
    wanted = {"explained_variance": "explained variance", "ce_recovered": "CE recovered"}
    fronts = {metric: _on_front(sweep, metric) for metric in wanted}
    lines = [
        f"It is {'' if fronts[metric][sweep['name'] == name].all() else 'not '}on the Pareto front of L0 and {label}."
        for metric, label in wanted.items()
    ]
    rows = []
    for (index, row), label in zip(sweep.iterrows(), row_labels(sweep, but=["dict_size"])):
        label = f"{TYPES[row['sae_type']][0]} {row['dict_size']}, {label}"
        label = f"**{label}**" if row["name"] == name else label
        values = [f"{row[metric]:.4f}" + (" *" if fronts[metric][index] else "") for metric in wanted]
        rows.append([label, f"{row['l0']:.1f}", *values])
    return [" ".join(lines) + " Those that are have a star.", _markdown_table(["SAE", "L0", *wanted.values()], rows)]


def _on_front(sweep: pd.DataFrame, metric: str) -> pd.Series:
    """True where no other SAE is as sparse and better, or sparser and as good."""
    l0, good = sweep["l0"], sweep[metric]
    beaten = [((l0 <= x) & (good >= y) & ((l0 < x) | (good > y))).any() for x, y in zip(l0, good)]
    return ~pd.Series(beaten, index=sweep.index) & l0.notna() & good.notna()


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _public(cfg: Config) -> Config:
    """Without the folders of this machine: of a local model and of local texts the last name remains."""
    names = {field: getattr(cfg, field) for field in ("model_name", "dataset_path")}
    paths = {field: os.path.abspath(os.path.expanduser(path)) for field, path in names.items() if _is_local(path)}
    local = {field: os.path.basename(path) or "root" for field, path in paths.items()}
    return replace(cfg, output_dir=Config().output_dir, device=Config().device, **local)


def _is_local(path: str) -> bool:
    return path.startswith(("/", "~", ".")) or glob.has_magic(path) or Path(path).exists()
