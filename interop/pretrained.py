"""Open the checkpoints of other libraries as SAEs of ours, from a folder or the Hugging Face Hub.

    written by           files                               opened as
    this library         cfg.json, sae_weights.safetensors   what it was; SAELens opens it too
    SAELens              cfg.json, sae_weights.safetensors   vanilla (standard), topk, jumprelu; batchtopk in training;
                                                             (skip) transcoders of the first and of jumprelu
    Gemma Scope          params.npz                          jumprelu
    dictionary_learning  config.json, ae.pt                  vanilla, topk, batchtopk (matryoshka too), jumprelu
    sparsify             cfg.json, sae.safetensors           topk

Where a convention differs it is folded into the weights, so that encode, decode and forward stay those of the writer:

    inputs are multiplied by s, outputs divided            W_enc s,  W_dec / s,  b_dec / s
    latents in units of n_j, the norm of decoder row j     W_enc_j n_j,  b_enc_j n_j,  W_dec_j / n_j
    b_dec is not subtracted from the input                 b_enc + b_dec W_enc
    a threshold below 0, with a ReLU                       0

What cannot be folded is refused by name.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.supported_models import MODEL_ALIASES

from checkpoint import CFG, COUNTERS, WEIGHTS, load_checkpoint, read_json
from config import SITES, TYPES, Config, unused_by
from runtime.checks import explained, require
from sae import SAE_TYPES, BaseAutoencoder, build_sae

NPZ, AE, AE_CONFIG, SPARSIFY, SCALER = "params.npz", "ae.pt", "config.json", "sae.safetensors", "activation_scaler.json"
FILES = (CFG, WEIGHTS, COUNTERS, NPZ, AE, AE_CONFIG, SPARSIFY, SCALER)
SAE_LENS_TYPES = {"standard": "vanilla", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "batchtopk"}
SCALED = "expected_average_only_in"  # SAELens' name of inputs multiplied by one number
DICT_CLASSES = {  # of dictionary_learning
    "AutoEncoder": "vanilla", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}  # names of an encoder that is one of torch's layers
GEMMA_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
SPARSIFY_SITES = {  # module within a block -> site
    "": "resid_post", ".mlp": "mlp_out", ".attn": "attn_out", ".self_attn": "attn_out", ".attention": "attn_out",
}  # fmt: skip
ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<folder>[\w.+-]+(/[\w.+-]+)*))?")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNKNOWN = {"input_scale": torch.tensor(-1.0), "target_scale": torch.tensor(-1.0)}  # training measures them
CHUNK = 4096  # latents at a time in float64


def load_pretrained(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> BaseAutoencoder:
    """Load the SAE in a folder, or on the Hub, as one of our classes, in evaluation mode on `device`, in float32.

    source: a folder in one of the formats above, "user/repo", or "user/repo:folder/in/it".
    model_name, hook_name (such as "blocks.8.hook_resid_pre"): where the files do not say, or say it wrongly.
    Our own checkpoints come back as from `load_checkpoint`. For the others, Config has what their files say: the model,
    the hook, the sizes, k; what concerns training is our defaults, but that an l1_coeff of 0 stands for a penalty that
    they do not tell. Raises ValueError, one line, when there is no SAE, it cannot be represented here, or its files are
    damaged. No code in them is run.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source))
    held = {path.name for path in folder.glob("*")}
    if {CFG, WEIGHTS} <= held and "nn_decompositions" in read_json(folder / CFG):
        sae = load_checkpoint(folder, device)
        several = f"hook_name = {hook_name!r}: {source} is a crosscoder, of several hooks; leave it out"
        require(not hook_name or len(sae.cfg.layers) == 1, several)
        place = _layer_and_site(hook_name) if hook_name else {}
        sae.cfg = replace(sae.cfg, model_name=model_name or sae.cfg.model_name, **place)
        return sae

    formats = {
        (CFG, WEIGHTS): _from_sae_lens, (NPZ,): _from_gemma_scope,
        (AE_CONFIG, AE): _from_dictionary_learning, (CFG, SPARSIFY): _from_sparsify,
    }  # fmt: skip
    readers = [read for files, read in formats.items() if held.issuperset(files)]
    wanted = ", or ".join(" with ".join(files) for files in formats)
    require(readers, f"{source}: holds no SAE ({wanted}); give the folder that does, of the Hub as user/repo:folder")
    fields, tensors = readers[0](folder)
    for field, given in (("model_name", model_name), ("hook_name", hook_name)):
        fields[field] = given or fields.get(field)
        unsaid = f"{source}: does not say its {field}; give load_pretrained(..., {field}=...)"
        require(isinstance(fields[field], str), unsaid)
    fields |= _layer_and_site(fields.pop("hook_name"))
    if "target" in fields:
        written = _layer_and_site(target := fields.pop("target"))
        elsewhere = f"{source}: reads layer {fields['layer']} and writes {target}; one layer alone is opened here"
        require(written["layer"] == fields["layer"], elsewhere)
        fields["target_site"] = written["site"]
    unused = unused_by(fields["sae_type"]) | (
        {"target_l0"} if "l1_coeff" in TYPES[fields["sae_type"]].fields else set()
    )
    fields = {field: value for field, value in fields.items() if field not in unused}
    fields["act_size"], fields["dict_size"] = tensors["W_enc"].shape
    if "target_site" in fields:
        fields["target_size"] = tensors["W_dec"].shape[1]
    with explained(f"{source}: cannot be opened here", ValueError):
        cfg = Config(**{"l1_coeff": 0.0} | fields, device=str(device))
    sae = build_sae(cfg)
    # Training keeps b_dec and the thresholds.
    trained = UNKNOWN | {"threshold_updates": torch.tensor(100)}
    state = sae.state_dict()
    sae.load_state_dict(state | {name: value for name, value in trained.items() if name in state} | tensors)
    return sae.eval()


