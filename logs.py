"""All output of a run: Weights & Biases, metrics.jsonl, checkpoints on disk.

runs/<sweep>/                  one folder a sweep; W&B's offline files lie in its wandb/
    <Config.name>/             one folder an SAE
        config.json            Config.to_dict()
        metrics.jsonl          {"step", "tokens", "train/..."} on log steps, {..., "eval/..."} on evaluations
        step-000195/           a checkpoint, which SAELens' `SAE.load_from_disk` opens as it is
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import wandb
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import Config
from sae import SAE_TYPES, BaseAutoencoder

CFG, WEIGHTS, COUNTERS = "cfg.json", "sae_weights.safetensors", "counters.safetensors"
SAE_LENS_VERSION = "6.0.0"  # of the format; without it SAELens reads cfg.json as an older one and drops the metadata
ARCHITECTURES = {"vanilla": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


class RunLog:
    """The output of the SAEs trained together: one W&B run each, grouped by the folder's name."""

    def __init__(self, folder: Path, cfgs: list[Config]) -> None:
        self.folder = folder
        self._folders: list[Path] = []
        self._runs = []
        for cfg in cfgs:
            sae_folder = folder / cfg.name
            sae_folder.mkdir(parents=True)
            (sae_folder / "config.json").write_text(json.dumps(cfg.to_dict(), indent=2))
            self._folders.append(sae_folder)
            self._runs.append(
                wandb.init(
                    project=cfg.wandb_project,
                    name=cfg.name,
                    group=folder.name,
                    config=cfg.to_dict(),
                    mode=cfg.wandb_mode,
                    dir=folder,
                    reinit="create_new",
                    settings=wandb.Settings(silent=True, disable_git=True, console="off"),
                )
            )

    def log(self, index: int, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Metrics of the SAE cfgs[index] after `step` steps, `tokens` activations."""
        row = {"step": step, "tokens": tokens, **metrics}
        with (self._folders[index] / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._runs[index].log(row, step=step)

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> Path:
        path = self.folder / sae.cfg.name / f"step-{step:06d}"
        save_checkpoint(sae, path)
        return path

    def close(self) -> None:
        for run in self._runs:
            run.finish()


def save_checkpoint(sae: BaseAutoencoder, path: str | Path) -> None:
    """Write the folder `path`, replacing a checkpoint that is there: whole or not at all.

    cfg.json and sae_weights.safetensors are in SAELens' format (BatchTopK as a jumprelu with one threshold for all);
    counters.safetensors holds what only training needs. Raises ValueError when `path` holds anything else.
    """
    path = Path(path)
    foreign = {p.name for p in path.iterdir()} - {CFG, WEIGHTS, COUNTERS} if path.exists() else set()
    if foreign:
        raise ValueError(f"{path}: not replaced, as it holds more than a checkpoint: {', '.join(sorted(foreign)[:3])}")
    weights = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    if sae.cfg.sae_type == "batchtopk":
        weights["threshold"] = sae.threshold.expand(sae.cfg.dict_size).contiguous()
    counters = {name: b for name, b in sae.named_buffers() if name != "threshold"}

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    temporary.mkdir()
    try:
        (temporary / CFG).write_text(json.dumps(_sae_lens_cfg(sae), indent=2))
        save_file(weights, temporary / WEIGHTS)
        save_file(counters, temporary / COUNTERS)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if path.exists():
        replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced)
    else:
        temporary.rename(path)


def _sae_lens_cfg(sae: BaseAutoencoder) -> dict:
    cfg = sae.cfg
    architecture = ARCHITECTURES[cfg.sae_type]
    return {
        "architecture": architecture,
        "d_in": cfg.act_size,
        "d_sae": cfg.dict_size,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if cfg.input_unit_norm else "none",
        "reshape_activations": "hook_z" if cfg.site == "z" else "none",
        **({"k": cfg.top_k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_point,
            "context_size": cfg.seq_len,
            "prepend_bos": True,
            "seqpos_slice": [None],
            "dataset_path": cfg.dataset_path,
            "training_architecture": cfg.sae_type,
        },
        "nn_decompositions": cfg.to_dict(),
    }


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BaseAutoencoder:
    """The SAE saved in the folder `path`, of its exact class, in evaluation mode, on `device` (its cfg says so too).

    Raises ValueError, naming the file and what is wrong with it, when the folder is not a whole checkpoint of ours.
    """
    path = Path(path)
    cfg = replace(_read_config(path / CFG), device=str(device))
    sae = SAE_TYPES[cfg.sae_type](cfg)
    weights, counters = _read_tensors(path / WEIGHTS), _read_tensors(path / COUNTERS)
    expected = {name: p.shape for name, p in sae.named_parameters()}
    buffers = {name: b.shape for name, b in sae.named_buffers() if name != "threshold"}
    if cfg.sae_type == "batchtopk":
        expected["threshold"] = torch.Size([cfg.dict_size])
    _check_shapes(path / WEIGHTS, weights, expected)
    _check_shapes(path / COUNTERS, counters, buffers)
    if cfg.sae_type == "batchtopk":
        threshold = weights["threshold"]
        if not torch.equal(threshold, threshold[:1].expand_as(threshold)):
            raise ValueError(f"{path / WEIGHTS}: threshold differs between latents, a batchtopk has one for all")
        weights["threshold"] = threshold[0]
    sae.to(weights["W_dec"].dtype).load_state_dict(weights | counters)
    return sae.to(device).eval()


def _read_config(file: Path) -> Config:
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; give the folder of a checkpoint, such as runs/<sweep>/<name>/step-000195"
        )
    try:
        cfg = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    fields = cfg.get("nn_decompositions") if isinstance(cfg, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: no field 'nn_decompositions'; this checkpoint was not written by this library")
    known = Config.__dataclass_fields__.keys()
    if fields.keys() != known:
        wrong = ", ".join(sorted(fields.keys() ^ known))
        raise ValueError(f"{file}: nn_decompositions has missing or unknown fields: {wrong}")
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the checkpoint is incomplete")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable as safetensors ({error})") from None


def _check_shapes(file: Path, tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"{file}: holds {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{file}: {name} is {list(tensors[name].shape)}; cfg.json says {list(shape)}")
