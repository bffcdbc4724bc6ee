"""Open the checkpoints of other libraries as SAEs of ours, from a folder or the Hugging Face Hub.

    written by           files                               opened as
    this library         cfg.json, sae_weights.safetensors   what it was; SAELens opens it too
    SAELens              cfg.json, sae_weights.safetensors   what it was trained as, gated as jumprelu; transcoders
    Gemma Scope          params.npz                          jumprelu; transcoders
    Gemma Scope 2        config.json, params.safetensors     jumprelu; transcoders
    Llama Scope          hyperparams.json, checkpoints       jumprelu; transcoders
    Qwen-Scope           layer<n>.sae.pt                     topk
    dictionary_learning  config.json, ae.pt                  vanilla, topk, batchtopk (matryoshka too), jumprelu, gated
    sparsify             cfg.json, sae.safetensors           topk

Where a convention differs it is folded into the weights, so that encode, decode and forward stay those of the writer:

    inputs are multiplied by s, outputs divided            W_enc s,  W_dec / s,  b_dec / s
    inputs are whitened to (x - m) M, outputs back         M W_enc,  W_dec M^-1,  b_dec M^-1 + m
    latents in units of n_j, the norm of decoder row j     W_enc_j n_j,  b_enc_j n_j,  W_dec_j / n_j
    b_dec is not subtracted from the input                 b_enc + b_dec W_enc
    u_j exp(r_j) + b_j where a gate u_j + g_j is above 0   W_enc_j exp(r_j), a threshold of b_j - g_j exp(r_j)
    a threshold below 0, with a ReLU                       0

What cannot be folded is refused by name.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.supported_models import MODEL_ALIASES

from checkpoint import CFG, COUNTERS, UNIT_ROUNDING, WEIGHTS, load_checkpoint, read_json
from config import OUTSIDE, SITES, TYPES, Config, unused_by
from runtime.checks import explained, require
from sae import SAE_TYPES, BaseAutoencoder, build_sae

NPZ, AE, AE_CONFIG, SPARSIFY, SCALER = "params.npz", "ae.pt", "config.json", "sae.safetensors", "activation_scaler.json"
PARAMS, HYPER, FINAL = "params.safetensors", "hyperparams.json", "checkpoints/final.safetensors"
LM, WHITENING = "lm_config.json", "activation_whitening.safetensors"
FILES = (CFG, WEIGHTS, COUNTERS, NPZ, AE, AE_CONFIG, SPARSIFY, SCALER, PARAMS, HYPER, FINAL, LM, WHITENING)
SAE_LENS_TYPES = {
    "standard": "vanilla", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "batchtopk", "gated": "gated",
    "matryoshka_batchtopk": "matryoshka",
}  # fmt: skip
# SAELens' names of inputs multiplied by one number, and whitened
SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"
DICT_CLASSES = {  # of dictionary_learning
    "AutoEncoder": "vanilla", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu", "GatedAutoEncoder": "gated",
}  # fmt: skip
NAMES = {  # of a tensor, by the files' names; a gated encoder's b_enc is that of its magnitudes
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec",
    "w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip", "bias": "b_dec", "decoder_bias": "b_dec",
    "topk_threshold": "threshold", "b_mag": "b_enc", "mag_bias": "b_enc", "gate_bias": "b_gate",
}  # fmt: skip
GEMMA_HOOKS = {  # read, and written where it is another
    "res": ["hook_resid_post"], "mlp": ["hook_mlp_out"], "att": ["attn.hook_z"],
    "transcoders": ["ln2.hook_normalized", "hook_mlp_out"],  # without the gain (arXiv:2408.05147, page 18)
}  # fmt: skip
# What leaves or enters a module of a block of Hugging Face -> hook. Where a norm follows a module, as in Gemma,
# hook_mlp_out and hook_attn_out are what leaves the norm.
MODULES = {
    ".output": "hook_resid_post", ".mlp.output": "mlp.hook_out", ".attn.output": "attn.hook_out",
    ".self_attn.output": "attn.hook_out", ".attention.output": "attn.hook_out",
    ".self_attn.o_proj.input": "attn.hook_z", ".pre_feedforward_layernorm.output": "ln2.hook_out",
    ".post_feedforward_layernorm.output": "hook_mlp_out",
}  # fmt: skip
Tensors = dict[str, Tensor]
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

    source: a folder in one of the formats above, "user/repo", or "user/repo:folder/in/it"; of Qwen-Scope, the file.
    model_name, hook_name (such as "blocks.8.hook_resid_pre"): where the files do not say, or say it wrongly.
    Our own checkpoints come back as `load_checkpoint` gives them; one without counters, or saved again by SAELens, is
    read as a checkpoint of SAELens. For all others, Config has what the files say (the model, the hooks, the sizes, k)
    and our defaults for training; l1_coeff is 0 for types with a penalty, whose weight is not read. Raises ValueError,
    one line, when there is no SAE, it cannot be represented here, or its files are damaged. No code in them is run.
    """
    folder = Path(source) if Path(source).exists() else _download(str(source))
    held = [folder.name] if folder.is_file() else [path.name for path in folder.glob("*")]
    if {CFG, WEIGHTS, COUNTERS} <= set(held) and "nn_decompositions" in read_json(folder / CFG):
        sae = load_checkpoint(folder, device)
        several = f"hook_name = {hook_name!r}: {source} is a crosscoder, of several hooks; leave it out"
        require(not hook_name or len(sae.cfg.layers) == 1, several)
        place = _layer_and_site(hook_name) if hook_name else {}
        sae.cfg = replace(sae.cfg, model_name=model_name or sae.cfg.model_name, **place)
        return sae

    formats = {
        (CFG, WEIGHTS): _from_sae_lens, (NPZ,): _from_gemma_scope, (AE_CONFIG, PARAMS): _from_gemma_scope_2,
        (HYPER, "checkpoints"): _from_llama_scope, ("layer*.sae.pt",): _from_qwen_scope,
        (AE_CONFIG, AE): _from_dictionary_learning, (CFG, SPARSIFY): _from_sparsify,
    }  # fmt: skip
    readers = [read for files, read in formats.items() if all(matching(held, file) for file in files)]
    wanted = ", or ".join(" with ".join(files) for files in formats)
    require(readers, f"{source}: holds no SAE ({wanted}); give the folder that does, of the Hub as user/repo:folder")
    fields, tensors = readers[0](folder)
    sae_type = {"gated": "jumprelu"}.get(fields["sae_type"], fields["sae_type"])
    for field, given in (("model_name", model_name), ("hook_name", hook_name)):
        fields[field] = given or fields.get(field)
        unsaid = f"{source}: does not say its {field}; give load_pretrained(..., {field}=...)"
        require(isinstance(fields[field], str), unsaid)
    fields |= _layer_and_site(fields.pop("hook_name"))
    if "target" in fields:
        target = fields.pop("target")
        unsaid = f"{source}: does not say hook_name_out, the hook that it reconstructs; add it to its configuration"
        require(isinstance(target, str), unsaid)
        written = _layer_and_site(target)
        elsewhere = f"{source}: reads layer {fields['layer']} and writes {target}; one layer alone is opened here"
        require(written["layer"] == fields["layer"], elsewhere)
        fields |= {"target_site": written["site"], "target_size": tensors["W_dec"].shape[1]}
    untold = TYPES[sae_type].penalty and fields.get("target_l0") is None
    unused = unused_by(sae_type) | ({"target_l0"} if untold else set())
    fields = {field: value for field, value in fields.items() if field not in unused} | {"sae_type": sae_type}
    fields["act_size"], fields["dict_size"] = tensors["W_enc"].shape
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


