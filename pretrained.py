"""The checkpoints of other libraries opened as SAEs of ours, from a folder or the Hugging Face Hub.

    written by           files                               opened as
    this library         cfg.json, sae_weights.safetensors   what it was; SAELens opens it too
    SAELens              cfg.json, sae_weights.safetensors   vanilla (standard), topk, jumprelu; batchtopk in training
    Gemma Scope          params.npz                          jumprelu
    dictionary_learning  config.json, ae.pt                  vanilla, topk, batchtopk (matryoshka's too), jumprelu
    sparsify             cfg.json, sae.safetensors           topk

Where a convention differs from ours it is folded into the weights, so that encode, decode and forward in evaluation
mode are those of the library that wrote them:

    b_dec is not subtracted from the input                 b_enc + b_dec W_enc
    latents in units of n_j, the norm of decoder row j     W_enc_j n_j,  b_enc_j n_j,  W_dec_j / n_j
    inputs are multiplied by s, outputs divided            W_enc s,  W_dec / s,  b_dec / s
    a threshold below 0, with a ReLU                       0

What cannot be folded is refused, by name. The rows of W_dec keep the norms they have.
"""

import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import SITES, Config, SaeType
from errors import one_line
from logs import CFG, COUNTERS, WEIGHTS, load_checkpoint, read_json
from sae import SAE_TYPES, BaseAutoencoder

NPZ, AE, AE_CONFIG, SPARSIFY, SCALER = "params.npz", "ae.pt", "config.json", "sae.safetensors", "activation_scaler.json"
SAE_LENS_TYPES: dict[str, SaeType] = {
    "standard": "vanilla", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "batchtopk",
}  # fmt: skip
DICT_CLASSES: dict[str, SaeType] = {  # of dictionary_learning
    "AutoEncoder": "vanilla", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
GEMMA_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
SPARSIFY_SITES = {  # module within a block -> site
    "": "resid_post", ".mlp": "mlp_out", ".attn": "attn_out", ".self_attn": "attn_out", ".attention": "attn_out",
}  # fmt: skip
FILES = (CFG, WEIGHTS, COUNTERS, NPZ, AE, AE_CONFIG, SPARSIFY, SCALER)
ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<folder>[\w.+-]+(/[\w.+-]+)*))?")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK = 4096  # latents at a time in float64


