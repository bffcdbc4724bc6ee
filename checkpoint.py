"""Save and load dictionaries in the ecosystem's format, without W&B and without training.

A checkpoint is a folder that SAELens' `SAE.load_from_disk` opens as it is:

    cfg.json                     SAELens' description, our Config, and the SHA-256 of each file
    sae_weights.safetensors      the parameters; BatchTopK's threshold once for each latent, as a jumprelu's
    counters.safetensors         the buffers that only training needs
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import Config
from runtime.checks import explained, parse_json, require
from runtime.disk import save_tensors, sha256, write_durably
from sae import SAE_TYPES, BaseAutoencoder, build_sae

CFG, WEIGHTS, COUNTERS = "cfg.json", "sae_weights.safetensors", "counters.safetensors"
UNIT_ROUNDING = 1e-5  # by which the norms of rows of norm 1 may seem to differ from it
SAE_LENS_VERSION = "6.0.0"  # of the format; without it SAELens reads cfg.json as an older one and drops the metadata


def save_checkpoint(sae: BaseAutoencoder, path: str | Path) -> None:
    """Write the folder `path`, replacing a checkpoint that is there: whole or not at all, as `write_durably` does.

    Raises ValueError when `path` holds anything else or the SAE's class could not come back, OSError when the disk has
    no room.
    """
    path = Path(path)
    registered = SAE_TYPES[sae.sae_type].__name__
    comes_back = f"{type(sae).__name__}: would come back as {registered}; give it a sae_type, and add it to SAE_TYPES"
    require(SAE_TYPES[sae.sae_type] is type(sae), comes_back)
    held = {p.name for p in path.iterdir()} if path.is_dir() else {path.name} if path.exists() else set()
    foreign = ", ".join(sorted(held - {CFG, WEIGHTS, COUNTERS})[:3])
    require(not foreign, f"{path}: not replaced, as it holds more than a checkpoint: {foreign}")
    files = _tensors(sae)

    def write(folder: Path) -> None:
        folder.mkdir()
        for file, tensors in files.items():
            save_tensors(tensors, folder / file)
        cfg = _sae_lens_cfg(sae) | {"nn_decompositions": sae.cfg.to_dict()}
        cfg["sha256"] = {file: sha256(folder / file) for file in files}
        (folder / CFG).write_text(json.dumps(_signed(cfg), indent=2))

    write_durably(path, write)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BaseAutoencoder:
    """Load the SAE saved in the folder `path`: its exact class, in evaluation mode, on `device`, as its cfg then says.

    Numbers in half precision become float32, in which it can be trained. Raises ValueError, naming the file, when the
    folder is not a whole checkpoint of ours, exactly as it was saved, or its numbers are not finite.
    """
    path = Path(path)
    missing = f"{path / CFG}: no such file; give the folder of a checkpoint, such as runs/<sweep>/<name>/step-000146"
    require((path / CFG).is_file(), missing)
    saved = read_json(path / CFG)
    ours = isinstance(saved.get("nn_decompositions"), dict)
    require(ours, f"{path / CFG}: no field 'nn_decompositions'; this checkpoint was not written by this library")
    changed = f"{path / CFG}: does not match its own SHA-256; it was changed after it was saved"
    require(isinstance(saved.get("sha256"), dict) and saved == _signed(saved), changed)
    with explained(f"{path / CFG}: not of this version", ValueError, TypeError, remedy="save the SAE again"):
        sae = build_sae(Config(**saved["nn_decompositions"] | {"device": str(device)}))
    for file in (WEIGHTS, COUNTERS):
        require((path / file).is_file(), f"{path / file}: no such file; the checkpoint is incomplete")
        damaged = f"{path / file}: does not match its SHA-256 in {CFG}; it is damaged, or of another SAE"
        require(sha256(path / file) == saved["sha256"].get(file), damaged)

    state: dict[str, Tensor] = {}
    for file, like in _tensors(sae).items():
        tensors = _read_tensors(path / file)
        shapes, expected = ({name: (*t.shape,) for name, t in held.items()} for held in (tensors, like))
        require(shapes == expected, f"{path / file}: holds {shapes}; {CFG} says {expected}")
        state |= tensors
    if "threshold" in dict(sae.named_buffers()):
        same = f"{path / WEIGHTS}: threshold differs between latents, where there is one for all"
        require((state["threshold"] == state["threshold"][0]).all(), same)
        state["threshold"] = state["threshold"][0]
    if "W_skip" in state:
        state["W_skip"] = state["W_skip"].t()
    if state["W_dec"].dtype == torch.float64:
        sae.double()
    sae.load_state_dict(state)
    return sae.eval()


def read_json(file: Path) -> dict[str, Any]:
    """Read the fields of a configuration that anybody may have written. Raises ValueError when it is none."""
    return parse_json(file.read_bytes(), f"{file}")


def _tensors(sae: BaseAutoencoder) -> dict[str, dict[str, Tensor]]:
    """List what each safetensors file of a checkpoint holds."""
    weights = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    counters = dict(sae.named_buffers())
    if "threshold" in counters:
        weights["threshold"] = counters.pop("threshold").expand(sae.cfg.dict_size).contiguous()
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].t().contiguous()  # SAELens has it [d_out, d_in]
    return {WEIGHTS: weights, COUNTERS: counters}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    # RuntimeError: torch finds no smallest number among none, or among 8-bit ones.
    with explained(f"{file}: not readable as safetensors", SafetensorError, RuntimeError):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            finite = not tensor.is_floating_point() or torch.stack(tensor.aminmax()).isfinite().all()
            require(finite, f"{file}: {name} has numbers that are not finite; the training diverged, lower lr")
    return tensors


def _sae_lens_cfg(sae: BaseAutoencoder) -> dict[str, Any]:
    cfg, row = sae.cfg, sae.cfg.type
    architecture, d_out = row.sae_lens, {}
    named = {theirs: getattr(cfg, ours) for theirs, ours in row.sae_lens_fields}
    if "k" in named:  # so that SAELens folds the norms of decoder rows, where that changes nothing
        named["rescale_acts_by_decoder_norm"] = bool((sae.W_dec.norm(dim=1) - 1).abs().max() < UNIT_ROUNDING)
    if not sae.y_is_x:
        skip = "skip_" * cfg.skip
        architecture = f"{skip}transcoder" if row.sae_lens == "standard" else f"{row.sae_lens}_{skip}transcoder"
        d_out = {"d_out": cfg.d_out}
    return {
        "architecture": architecture if len(cfg.layers) == 1 else "crosscoder",  # which SAELens has not
        "d_in": cfg.d_in,
        "d_sae": cfg.dict_size,
        **d_out,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.y_is_x,
        "normalize_activations": "layer_norm" if cfg.input_unit_norm else "none",
        "reshape_activations": "hook_z" if cfg.site == "z" else "none",
        **named,
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_name,
            "hook_name_out": cfg.writes[0],
            "context_size": cfg.seq_len,
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "seqpos_slice": [None],
            "dataset_path": cfg.dataset_path,
            "training_architecture": cfg.sae_type,
            "training_architecture_details": {"k": cfg.target_l0, "matryoshka_widths": getattr(sae, "widths", None)},
        },
    }


def _signed(cfg: dict[str, Any]) -> dict[str, Any]:
    """Add the SHA-256 of all that cfg.json says, but for this sum."""
    sums = {file: value for file, value in cfg["sha256"].items() if file != CFG}
    said = json.dumps(cfg | {"sha256": sums}, sort_keys=True).encode()
    return cfg | {"sha256": sums | {CFG: hashlib.sha256(said).hexdigest()}}