def _from_sae_lens(folder: Path) -> tuple[dict[str, Any], Tensors]:
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
    _check(file, "normalize_activations", norm, ("none", "layer_norm", SCALED, WHITENED))
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
    details, trained = metadata.get("training_architecture_details"), str(metadata.get("training_architecture"))
    details, trained = details if isinstance(details, dict) else {}, SAE_LENS_TYPES.get(trained, trained)
    threshold = found.get("threshold", torch.empty(0)).flatten()
    k, of_batches = details.get("k", k), trained in ("batchtopk", "matryoshka") and "k" in details
    one = torch.allclose(threshold.float(), threshold[:1].float(), rtol=UNIT_ROUNDING, atol=0)
    if sae_type == "jumprelu" and of_batches and one:  # else norms were folded, and it is a JumpReLU's
        sae_type, found["threshold"] = trained, threshold[:1].squeeze()
    d_out = cfg.get("d_out") if is_transcoder else None
    tensors = _checked(weights, found, sae_type, sizes, d_out, skip)
    scale, whitening = 1.0, {}
    if norm == SCALED:  # by the factor of its training (Conerly et al. 2024), which is saved beside its checkpoints
        scale = read_json(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
        problem = f"{file}: normalize_activations = {SCALED!r}, and {SCALER} holds no scaling_factor"
        require(isinstance(scale, float) and 0 < scale < float("inf"), f"{problem}; write that of its training there")
    if norm == WHITENED:  # likewise
        shapes = {"mean": sizes[:1], "matrix": sizes[:1] * 2, "inverse_matrix": sizes[:1] * 2}
        whitening = _fitting(folder / WHITENING, _read_tensors(folder / WHITENING), shapes, "a whitening")
    # TransformerLens, and so SAELens, has names of its own, such as "gpt2-small".
    model, widths = metadata.get("model_name"), (cfg | details).get("matryoshka_widths")
    fields = {
        "sae_type": sae_type,
        "model_name": next((name for name, aliases in MODEL_ALIASES.items() if model in aliases), model),
        "hook_name": metadata.get("hook_name", metadata.get("hook_point")),
        "input_unit_norm": norm == "layer_norm",
        "seq_len": metadata.get("context_size") or Config.seq_len,
        "dataset_path": metadata.get("dataset_path") or Config.dataset_path,
        "target_l0": round(k) if isinstance(k, float) and abs(k) < 2**63 and sae_type != "topk" else k,
    }
    if isinstance(widths, list) and all(type(width) is int for width in widths):
        fields["prefixes"] = [width / sizes[1] for width in widths]
    if is_transcoder:
        _check(file, "apply_b_dec_to_input", subtracted, (False,))
        _check(file, "normalize_activations", norm, ("none",))
        return fields | {"target": metadata.get("hook_name_out"), "skip": skip}, tensors
    return fields, _folded(tensors, scale, in_norms, subtracted, whitening)


def _from_gemma_scope(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read what Gemma Scope holds (arXiv:2408.05147). The names of its repository and folders say model and hooks."""
    file, path, fields = folder / NPZ, f"{folder.absolute()}/", {"sae_type": "jumprelu"}
    place = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b.*/(?:layer_(\d+)|embedding)/", path)
    known = place or not re.search(r"/([^/ ]*transcoders?|embedding)/", path)
    unnamed = (
        f"{file}: a transcoder, or of embeddings; name its folders as in google/gemma-scope-2b-pt-transcoders or -res"
    )
    require(known, unnamed)
    if place:
        size, tuned, kind, layer = place.groups()
        fields["model_name"] = f"google/gemma-2-{size}{'-it' * (tuned == 'it')}"
        hooks = [f"blocks.{layer}.{hook}" for hook in GEMMA_HOOKS[kind]] if layer else ["hook_embed"]
        fields |= zip(("hook_name", "target"), hooks)
    tensors = _checked(file, _read_tensors(file), "jumprelu")
    # It reads embeddings before Gemma multiplies them by sqrt(D), which hook_embed comes after.
    scale = len(tensors["W_enc"]) ** -0.5 if fields.get("hook_name") == "hook_embed" else 1.0
    return fields, _folded(tensors, scale, subtracted="target" in fields)


def _from_gemma_scope_2(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read what Gemma Scope 2 holds, of models of Gemma 3."""
    file, found = folder / AE_CONFIG, _read_tensors(folder / PARAMS)
    cfg = read_json(file)
    skip, kind = cfg.get("affine_connection", "affine_skip_connection" in found), cfg.get("type", "sae")
    _check(file, "architecture", cfg.get("architecture"), ("jump_relu",))
    _check(file, "affine_connection", skip, (True, False))
    _check(file, "type", kind, ("sae", "transcoder"))
    read, written = cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")
    model = str(cfg.get("model_name", "")).removeprefix("google/").replace("-v3-", "-3-").replace("270m-pt", "270m")
    fields = {"sae_type": "jumprelu", "model_name": model and f"google/{model}", "skip": skip}
    fields["hook_name"] = _hook_of(read)
    fields |= {"target": _hook_of(written)} if kind == "transcoder" or written not in (None, read) else {}
    return fields, _folded(_checked(folder / PARAMS, found, "jumprelu", skip=skip), subtracted="target" in fields)


def _from_llama_scope(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read what Llama Scope holds (arXiv:2410.20526), as the library of its authors did in 2024, lm-saes.

    It multiplies inputs by s and divides outputs by t, but latents are divided by s before they are compared.
    """
    file, weights, lm = folder / HYPER, folder / FINAL, folder / LM
    cfg = read_json(file)
    needed = {"act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    needed |= {"sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False}
    for field, value in needed.items():
        _check(file, field, cfg.get(field), (value,))
    norms, D = cfg.get("dataset_average_activation_norm"), cfg.get("d_model")
    norms = norms if isinstance(norms, dict) else {}
    said = {"jump_relu_threshold": cfg.get("jump_relu_threshold"), "in": norms.get("in"), "out": norms.get("out")}
    for field, value in said.items():
        above = isinstance(value, int | float) and 0 < value < 1e30
        require(above, f"{file}: {field} = {value!r:.80}: should be a number above 0; get the file again")
    tensors = _checked(weights, _read_tensors(weights), "vanilla", (D, cfg.get("d_sae")))
    factors = {"b_enc": said["in"] / D**0.5, "b_dec": said["out"] / D**0.5, "W_dec": said["out"] / said["in"]}
    tensors |= {name: tensors[name] * factor for name, factor in factors.items()}
    tensors["threshold"] = torch.full_like(tensors["b_enc"], said["jump_relu_threshold"])
    read, written = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    fields = {"sae_type": "jumprelu", "hook_name": read} | ({} if written == read else {"target": written})
    fields["model_name"] = read_json(lm).get("model_name") if lm.is_file() else None
    return fields, _folded(tensors, 1.0, True, "target" in fields)


def _from_qwen_scope(file: Path) -> tuple[dict[str, Any], Tensors]:
    """Read a layer of Qwen-Scope. The names of its repository and file say model, k and layer."""
    require(file.is_file(), f"{file}: holds a file for each layer; give one, as in user/repo:layer5.sae.pt")
    place = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)\b.*/layer(\d+)\.sae\.pt$", f"{file.absolute()}")
    require(place, f"{file}: does not say model, k and layer; put it in a folder with its repository's name")
    found = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in _read_tensors(file).items()}
    fields = {"model_name": f"Qwen/{place[1]}", "target_l0": int(place[2])}
    fields |= {"sae_type": "topk", "hook_name": f"blocks.{place[3]}.hook_resid_post"}
    return fields, _folded(_checked(file, found, "topk"), subtracted=False)


def _from_dictionary_learning(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read what dictionary_learning saved, as its `load_dictionary` does, which gives an AutoEncoder unit rows."""
    file, weights = folder / AE_CONFIG, folder / AE
    trainer = read_json(file).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    dict_class, sizes = trainer.get("dict_class"), (trainer.get("activation_dim"), trainer.get("dict_size"))
    _check(file, "dict_class", dict_class, DICT_CLASSES)
    sae_type = DICT_CLASSES[dict_class]
    unused = ("k", "group_sizes", "threshold") if sae_type == "topk" else ("k", "group_sizes")
    found = {name: tensor for name, tensor in _read_tensors(weights).items() if name not in unused}
    tensors = _checked(weights, found, sae_type, sizes)
    fields = {"sae_type": sae_type, "model_name": trainer.get("lm_name"), "target_l0": trainer.get("k")}
    site, _, _ = str(trainer.get("submodule_name") or "resid_post").partition("_layer_")
    sites = SITES | {"mlp_out": "mlp.hook_out", "attn_out": "attn.hook_out"}  # modules' outputs
    if site in sites:
        fields["hook_name"] = f"blocks.{trainer.get('layer')}.{sites[site]}"
    in_norms, subtracted = dict_class == "AutoEncoder", dict_class != "JumpReluAutoEncoder"
    return fields, _folded(tensors, 1.0, in_norms, subtracted)


def _from_sparsify(folder: Path) -> tuple[dict[str, Any], Tensors]:
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
    tensors = _checked(weights, _read_tensors(weights), "topk", (D, F))
    fields = {"sae_type": "topk", "target_l0": cfg.get("k"), "hook_name": _hook_of(f"{folder.name}.output")}
    if run.is_file():
        fields["model_name"] = read_json(run).get("model")
    return fields, tensors


def _folded(
    tensors: Tensors, scale: float = 1.0, in_norms: bool = False, subtracted: bool = True, whitening: Mapping = {}
) -> Tensors:
    """Fold the conventions of another library into the weights, as the table at the top of this file says.

    scale: by which it multiplies inputs. in_norms: whether its latents are in units of the decoder's norms, as its
    thresholds then already are. subtracted: whether it takes b_dec from the input, or is a transcoder.
    """
    folded = tensors | {"W_enc": tensors["W_enc"] * scale}
    in_outputs = ("W_dec", "b_dec", "threshold") if in_norms and "threshold" in tensors else ("W_dec", "b_dec")
    folded |= {name: tensors[name] / scale for name in in_outputs}
    if in_norms:
        norms = folded["W_dec"].norm(dim=1).clamp_min(1e-8)
        norms = torch.where((norms - 1).abs() < UNIT_ROUNDING, 1, norms)
        folded |= {name: folded[name] * norms for name in ("W_enc", "b_enc")}
        folded["W_dec"] = folded["W_dec"] / norms.unsqueeze(1)
    if not subtracted:
        b_dec = folded["b_dec"].double()
        shift = torch.cat([b_dec @ block.double() for block in folded["W_enc"].split(CHUNK, dim=1)])
        folded["b_enc"] = (folded["b_enc"].double() + shift).float()
    if whitening:
        matrix, inverse = whitening["matrix"], whitening["inverse_matrix"]
        folded |= {"W_enc": matrix @ folded["W_enc"], "W_dec": folded["W_dec"] @ inverse}
        folded["b_dec"] = folded["b_dec"] @ inverse + whitening["mean"]
    return folded


def _hook_of(module: object) -> str | None:
    """Name a place such as "model.layers.5.mlp.output" as TransformerLens does; None where it is no site."""
    place = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.[\w.]+)", str(module))
    return f"blocks.{place[1]}.{MODULES[place[2]]}" if place and place[2] in MODULES else None


def _layer_and_site(hook_name: str) -> dict[str, Any]:
    if hook_name.startswith(OUTSIDE):
        return {"layer": 0, "site": hook_name}
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", hook_name)
    require(match, f"hook_name = {hook_name!r}: no hook of a block; give one such as blocks.8.hook_resid_pre")
    return {"layer": int(match[1]), "site": match[2]}


# ---- files, which anybody may have written ----


def _download(source: str) -> Path:
    """Fetch FILES of "user/repo:folder" from the Hub, or the file of that name, and what names its model."""
    repo, folder = repo_and_folder(source)
    wanted = [AE_CONFIG, *filter(None, [folder]), *(f"{folder}/{name}".lstrip("/") for name in FILES)]
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


def _read_tensors(file: Path) -> Tensors:
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
    file: Path, found: Tensors, sae_type: str, sizes: Sequence[object] = (), d_out: object = None, skip: bool = False
) -> Tensors:
    """Return the tensors by our names, once they are those of the type, as large as is said, and finite.

    sizes: act_size and dict_size, where the files say them. d_out, skip: of a transcoder. torch's layers, and SAELens'
    W_skip, have rows where we have columns. A gated encoder becomes a JumpReLU's. Thresholds below 0, which all formats
    have behind a ReLU, become 0.
    """
    turned = {name for name, t in found.items() if t.ndim == 2 and (name == "W_skip" or name.endswith(".weight"))}
    tensors = {NAMES.get(name, name): t.t() if name in turned else t for name, t in found.items()}
    W_enc = tensors.get("W_enc", torch.empty(0))
    D, F = sizes or (W_enc.shape if W_enc.ndim == 2 else (0, 0))
    out = D if d_out is None else d_out
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, out), "b_dec": (out,)}
    shapes |= {"W_skip": (D, out)} if skip else {}
    shapes |= {
        "jumprelu": {"threshold": (F,)}, "batchtopk": {"threshold": ()}, "matryoshka": {"threshold": ()},
        "gated": {"r_mag": (F,), "b_gate": (F,)},
    }.get(sae_type, {})  # fmt: skip
    tensors = _fitting(file, tensors, shapes, f"a {sae_type} SAE")
    if sae_type == "gated":
        gain, gate = tensors.pop("r_mag").exp(), tensors.pop("b_gate")
        changed = {"W_enc": tensors["W_enc"] * gain, "threshold": tensors["b_enc"] - gain * gate}
        return _checked(file, tensors | changed, "jumprelu", sizes)
    if "threshold" in tensors:
        tensors["threshold"].clamp_min_(0)
    return tensors


def _fitting(file: Path, found: Tensors, shapes: Mapping[str, tuple], what: str) -> Tensors:
    """Return the tensors in float32, once they have these names and shapes, and are finite."""
    require(found.keys() == shapes.keys(), f"{file}: holds {sorted(found)[:9]}; {what} has {sorted(shapes)}")
    tensors = {}
    for name, shape in shapes.items():
        tensor, should = found[name], f"{list(shape)} of floating-point numbers"
        fits = tensor.dtype in FLOATS and tensor.shape == shape
        require(fits, f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}, should be {should}")
        tensors[name] = tensor.float()
        finite = tensor.numel() and torch.stack(tensors[name].aminmax()).isfinite().all()
        require(finite, f"{file}: {name} is empty or has numbers that are not finite; get the file again")
    return tensors