def load_pretrained(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> BaseAutoencoder:
    """The SAE in a folder, or on the Hub, as one of our classes, in evaluation mode on `device`, in float32.

    source: a folder in one of the formats above, "user/repo", or "user/repo:folder/in/it".
    model_name, hook_name (such as "blocks.8.hook_resid_pre"): where the files do not say, or say it wrongly.
    Our own checkpoints come back in their class, numbers and Config, as from `load_checkpoint`. Of the others, Config
    has what their files say: the model, the hook, the sizes, k; the rest, of training, is our defaults.
    Raises ValueError, one line, when there is no SAE, it cannot be represented here, or its files are damaged or
    forged: no code in them is run, and sizes, formats and finiteness are checked.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source))
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {CFG, WEIGHTS} <= held:
        cfg = read_json(folder / CFG)
        if "nn_decompositions" in cfg:
            sae = load_checkpoint(folder, device)
            place = _layer_and_site(hook_name or sae.cfg.hook_point)
            sae.cfg = replace(sae.cfg, model_name=model_name or sae.cfg.model_name, **place)
            return sae
        fields, tensors = _from_sae_lens(folder, cfg)
    elif NPZ in held:
        fields, tensors = _from_gemma_scope(folder)
    elif {AE, AE_CONFIG} <= held:
        fields, tensors = _from_dictionary_learning(folder)
    elif {CFG, SPARSIFY} <= held:
        fields, tensors = _from_sparsify(folder)
    else:
        raise ValueError(
            f"{source}: holds no SAE ({CFG} with {WEIGHTS} or {SPARSIFY}, {NPZ}, or {AE_CONFIG} with {AE});"
            " give the folder that does, of the Hub as user/repo:folder"
        )
    fields |= {"model_name": model_name or fields["model_name"], "hook_name": hook_name or fields["hook_name"]}
    for field in ("model_name", "hook_name"):
        if not isinstance(fields[field], str):
            raise ValueError(f"{source}: does not say its {field}; give load_pretrained(..., {field}=...)")
    place = _layer_and_site(fields.pop("hook_name"))
    try:
        cfg = Config(**fields, **place, device=str(device))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    sae = SAE_TYPES[cfg.sae_type](cfg)
    sae.load_state_dict(sae.state_dict() | tensors)
    return sae.to(device).eval()


# ---- formats: each gives fields of Config, with hook_name in place of layer and site, and tensors by our names ----


def _from_sae_lens(folder: Path, cfg: dict[str, Any]) -> tuple[dict, dict[str, Tensor]]:
    """github.com/decoderesearch/SAELens: `SAE.load_from_disk`. Before version 6 cfg.json was flat, with other names."""
    file = folder / CFG
    metadata = cfg | cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture, k = cfg.get("architecture", "standard"), cfg.get("k")
    if activation == "topk":
        kwargs = cfg.get("activation_fn_kwargs")
        architecture, k = "topk", kwargs.get("k") if isinstance(kwargs, dict) else None
    _require(file, "architecture", architecture, SAE_LENS_TYPES)
    _require(file, "activation_fn", activation, ("relu", "topk"))
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    _require(file, "hook_head_index", head, (None,))
    norm = cfg.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm
    _require(file, "normalize_activations", norm, ("none", "layer_norm", "expected_average_only_in"))
    rescaled, subtracted = cfg.get("rescale_acts_by_decoder_norm", False), cfg.get("apply_b_dec_to_input", True)
    _require(file, "rescale_acts_by_decoder_norm", rescaled, (True, False) if "topk" in architecture else (False,))
    _require(file, "apply_b_dec_to_input", subtracted, (True, False))
    if processing := metadata.get("model_from_pretrained_kwargs"):
        warnings.warn(f"{file}: of a model loaded with {processing}; load_model gives raw weights", stacklevel=3)
    elif metadata is cfg:
        centred = "the model may have had center_writing_weights, which files of its time do not say"
        warnings.warn(f"{file}: from before SAELens 6: {centred}; load_model gives raw weights", stacklevel=3)

    sae_type = SAE_LENS_TYPES[architecture]
    found = _renamed(_read_safetensors(folder / WEIGHTS), {"topk_threshold": "threshold"})
    if "scaling_factor" in found and not (found.pop("scaling_factor") == 1).all():
        raise ValueError(f"{folder / WEIGHTS}: scaling_factor is not 1; latents scaled by finetuning are not opened")
    tensors = _checked(folder / WEIGHTS, found, sae_type, cfg.get("d_in"), cfg.get("d_sae"))
    if norm == "expected_average_only_in":
        tensors = _scale_inputs(tensors, _scaling_factor(folder), rescaled)
    if rescaled:
        tensors = _unit_rows(tensors)
    if not subtracted:
        tensors = _subtract_b_dec(tensors)
    fields = {
        "model_name": _official(metadata.get("model_name")),
        "hook_name": metadata.get("hook_name", metadata.get("hook_point")),
        "input_unit_norm": norm == "layer_norm",
    }
    known = {"seq_len": metadata.get("context_size"), "dataset_path": metadata.get("dataset_path")}
    return fields | {name: value for name, value in known.items() if value} | _sizes(sae_type, tensors, k), tensors


def _official(model_name: object) -> object:
    """Hugging Face's name of what TransformerLens, and so SAELens, calls "gpt2-small" or "pythia-70m-deduped"."""
    from transformer_lens.supported_models import MODEL_ALIASES  # late: it takes seconds

    return next((official for official, aliases in MODEL_ALIASES.items() if model_name in aliases), model_name)


def _scaling_factor(folder: Path) -> float:
    """By which inputs were multiplied in training (Conerly et al. 2024); SAELens saves it beside its checkpoints."""
    file = folder / SCALER
    scale = read_json(file).get("scaling_factor") if file.is_file() else None
    if not isinstance(scale, float) or not 0 < scale < float("inf"):
        raise ValueError(
            f"{folder / CFG}: normalize_activations = 'expected_average_only_in', and {SCALER} holds no scaling_factor;"
            " put the factor of its training there"
        )
    return scale


def _from_gemma_scope(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Lieberum et al. 2024 (arXiv:2408.05147). Model and hook are in the names of the repository and its folders."""
    file = folder / NPZ
    path = f"{folder.absolute()}/"
    if re.search(r"/[^/ ]*transcoders?/", path):
        raise ValueError(f"{file}: a transcoder; SAEs alone are opened here")
    found = _read_npz(file)
    W_enc = found.get("W_enc", torch.empty(0))
    D, F = W_enc.shape if W_enc.ndim == 2 else (None, None)
    tensors = _subtract_b_dec(_checked(file, found, "jumprelu", D, F))
    place = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b.*/layer_(\d+)/", path)
    fields: dict[str, Any] = {"model_name": None, "hook_name": None, "input_unit_norm": False}
    if place:
        size, tuned, site, layer = place.groups()
        fields["model_name"] = f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
        fields["hook_name"] = f"blocks.{layer}.{SITES[GEMMA_SITES[site]]}"
    return fields | _sizes("jumprelu", tensors, None), tensors


def _from_dictionary_learning(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """github.com/saprmarks/dictionary_learning: `load_dictionary`, which gives an AutoEncoder's decoder unit rows."""
    file = folder / AE_CONFIG
    trainer = read_json(file).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    dict_class = trainer.get("dict_class")
    _require(file, "dict_class", dict_class, DICT_CLASSES)
    sae_type = DICT_CLASSES[dict_class]
    unused = {"k", "group_sizes"} | ({"threshold"} if sae_type == "topk" else set())
    found = {name: tensor for name, tensor in _read_pt(folder / AE).items() if name not in unused}
    found = _transposed(found, "encoder.weight", "decoder.weight")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec"}
    found = _renamed(found, names)
    tensors = _checked(folder / AE, found, sae_type, trainer.get("activation_dim"), trainer.get("dict_size"))
    if dict_class == "AutoEncoder":
        tensors = _unit_rows(tensors)
    if dict_class == "JumpReluAutoEncoder":
        tensors = _subtract_b_dec(tensors)
    submodule = re.fullmatch(r"(\w+)_layer_(\d+)", str(trainer.get("submodule_name") or "resid_post_layer_0"))
    site = SITES.get(submodule[1]) if submodule else None
    hook_name = f"blocks.{trainer.get('layer')}.{site}" if site else None
    fields = {"model_name": trainer.get("lm_name"), "hook_name": hook_name, "input_unit_norm": False}
    return fields | _sizes(sae_type, tensors, trainer.get("k")), tensors


def _from_sparsify(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """github.com/EleutherAI/sparsify: `SparseCoder.load_from_disk`.

    The folder's name is the module, as in "layers.5.mlp"; config.json beside the folder names the model.
    """
    file = folder / CFG
    cfg = read_json(file)
    _require(file, "activation", cfg.get("activation", "topk"), ("topk",))
    for option in ("transcode", "skip_connection", "multi_topk", "signed"):
        _require(file, option, cfg.get(option, False), (False,))
    D = cfg.get("d_in")
    F = cfg.get("num_latents")
    if not F and isinstance(D, int) and isinstance(cfg.get("expansion_factor"), int):
        F = D * cfg["expansion_factor"]
    found = _transposed(_read_safetensors(folder / SPARSIFY), "encoder.weight")
    found = _renamed(found, {"encoder.weight": "W_enc", "encoder.bias": "b_enc"})
    tensors = _checked(folder / SPARSIFY, found, "topk", D, F)
    run = folder.parent / AE_CONFIG
    module = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.\w+)?", folder.name)
    site = SPARSIFY_SITES.get(module[2] or "") if module else None
    fields = {
        "model_name": read_json(run).get("model") if run.is_file() else None,
        "hook_name": f"blocks.{module[1]}.{SITES[site]}" if site else None,
        "input_unit_norm": False,
    }
    return fields | _sizes("topk", tensors, cfg.get("k")), tensors


# ---- conventions ----


def _subtract_b_dec(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an SAE that encodes x, not x - b_dec."""
    b_dec = tensors["b_dec"].double()
    shift = torch.cat([b_dec @ block.double() for block in tensors["W_enc"].split(CHUNK, dim=1)])
    return tensors | {"b_enc": (tensors["b_enc"].double() + shift).float()}


def _unit_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an SAE whose latents are measured in units of the norms of the decoder's rows; thresholds already are."""
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    return tensors | {
        "W_enc": tensors["W_enc"] * norms,
        "b_enc": tensors["b_enc"] * norms,
        "W_dec": tensors["W_dec"] / norms.unsqueeze(1),
    }


def _scale_inputs(tensors: dict[str, Tensor], scale: float, rescaled: bool) -> dict[str, Tensor]:
    """Of an SAE trained on scaled inputs; with `rescaled`, its threshold is in units of the norms, which change."""
    changed = {"W_enc": tensors["W_enc"] * scale}
    changed |= {name: tensors[name] / scale for name in ("W_dec", "b_dec")}
    if rescaled and "threshold" in tensors:
        changed["threshold"] = tensors["threshold"] / scale
    return tensors | changed


# ---- files: all are what anybody may have written ----


def _download(source: str) -> Path:
    """The folder of the local cache with the FILES of "user/repo" or "user/repo:folder", and what says its model."""
    repo, folder = repo_and_folder(source)
    prefix = f"{folder}/" if folder else ""
    try:
        cache = snapshot_download(repo, allow_patterns=[AE_CONFIG, *(prefix + name for name in FILES)])
    except Exception as error:  # of a service out of our hands
        raise ValueError(f"{source}: no such folder, and not loaded from the Hub ({one_line(error)})") from None
    return Path(cache) / folder


def repo_and_folder(source: str) -> tuple[str, str]:
    """Of "user/repo" or "user/repo:folder", of which "" is the folder. Raises ValueError when it is neither."""
    match = ON_HUB.fullmatch(source)
    if match is None or ".." in re.split("[/:]", source):
        raise ValueError(f"{source}: no such folder; give a folder, or user/repo or user/repo:folder of the Hub")
    return match["repo"], match["folder"] or ""


def _layer_and_site(hook_name: str) -> dict[str, Any]:
    sites = {hook: site for site, hook in SITES.items()}
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", hook_name)
    if match is None or match[2] not in sites:
        raise ValueError(f"hook_name = {hook_name!r}: no site of Config; give blocks.<layer>.{', '.join(sites)}")
    return {"layer": int(match[1]), "site": sites[match[2]]}


def _sizes(sae_type: str, tensors: dict[str, Tensor], k: object) -> dict[str, Any]:
    act_size, dict_size = tensors["W_enc"].shape
    sizes = {"sae_type": sae_type, "act_size": act_size, "dict_size": dict_size}
    return sizes | ({"top_k": k} if sae_type in ("topk", "batchtopk") else {})


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _transposed(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return tensors | {name: tensors[name].t() for name in names if name in tensors and tensors[name].ndim == 2}


def _require(file: Path, field: str, value: object, allowed: Iterable[object]) -> None:
    if not any(value is known or (isinstance(value, str) and value == known) for known in allowed):
        raise ValueError(f"{file}: {field} = {value!r:.80}: not opened here; can be {', '.join(map(repr, allowed))}")


def _checked(
    file: Path, tensors: dict[str, Tensor], sae_type: SaeType, act_size: object, dict_size: object
) -> dict[str, Tensor]:
    """The tensors in float32, once they are those of the type, as large as the configuration says, and finite.

    Thresholds below 0, which all formats have behind a ReLU, become 0.
    """
    D, F = act_size, dict_size
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"jumprelu": {"threshold": (F,)}, "batchtopk": {"threshold": ()}}.get(sae_type, {})
    if tensors.keys() != shapes.keys():
        raise ValueError(f"{file}: holds {sorted(tensors)[:9]}; a {sae_type} SAE has {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype not in FLOATS or tuple(tensor.shape) != shape:
            says = f"{list(shape)} of floating-point numbers"
            raise ValueError(f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}, should be {says}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} is empty or has numbers that are not finite; get the file again")
    return tensors | {name: tensors[name].clamp_min(0) for name in tensors.keys() & {"threshold"}}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable as safetensors ({one_line(error)})") from None


def _read_npz(file: Path) -> dict[str, Tensor]:
    _check_archive(file)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # whatever numpy, which runs no code of a forged file, stumbles over in it
        raise ValueError(f"{file}: not readable as arrays of numbers ({one_line(error)})") from None


def _read_pt(file: Path) -> dict[str, Tensor]:
    _check_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, which runs no code of a forged file, stumbles over in it
        raise ValueError(f"{file}: not readable as tensors alone ({one_line(error)})") from None
    values = found.values() if isinstance(found, dict) else [found]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.is_cpu for t in values)
    if not plain or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: holds more than named tensors; give the state_dict that dictionary_learning saves")
    if sum(tensor.numel() * tensor.itemsize for tensor in values) > file.stat().st_size:
        raise ValueError(f"{file}: its tensors say that they are larger than the file; it is forged")
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_archive(file: Path) -> None:
    """Of a zip archive: no memory is asked for that the file itself does not fill."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{file}: not a whole zip archive, as numpy and torch write them ({one_line(error)})"
        ) from None
    if size > file.stat().st_size:
        raise ValueError(f"{file}: compressed, or forged: {size:,} bytes unpacked; write it again uncompressed")
