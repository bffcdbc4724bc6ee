"""Open checkpoints that SAELens, dictionary_learning and sparsify wrote, and compute what those compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import torch
from dictionary_learning import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from hub_server import standing_in
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor, nn

from interop.pretrained import load_pretrained

D, F, K = 24, 96, 6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module, negative_thresholds: bool = False) -> nn.Module:
    """Move every parameter and threshold away from where it starts, decoder rows to many norms."""
    with torch.no_grad():
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if "threshold" in name:
                parameter.copy_(torch.rand_like(parameter) * 1.2 - 0.6 * negative_thresholds)
            elif parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def inputs(*shape: int) -> Tensor:
    return 2 * torch.randn(*(shape or (50,)), D) + 0.3


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


# ---- SAELens ----

OURS = {"standard": "vanilla", "gated": "jumprelu", "matryoshka_batchtopk": "matryoshka"}
METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "context_size": 64, "dataset_path": "a/b"}


def sae_lens_sae(architecture: str, **fields: object) -> sae_lens.SAE:
    extra = {"k": K} if architecture == "topk" else {}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": METADATA} | extra | fields
    return shaken(sae_lens.SAE.from_dict(cfg), negative_thresholds=True)


def assert_same_as_sae_lens(ours: nn.Module, theirs: sae_lens.SAE, x: Tensor) -> None:
    acts = theirs.encode(x)
    same(ours.encode(x), acts)
    assert torch.equal(ours.encode(x) > 0, acts > 0) and 0 < (acts > 0).sum() < acts.numel()
    same(ours(x).sae_out, theirs(x))
    if theirs.cfg.normalize_activations == "none":
        same(ours.decode(acts), theirs.decode(acts))


@pytest.mark.parametrize("shape", [(50,), (5, 8)])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_sae_lens(tmp_path: Path, architecture: str, subtract: bool, norm: str, shape: tuple[int, ...]) -> None:
    theirs = sae_lens_sae(architecture, apply_b_dec_to_input=subtract, normalize_activations=norm)
    theirs.save_model(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.cfg.sae_type == OURS.get(architecture, architecture)
    assert (ours.cfg.model_name, ours.cfg.layer, ours.cfg.site) == ("gpt2", 3, "resid_post")
    assert (ours.cfg.act_size, ours.cfg.dict_size, ours.cfg.input_unit_norm) == (D, F, norm == "layer_norm")
    assert (ours.cfg.seq_len, ours.cfg.dataset_path) == (64, "a/b")
    assert_same_as_sae_lens(ours, theirs, inputs(*shape))


def test_sae_lens_rescaled_by_decoder_norms(tmp_path: Path) -> None:
    theirs = sae_lens_sae("topk", rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    theirs.save_model(tmp_path)
    assert_same_as_sae_lens(load_pretrained(tmp_path), theirs, inputs())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_sae_lens_in_another_format_of_numbers(tmp_path: Path, dtype: str) -> None:
    sae_lens_sae("jumprelu").to(getattr(torch, dtype)).save_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path, dtype="float32")
    assert_same_as_sae_lens(load_pretrained(tmp_path), theirs, inputs())


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("norm", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("architecture", ["matryoshka_batchtopk", "batchtopk", "topk", "standard", "jumprelu", "gated"])
def test_sae_lens_in_training(tmp_path: Path, architecture: str, norm: str, rescaled: bool) -> None:
    """A checkpoint of SAELens' trainer becomes what SAELens would make of it for inference, input scaling folded."""
    fields: dict = {"d_in": D, "d_sae": F, "normalize_activations": norm}
    if architecture.endswith("topk"):
        fields |= {"k": K, "rescale_acts_by_decoder_norm": rescaled}
    if architecture == "matryoshka_batchtopk":
        fields |= {"matryoshka_widths": [F // 4, F // 2, F], "k": K + 0.25}
    config_class = sae_lens.registry.get_sae_training_class(architecture)[1]
    training = shaken(sae_lens.TrainingSAE.from_dict(
        config_class(**fields, metadata=SAEMetadata(**METADATA)).to_dict()
    ))  # fmt: skip
    training.save_model(tmp_path / "training")
    scaler = ActivationScaler(scaling_factor=1.7 if norm == "expected_average_only_in" else None)
    if norm == "covariance_whitening":
        scaler.estimate_whitening(D, iter([inputs(200) @ torch.randn(D, D)]), 1)
        training.fold_activation_whitening(*vars(scaler.whitening).values())
    scaler.save(str(tmp_path / "training" / "activation_scaler.json"))
    if scaler.scaling_factor:
        training.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("training", "inference"):
        ours = load_pretrained(tmp_path / folder)
        assert ours.cfg.sae_type == OURS.get(architecture, architecture)
        assert_same_as_sae_lens(ours, theirs, inputs())
        if architecture == "matryoshka_batchtopk":
            assert (ours.cfg.prefixes, ours.cfg.target_l0) == ((0.25, 0.5, 1.0), K)


@pytest.mark.parametrize("d_out", [D, D + 5])
@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_sae_lens_transcoders(tmp_path: Path, architecture: str, d_out: int) -> None:
    target = {"hook_name_out": "blocks.3.hook_mlp_out"}
    read = METADATA | {"hook_name": "blocks.3.ln2.hook_normalized"}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "d_out": d_out, "apply_b_dec_to_input": False}
    theirs = shaken(sae_lens.registry.get_sae_class(architecture)[0].from_dict(cfg | {"metadata": read | target}))
    theirs.save_model(tmp_path)
    ours, x = load_pretrained(tmp_path), inputs()
    assert ours.cfg.sae_type == ("jumprelu" if "jumprelu" in architecture else "vanilla")
    assert (ours.cfg.layer, ours.cfg.site, ours.cfg.target_site) == (3, "ln2.hook_normalized", "mlp_out")
    same(ours.encode(x), theirs.encode(x))
    same(ours(x).sae_out, theirs(x))

    theirs.cfg.metadata.hook_name_out = None
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match="does not say hook_name_out"):
        load_pretrained(tmp_path)


