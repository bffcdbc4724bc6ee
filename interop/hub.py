"""Push SAEs to the Hugging Face Hub, with a card that describes them; interop.pretrained loads them again.

A repository holds a folder for each SAE: its checkpoint, which SAELens opens as it is, and its card, README.md.
The card of the SAE pushed last also lies at the top, where the Hub shows it. Address and token are huggingface_hub's.
"""

import copy
import glob
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi

from checkpoint import save_checkpoint
from config import HINTS, Config
from interop.pretrained import repo_and_folder
from results import load_results
from runtime.checks import explained, require
from sae import BaseAutoencoder


def push_to_hub(
    sae: BaseAutoencoder,
    repo_id: str,
    *,
    sweep: str | Path | None = None,
    folder: str | None = None,
    private: bool = False,
) -> str:
    """Put the SAE into the Hub's repository "user/repo", made if there is none, in one commit; return its address.

    sweep: the folder of the sweep that trained it, to have its metrics on the card. folder: where it lies in the
    repository; under its name when not given. Of folders and files of this machine only the last names are published.
    Raises ValueError, one line, when the SAE is not of the sweep or the Hub refuses.
    """
    public = copy.copy(sae)
    public.cfg = published(sae.cfg)
    folder = public.cfg.name if folder is None else folder
    repo_and_folder(f"{repo_id}:{folder}")
    card = model_card(sae, repo_id, folder, sweep)
    with tempfile.TemporaryDirectory() as temporary:
        save_checkpoint(public, Path(temporary, folder))
        Path(temporary, folder, "README.md").write_text(card)
        Path(temporary, "README.md").write_text(card)
        remedy = "it takes a network, and `hf auth login` with a token that may write"
        with explained(f"{repo_id}: not pushed to the Hub", Exception, remedy=remedy):
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=f"SAE {folder}")
    return f"{api.endpoint}/{repo_id}/tree/main/{folder}"


def model_card(sae: BaseAutoencoder, repo_id: str, folder: str, sweep: str | Path | None = None) -> str:
    """Write in Markdown what the SAE is, how to load it, its metrics in `sweep` and its Config.

    Raises ValueError when the sweep's folder does not hold the SAE, or holds it more than once.
    """
    cfg = published(sae.cfg)
    name, hooks = "sparse autoencoder" if cfg.is_sae else cfg.kind, ", ".join(f"`{hook}`" for hook in cfg.reads)
    if cfg.target_site:
        hooks += f", which reconstruct the {cfg.d_out} at `{cfg.writes[0]}`,"
    there = f'sae = SAE.from_pretrained("{repo_id}", "{folder}")'
    opens_there = cfg.is_sae or (cfg.target_site and cfg.sae_type != "topk")
    parts = [
        "---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n- nn-decompositions\n---",
        f"# {cfg.name}",
        f"A {cfg.type.label} {name}: {cfg.dict_size} latents of the {cfg.d_in} activations at {hooks} of"
        f" `{cfg.model_name}`.",
        "## Load it",
        *([f"```python\nfrom sae_lens import SAE  # SAELens\n\n{there}\n```"] if opens_there else []),
        "```python\nfrom interop.pretrained import load_pretrained  # NN Decompositions\n\n"
        f'sae = load_pretrained("{repo_id}:{folder}")\n```',
    ]
    if sweep is not None:
        runs = load_results(sweep)
        rows = runs[runs["name"] == sae.cfg.name].drop(columns=[*HINTS], errors="ignore")
        found = f"sweep = {str(sweep)!r}: holds {len(rows)} runs named {sae.cfg.name}"
        require(len(rows) == 1, f"{found}; give the folder of the sweep that trained it")
        run = rows.iloc[0].dropna()
        metrics = {name: f"{x:.6g}" for name, x in run.items() if isinstance(x, float)}
        told = f"After {run['step']:,} steps, {run['tokens']:,} tokens; cross-entropies (ce) in nats per token."
        parts += ["## On held-out text", *([told, _table("metric", metrics)] if metrics else ["Not evaluated yet."])]
    fields = {name: f"`{x}`" for name, x in cfg.to_dict().items() if name not in ("device", "output_dir")}
    return "\n\n".join([*parts, "## Config", _table("field", fields)]) + "\n"


def _table(title: str, values: dict[str, str]) -> str:
    rows = [(title, "value"), ("---", "---"), *((name, value.replace("|", "\\|")) for name, value in values.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def published(cfg: Config) -> Config:
    """Keep only the last name of a local model and of local texts, and nothing else of this machine."""
    names = {field: getattr(cfg, field) or "" for field in ("model_name", "dataset_path", "activations", "init_from")}
    local = {
        field: Path(os.path.abspath(os.path.expanduser(name))).name or "root"
        for field, name in names.items()
        if name and (name.startswith(("/", "~", ".")) or glob.has_magic(name) or Path(name).exists())
    }
    return replace(cfg, output_dir=Config.output_dir, device=Config.device, **local)