def new_sae(cfg: Config) -> BaseAutoencoder:
    """Build the dictionary of a Config that is to be trained, from the weights of cfg.init_from where it is given.

    The scale of the activations is measured anew (but not a crosscoder's share of each hook), no latent is dead, and
    what only the other's type has is left out.
    Raises ValueError when there is no such dictionary, or its parameters do not fit.
    """
    sae = SAE_TYPES[cfg.sae_type](cfg)
    if cfg.init_from is None:
        return sae
    other, said = load_pretrained(cfg.init_from), f"init_from = {cfg.init_from!r}:"
    theirs = f"{said} a {other.cfg.sae_type} {other.cfg.kind}"
    alike = (other.cfg.kind, other.cfg.input_unit_norm) == (cfg.kind, cfg.input_unit_norm)
    require(alike, f"{theirs}, input_unit_norm {other.cfg.input_unit_norm}; give the same, or another")
    given, state = other.state_dict(), sae.state_dict()
    for name, parameter in sae.named_parameters():
        require(name in given, f"{theirs}, has no {name}; give one of another type")
        have, need = list(given[name].shape), list(parameter.shape)
        fits = f"{said} {name} is {have}, should be {need}; give dict_size = {other.cfg.dict_size}, or another"
        require(have == need or (name, have) == ("threshold", []), fits)
        given[name] = given[name].expand_as(parameter)
    fresh = {"tokens_since_fired", "steering"}
    taken = {
        name: given[name] for name in state.keys() & given.keys() - fresh if given[name].shape == state[name].shape
    }
    sae.load_state_dict(state | taken | {name: scale for name, scale in UNKNOWN.items() if name in state})
    return sae


# ---- formats: each gives fields of Config, with hook_name in place of layer and site, and tensors by our names ----