def test_sae_lens_refused_by_name(tmp_path: Path) -> None:
    sae_lens_sae("matching_pursuit").save_model(tmp_path)
    with pytest.raises(ValueError, match="architecture = 'matching_pursuit'"):
        load_pretrained(tmp_path)
    sae_lens_sae("standard", normalize_activations="constant_norm_rescale").save_model(tmp_path)
    with pytest.raises(ValueError, match="normalize_activations = 'constant_norm_rescale': not opened here"):
        load_pretrained(tmp_path)


# ---- suites, as SAELens reads them from the Hub ----


@pytest.mark.parametrize("repo, folder, loader", [
    ("google/gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_76", "gemma_2_transcoder"),
    ("google/gemma-scope-2-4b-it", "resid_post_all/layer_7_width_16k_l0_small", "gemma_3"),
    ("google/gemma-scope-2-270m-pt", "attn_out/layer_7_width_16k_l0_small", "gemma_3"),
    ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_7_width_16k_l0_big", "gemma_3"),
    ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_7_width_16k_l0_big_affine", "gemma_3"),
    ("fnlp/Llama3_1-8B-Base-LXM-8x", "Llama3_1-8B-Base-L7M-8x", "llama_scope"),
    ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_6", "layer7.sae.pt", "qwen_scope"),
])  # fmt: skip
def test_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, folder: str, loader: str) -> None:
    """Files written here in each suite's form compute the same in SAELens, which knows their hooks by other names."""
    params = {
        "W_enc": torch.randn(D, F) / 5, "b_enc": torch.randn(F) / 4, "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D) / 4, "threshold": torch.rand(F) - 0.2,
    }  # fmt: skip
    params["W_dec"] /= params["W_dec"].norm(dim=1, keepdim=True)
    module, said = "model.layers.7.", {"architecture": "jump_relu"}
    files: dict[str, bytes] = {}
    if loader == "gemma_2_transcoder":
        np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in params.items()})
        files[f"{folder}/params.npz"] = (tmp_path / "params.npz").read_bytes()
    elif loader == "gemma_3":
        hooks = {"resid": ("output", None), "attn_": ("self_attn.o_proj.input", None)}.get(
            folder[:5], ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
        )
        said |= {"hf_hook_point_in": module + hooks[0], "hf_hook_point_out": module + (hooks[1] or hooks[0])}
        said |= {"model_name": repo.split("/")[1].replace("scope-2", "v3"), "affine_connection": "affine" in folder}
        said["type"] = "transcoder" if hooks[1] else "sae"
        skip = {"affine_skip_connection": torch.randn(D, D)} if "affine" in folder else {}
        small = {"w_enc": params.pop("W_enc"), "w_dec": params.pop("W_dec")}
        files[f"{folder}/config.json"] = json.dumps(said).encode()
        files[f"{folder}/params.safetensors"] = save(params | small | skip)
        shapes = {name: list(tensor.shape) for name, tensor in small.items()}
        monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda repo, file: shapes)
    elif loader == "llama_scope":
        said = {
            "act_fn": "jumprelu", "jump_relu_threshold": 0.8, "d_model": D, "d_sae": F,
            "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 3.5, "out": 3.5},
            "sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False,
            "hook_point_in": "blocks.7.hook_mlp_out", "hook_point_out": "blocks.7.hook_mlp_out",
        }  # fmt: skip
        layers = {"encoder.weight": params["W_enc"].t(), "decoder.weight": params["W_dec"].t()}
        layers |= {"encoder.bias": params["b_enc"], "decoder.bias": params["b_dec"]}
        files[f"{folder}/hyperparams.json"] = json.dumps(said).encode()
        files[f"{folder}/lm_config.json"] = b'{"model_name": "meta-llama/Llama-3.1-8B"}'
        files[f"{folder}/checkpoints/final.safetensors"] = save({n: t.contiguous() for n, t in layers.items()})
    else:
        del params["threshold"]
        torch.save(params | {name: params[name].t() for name in ("W_enc", "W_dec")}, tmp_path / folder)
        files[folder] = (tmp_path / folder).read_bytes()
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        hub.repos[repo] = files
        load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
        cfg, weights, _ = load(repo, folder, "cpu", False, {"dtype": "float32"})
        ours = load_pretrained(f"{repo}:{folder}")
    cfg = loaders.handle_config_defaulting(cfg | {"d_in": D, "d_sae": F} | ({"d_out": D} if "d_out" in cfg else {}))
    theirs = sae_lens.SAE.from_dict(cfg)
    theirs.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()})
    unit = 1.0
    if loader == "llama_scope":
        unit = D**0.5 / 3.5  # by which SAELens multiplies latents, and the decoder's rows divide
        theirs.fold_activation_norm_scaling_factor(unit)
    x = inputs()
    acts = theirs.encode(x)
    assert 0 < (acts > 0).sum() < acts.numel()
    same(ours.encode(x) * unit, acts)
    same(ours(x).sae_out, theirs(x))
    read = {"gemma_3": {"hook_mlp_in": "ln2.hook_out"}}.get(loader, {})  # where SAELens reads before the norm
    hook = theirs.cfg.metadata.hook_name.removeprefix("blocks.7.")
    assert ours.cfg.hook_name == f"blocks.7.{read.get(hook, hook)}"
    assert ours.cfg.writes[0] == (theirs.cfg.metadata.hook_name_out or ours.cfg.hook_name)
    assert ours.cfg.model_name.removeprefix("google/") == theirs.cfg.metadata.model_name.removeprefix("google/")