def _from_sae_lens(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `SAE.save_model` of SAELens wrote. Before its version 6, cfg.json was flat, with other names."""
    file, weights = folder / CFG, folder / WEIGHTS
    cfg = read_json(file)
    metadata = cfg | cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture, k = cfg.get("architecture", "standard"), cfg.get("k")
    is_transcoder, skip = "transcoder" in str(architecture), "skip_transcoder" in str(architecture)
    if is_transcoder:
        architecture = architecture.replace("skip_", "").removesuffix("transcoder").strip("_") or "standard"
    if activation == "topk":
        kwargs = cfg.get("activation_fn_kwargs")
        architecture, k = "topk", kwargs.get("k") if isinstance(kwargs, dict) else None
    _check(file, "architecture", architecture, SAE_LENS_TYPES)
    _check(file, "activation_fn", activation, ("relu", "topk"))
    head = metadata.get("hook_head_index", metadata.get("hook_point_head_index"))
    _check(file, "hook_head_index", head, (None,))
    norm = cfg.get("normalize_activations") or "none"
    norm = SCALED if norm is True else norm
    _check(file, "normalize_activations", norm, ("none", "layer_norm", SCALED))
    in_norms, subtracted = cfg.get("rescale_acts_by_decoder_norm", False), cfg.get("apply_b_dec_to_input", True)
    _check(file, "rescale_acts_by_decoder_norm", in_norms, (True, False) if "topk" in architecture else (False,))
    _check(file, "apply_b_dec_to_input", subtracted, (True, False))
    unsaid = metadata is cfg and "perhaps center_writing_weights (files from before SAELens 6 do not say)"
    if processing := metadata.get("model_from_pretrained_kwargs") or unsaid:
        warnings.warn(f"{file}: trained on a model with {processing}; load_model loads raw weights", stacklevel=3)

    found = _read_tensors(weights)
    unscaled = (found.pop("scaling_factor", torch.ones(())) == 1).all()
    require(unscaled, f"{weights}: scaling_factor is not 1; latents scaled by finetuning are not opened")
    sae_type, sizes = SAE_LENS_TYPES[architecture], (cfg.get("d_in"), cfg.get("d_sae"))
    d_out = cfg.get("d_out") if is_transcoder else None
    tensors = _checked(weights, found, sae_type, sizes, {"topk_threshold": "threshold"}, d_out, skip)
    scale = 1.0
    if norm == SCALED:  # by the factor of its training (Conerly et al. 2024), which is saved beside its checkpoints
        scale = read_json(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
        problem = f"{file}: normalize_activations = {SCALED!r}, and {SCALER} holds no scaling_factor"
        require(isinstance(scale, float) and 0 < scale < float("inf"), f"{problem}; write that of its training there")
    # TransformerLens, and so SAELens, has names of its own, such as "gpt2-small".
    model = metadata.get("model_name")
    fields = {
        "sae_type": sae_type,
        "model_name": next((name for name, aliases in MODEL_ALIASES.items() if model in aliases), model),
        "hook_name": metadata.get("hook_name", metadata.get("hook_point")),
        "input_unit_norm": norm == "layer_norm",
        "seq_len": metadata.get("context_size") or Config.seq_len,
        "dataset_path": metadata.get("dataset_path") or Config.dataset_path,
        "target_l0": k,
    }
    if is_transcoder:
        _check(file, "apply_b_dec_to_input", subtracted, (False,))
        _check(file, "normalize_activations", norm, ("none",))
        target = metadata.get("hook_name_out")
        unsaid = f"{file}: does not say hook_name_out, the hook that it reconstructs; add it to its metadata"
        require(isinstance(target, str), unsaid)
        return fields | {"target": target, "skip": skip}, tensors
    return fields, _folded(tensors, scale, in_norms, subtracted)


def _from_gemma_scope(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an SAE of Gemma Scope (arXiv:2408.05147). The names of its repository and folders say model and hook."""
    file, path = folder / NPZ, f"{folder.absolute()}/"
    require(not re.search(r"/[^/ ]*transcoders?/", path), f"{file}: a transcoder; SAEs alone are opened here")
    found = _read_tensors(file)
    W_enc = found.get("W_enc", torch.empty(0))
    tensors = _checked(file, found, "jumprelu", W_enc.shape if W_enc.ndim == 2 else (0, 0))
    fields: dict[str, Any] = {"sae_type": "jumprelu"}
    if place := re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b.*/layer_(\d+)/", path):
        size, tuned, site, layer = place.groups()
        fields["model_name"] = f"google/gemma-2-{size}{'-it' * (tuned == 'it')}"
        fields["hook_name"] = f"blocks.{layer}.{SITES[GEMMA_SITES[site]]}"
    return fields, _folded(tensors, subtracted=False)


def _from_dictionary_learning(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what dictionary_learning saved, as its `load_dictionary` does, which gives an AutoEncoder unit rows."""
    file, weights = folder / AE_CONFIG, folder / AE
    trainer = read_json(file).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    dict_class, sizes = trainer.get("dict_class"), (trainer.get("activation_dim"), trainer.get("dict_size"))
    _check(file, "dict_class", dict_class, DICT_CLASSES)
    sae_type = DICT_CLASSES[dict_class]
    unused = ("k", "group_sizes", "threshold") if sae_type == "topk" else ("k", "group_sizes")
    found = {name: tensor for name, tensor in _read_tensors(weights).items() if name not in unused}
    tensors = _checked(weights, found, sae_type, sizes, LINEAR | {"decoder.weight": "W_dec", "bias": "b_dec"})
    fields = {"sae_type": sae_type, "model_name": trainer.get("lm_name"), "target_l0": trainer.get("k")}
    site, _, _ = str(trainer.get("submodule_name") or "resid_post").partition("_layer_")
    if site in SITES:
        fields["hook_name"] = f"blocks.{trainer.get('layer')}.{SITES[site]}"
    in_norms, subtracted = dict_class == "AutoEncoder", dict_class != "JumpReluAutoEncoder"
    return fields, _folded(tensors, 1.0, in_norms, subtracted)


def _from_sparsify(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `SparseCoder.save_to_disk` of sparsify wrote.

    The folder's name is the module, as in "layers.5.mlp"; config.json beside the folder names the model.
    """
    file, weights, run = folder / CFG, folder / SPARSIFY, folder.parent / AE_CONFIG
    cfg = read_json(file)
    _check(file, "activation", cfg.get("activation", "topk"), ("topk",))
    for option in ("transcode", "skip_connection", "multi_topk", "signed"):
        _check(file, option, cfg.get(option, False), (False,))
    D, F, factor = cfg.get("d_in"), cfg.get("num_latents"), cfg.get("expansion_factor")
    if not F and isinstance(D, int) and isinstance(factor, int):
        F = D * factor
    tensors = _checked(weights, _read_tensors(weights), "topk", (D, F), LINEAR)
    fields = {"sae_type": "topk", "target_l0": cfg.get("k")}
    if run.is_file():
        fields["model_name"] = read_json(run).get("model")
    module = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.\w+)?", folder.name)
    if module and (site := SPARSIFY_SITES.get(module[2] or "")):
        fields["hook_name"] = f"blocks.{module[1]}.{SITES[site]}"
    return fields, tensors


def _folded(
    tensors: dict[str, Tensor], scale: float = 1.0, in_norms: bool = False, subtracted: bool = True
) -> dict[str, Tensor]:
    """Fold the conventions of another library into the weights, as the table at the top of this file says.

    scale: by which it multiplies inputs. in_norms: whether its latents are in units of the decoder's norms, as its
    thresholds then already are. subtracted: whether it takes b_dec from the input.
    """
    folded = tensors | {"W_enc": tensors["W_enc"] * scale}
    in_outputs = ("W_dec", "b_dec", "threshold") if in_norms and "threshold" in tensors else ("W_dec", "b_dec")
    folded |= {name: tensors[name] / scale for name in in_outputs}
    if in_norms:
        norms = folded["W_dec"].norm(dim=1).clamp_min(1e-8)
        folded |= {name: folded[name] * norms for name in ("W_enc", "b_enc")}
        folded["W_dec"] = folded["W_dec"] / norms.unsqueeze(1)
    if not subtracted:
        b_dec = folded["b_dec"].double()
        shift = torch.cat([b_dec @ block.double() for block in folded["W_enc"].split(CHUNK, dim=1)])
        folded["b_enc"] = (folded["b_enc"].double() + shift).float()
    return folded


def _layer_and_site(hook_name: str) -> dict[str, Any]:
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", hook_name)
    require(match, f"hook_name = {hook_name!r}: no hook of a block; give one such as blocks.8.hook_resid_pre")
    return {"layer": int(match[1]), "site": match[2]}


# ---- files, which anybody may have written ----


def _download(source: str) -> Path:
    """Fetch FILES of "user/repo" or "user/repo:folder" from the Hub, with what names their model, into its cache."""
    repo, folder = repo_and_folder(source)
    wanted = [AE_CONFIG, *(f"{folder}/{name}".lstrip("/") for name in FILES)]
    with explained(f"{source}: no such folder, and not loaded from the Hub", Exception):
        return Path(snapshot_download(repo, allow_patterns=wanted)) / folder


def repo_and_folder(source: str) -> tuple[str, str]:
    """Split "user/repo:folder"; the folder of "user/repo" is "". Raises ValueError when it is neither."""
    match = ON_HUB.fullmatch(source)
    names = match is not None and ".." not in re.split("[/:]", source)
    require(names, f"{source}: no such folder; give a folder, or user/repo or user/repo:folder of the Hub")
    return match["repo"], match["folder"] or ""


def _check(file: Path, field: str, value: object, allowed: Iterable[object]) -> None:
    known = any(value is one or (isinstance(value, str) and value == one) for one in allowed)
    require(known, f"{file}: {field} = {value!r:.80}: not opened here; can be {', '.join(map(repr, allowed))}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a .safetensors, .npz or .pt, running no code in it."""
    with explained(f"{file}: not readable as tensors alone", Exception):
        if file.suffix == ".safetensors":
            found = load_file(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    named = isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())
    require(named, f"{file}: holds more than named tensors; give the file that its library saves")
    return {name: tensor.detach() for name, tensor in found.items()}


def _checked(
    file: Path,
    found: dict[str, Tensor],
    sae_type: str,
    sizes: Sequence[object],
    names: Mapping[str, str] = {},
    d_out: object = None,
    skip: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors in float32, once they are those of the type, as large as is said, and finite.

    sizes: act_size and dict_size, as the files say. d_out, skip: of a transcoder. names: ours, by the file's. torch's
    layers have rows in "...weight" where we have columns. Thresholds below 0, which all formats have behind a ReLU,
    become 0.
    """
    D, F = sizes
    out = D if d_out is None else d_out
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, out), "b_dec": (out,)}
    shapes |= {"W_skip": (out, D)} if skip else {}
    shapes |= {"jumprelu": {"threshold": (F,)}, "batchtopk": {"threshold": ()}}.get(sae_type, {})
    turned = {name: t.t() if name.endswith(".weight") and t.ndim == 2 else t for name, t in found.items()}
    tensors = {names.get(name, name): tensor for name, tensor in turned.items()}
    theirs = tensors.keys() == shapes.keys()
    require(theirs, f"{file}: holds {sorted(tensors)[:9]}; a {sae_type} SAE has {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor, should = tensors[name], f"{list(shape)} of floating-point numbers"
        fits = tensor.dtype in FLOATS and tensor.shape == shape
        require(fits, f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}, should be {should}")
        tensors[name] = tensor.float()
        finite = tensor.numel() and torch.stack(tensors[name].aminmax()).isfinite().all()
        require(finite, f"{file}: {name} is empty or has numbers that are not finite; get the file again")
    if "threshold" in tensors:
        tensors["threshold"].clamp_min_(0)
    if skip:
        tensors["W_skip"] = tensors["W_skip"].t()
    return tensors