@pytest.mark.parametrize("folder", ["layer_20/width_16k/average_l0_71", "embedding/width_4k/average_l0_6"])
def test_gemma_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    D = 2304  # of Gemma 2 2B; SAELens checks the width by the folder's name
    params = {
        "W_enc": torch.randn(D, 64) / 48, "b_enc": torch.randn(64) / 4, "W_dec": torch.randn(64, D) / 48,
        "b_dec": torch.randn(D) / 4, "threshold": torch.rand(64) - 0.2,
    }  # fmt: skip
    if folder.startswith("embedding"):
        params["b_dec"].zero_()  # it alone stays in the unit of the embeddings in SAELens
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in params.items()})
    repo = "google/gemma-scope-2b-pt-res"
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        hub.repos[repo] = {f"{folder}/params.npz": (tmp_path / "params.npz").read_bytes()}
        cfg, weights, _ = loaders.gemma_2_sae_huggingface_loader(repo, folder, "cpu", False, {"d_sae": 64})
        ours = load_pretrained(f"{repo}:{folder}")
    theirs = sae_lens.SAE.from_dict(cfg | {"normalize_activations": "none"})
    theirs.load_state_dict(weights)
    assert (ours.cfg.model_name, ours.cfg.hook_name) == ("google/gemma-2-2b", cfg["hook_name"])
    assert_same_as_sae_lens(ours, theirs, torch.randn(30, D))


# ---- dictionary_learning ----


@pytest.mark.parametrize("negative_thresholds", [False, True])
@pytest.mark.parametrize(
    "sae_type, theirs",
    [
        ("vanilla", lambda: AutoEncoder(D, F)),
        ("topk", lambda: AutoEncoderTopK(D, F, K)),
        ("batchtopk", lambda: BatchTopKSAE(D, F, K)),
        ("batchtopk", lambda: MatryoshkaBatchTopKSAE(D, F, K, [F // 4, 3 * F // 4])),
        ("jumprelu", lambda: JumpReluAutoEncoder(D, F)),
        ("jumprelu", lambda: GatedAutoEncoder(D, F)),
    ],
)
def test_dictionary_learning(tmp_path: Path, sae_type: str, theirs: object, negative_thresholds: bool) -> None:
    dictionary = shaken(theirs(), negative_thresholds)
    if negative_thresholds and sae_type == "batchtopk":
        dictionary.threshold.fill_(-1.0)  # as it is until training has set it
    torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
    trainer = {
        "dict_class": type(dictionary).__name__, "activation_dim": D, "dict_size": F, "k": K, "layer": 4,
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_4",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    reference, _ = load_dictionary(str(tmp_path), "cpu")
    ours = load_pretrained(tmp_path)
    assert ours.cfg.sae_type == sae_type
    assert (ours.cfg.model_name, ours.cfg.hook_name) == ("EleutherAI/pythia-70m-deduped", "blocks.4.hook_resid_post")
    x = inputs()
    acts = reference.encode(x)
    same(ours.encode(x), acts)
    same(ours.decode(acts), reference.decode(acts))
    same(ours(x).sae_out, reference(x))
    same(ours(x.view(5, 10, D)).sae_out.flatten(0, 1), reference(x))


# ---- sparsify ----


@pytest.mark.parametrize("hookpoint, site", [("layers.5", "resid_post"), ("h.5.mlp", "mlp.hook_out")])
@pytest.mark.parametrize("sizes", [{"num_latents": F}, {"expansion_factor": F // D}])
def test_sparsify(tmp_path: Path, sizes: dict[str, int], hookpoint: str, site: str) -> None:
    theirs = shaken(SparseCoder(D, SparseCoderConfig(k=K, **sizes)))
    theirs.save_to_disk(tmp_path / hookpoint)
    (tmp_path / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))
    reference = SparseCoder.load_from_disk(tmp_path / hookpoint)
    ours = load_pretrained(tmp_path / hookpoint)
    assert (ours.cfg.model_name, ours.cfg.layer, ours.cfg.site) == ("HuggingFaceTB/SmolLM2-135M", 5, site)
    x = inputs()
    values, indices, _ = reference.encode(x)
    acts = torch.zeros(len(x), F).scatter_(1, indices, values)
    same(ours.encode(x), acts)
    same(ours.decode(acts), reference.decode(values, indices))
    same(ours(x).sae_out, reference(x).sae_out)


@pytest.mark.parametrize("option", ["transcode", "skip_connection", "multi_topk"])
def test_sparsify_refused_by_name(tmp_path: Path, option: str) -> None:
    SparseCoder(D, SparseCoderConfig(k=K, num_latents=F, **{option: True})).save_to_disk(tmp_path / "layers.5")
    with pytest.raises(ValueError, match=f"{option} = True"):
        load_pretrained(tmp_path / "layers.5", model_name="gpt2")


def test_sparsify_groupmax(tmp_path: Path) -> None:
    SparseCoder(D, SparseCoderConfig(k=K, num_latents=F, activation="groupmax")).save_to_disk(tmp_path / "layers.5")
    with pytest.raises(ValueError, match="activation = 'groupmax'"):
        load_pretrained(tmp_path / "layers.5", model_name="gpt2")
