"""Write the formats of other libraries as they do, compare with their formulas, and see what is refused.

tests/interop compares with the libraries themselves.
"""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM

from analysis.splice import splice
from checkpoint import load_checkpoint, save_checkpoint
from config import TYPES, Config
from evaluation import HeldOut, evaluate
from interop.pretrained import load_pretrained, new_sae
from language_model import check_hooks, load_model, record
from sae import BaseAutoencoder, build_sae
from training import Trainer

D, F, K = 12, 40, 5
Tensors = dict[str, Tensor]
METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_out", "sae_lens_version": "6.0.0"}
SAE_LENS = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "metadata": METADATA}
SAE_LENS |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
TRAINER = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": K, "layer": 2, "lm_name": "gpt2"}
JUMPRELU = {"dict_class": "JumpReluAutoEncoder"}
LLAMA = {
    "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "d_model": D, "d_sae": F, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "sparsity_include_decoder_norm": True,
    "apply_decoder_bias_to_pre_encoder": False, "hook_point_in": "blocks.4.hook_mlp_out",
    "hook_point_out": "blocks.4.hook_mlp_out",
}  # fmt: skip
GEMMA_3 = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.9.output"}
SPARSIFY = {"activation": "topk", "expansion_factor": 32, "num_latents": F, "k": K, "d_in": D, "transcode": False}


@pytest.fixture
def params() -> Tensors:
    torch.manual_seed(0)
    return {
        "W_enc": torch.randn(D, F) / 3, "b_enc": torch.randn(F) / 4, "W_dec": torch.randn(F, D) / 3,
        "b_dec": torch.randn(D) / 2, "threshold": torch.rand(F) - 0.3,
    }  # fmt: skip


def write_sae_lens(folder: Path, params: Tensors, **changes: object) -> None:
    (folder / "cfg.json").write_text(json.dumps(SAE_LENS | changes))
    save_file(params, folder / "sae_weights.safetensors")


def write_npz(folder: Path, params: Tensors) -> None:
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in params.items()})


def write_ae(folder: Path, params: Tensors, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({"trainer": TRAINER | changes}))
    torch.save(params if changes.get("dict_class") == "JumpReluAutoEncoder" else ae_tensors(params), folder / "ae.pt")


def ae_tensors(params: Tensors) -> dict[str, object]:
    tensors = {"encoder.weight": params["W_enc"].t(), "decoder.weight": params["W_dec"].t()}
    tensors |= {"encoder.bias": params["b_enc"], "b_dec": params["b_dec"], "threshold": torch.tensor(-1.0)}
    return tensors | {"k": torch.tensor(K, dtype=torch.int32)}


def write_sparsify(folder: Path, params: Tensors, **changes: object) -> None:
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY | changes))
    tensors = {"encoder.weight": params["W_enc"].t(), "encoder.bias": params["b_enc"]}
    tensors |= {name: params[name] for name in ("W_dec", "b_dec")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")


def write_gemma_3(folder: Path, params: Tensors, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(GEMMA_3 | changes))
    small = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file({small.get(name, name): tensor for name, tensor in params.items()}, folder / "params.safetensors")


def write_llama(folder: Path, params: Tensors, **changes: object) -> None:
    (folder / "hyperparams.json").write_text(json.dumps(LLAMA | changes))
    (folder / "lm_config.json").write_text('{"model_name": "meta-llama/Llama-3.1-8B"}')
    (folder / "checkpoints").mkdir()
    tensors = {"encoder.weight": params["W_enc"].t(), "decoder.weight": params["W_dec"].t()}
    tensors |= {"encoder.bias": params["b_enc"], "decoder.bias": params["b_dec"]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "checkpoints/final.safetensors")


def write_qwen(folder: Path, params: Tensors) -> Path:
    weights = {"W_enc": params["W_enc"].t(), "W_dec": params["W_dec"].t()}
    torch.save(weights | {name: params[name] for name in ("b_enc", "b_dec")}, folder / "layer7.sae.pt")
    return folder / "layer7.sae.pt"


WRITERS = [write_sae_lens, write_npz, write_ae, write_sparsify, write_gemma_3, write_llama]


def jumps(x: Tensor, p: Tensors) -> Tensor:
    """Compute JumpReLU as all libraries do: b_dec is not taken from x, a ReLU stands beside the threshold."""
    pre = x.double() @ p["W_enc"].double() + p["b_enc"].double()
    return pre.relu() * (pre > p["threshold"].double())


def largest(x: Tensor, p: Tensors) -> Tensor:
    pre = ((x - p["b_dec"]).double() @ p["W_enc"].double() + p["b_enc"].double()).relu()
    return pre * (pre >= pre.sort(dim=-1, descending=True).values[..., K - 1 : K])


def largest_as_it_is(x: Tensor, p: Tensors) -> Tensor:
    return largest(x + p["b_dec"], p)


def gated(x: Tensor, p: Tensors) -> Tensor:
    """Compute what Rajamanoharan et al. 2024 (arXiv:2404.16014) do."""
    through = (x - p["b_dec"]).double() @ p["W_enc"].double()
    return (through * p["r_mag"].double().exp() + p["b_mag"]).relu() * (through + p["b_gate"] > 0)


def assert_computes(sae: torch.nn.Module, rule: Callable[[Tensor, Tensors], Tensor], params: Tensors) -> None:
    x = 2 * torch.randn(6, 5, D)
    acts = rule(x, params)
    assert 0 < (acts > 0).sum() < acts.numel()
    decoded = acts @ params["W_dec"].double() + params["b_dec"].double()
    for ours, theirs in ((sae.encode(x), acts), (sae.decode(acts.float()), decoded), (sae(x).sae_out, decoded)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not sae.training
    started = copy.deepcopy(sae)
    started.initialise_from(x)
    for name, parameter in sae.named_parameters():  # training does not start b_dec and the thresholds anew
        assert torch.equal(started.get_parameter(name), parameter)
    assert sae.input_scale < 0 < started.input_scale  # but it measures the inputs, and so JumpReLU's window
    if sae.sae_type == "batchtopk":
        latents = started.train()(x).latents
        smallest = latents.values[latents.values > 0].amin()
        started.after_step(latents)
        torch.testing.assert_close(started.threshold, sae.threshold.lerp(smallest, 0.1), rtol=1e-3, atol=0)


GEMMA = "beside transcoders/gemma-scope"
OF_HEADS = {"hf_hook_point_in": "model.layers.9.self_attn.o_proj.input", "model_name": "google/gemma-3-4b-it"}
QWEN = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"


@pytest.mark.parametrize(
    "write, changes, folder, model_name, hook_name, rule",
    [
        (write_sae_lens, {}, "sae", "gpt2", "blocks.3.hook_mlp_out", jumps),
        (write_npz, {}, f"{GEMMA}-2b-pt-res/layer_20/l0_71", "google/gemma-2-2b", "blocks.20.hook_resid_post", jumps),
        (write_npz, {}, f"{GEMMA}-9b-it-mlp/layer_9/l0_1", "google/gemma-2-9b-it", "blocks.9.hook_mlp_out", jumps),
        (write_npz, {}, f"{GEMMA}-2b-pt-att/layer_3/l0_5", "google/gemma-2-2b", "blocks.3.attn.hook_z", jumps),
        (write_ae, {}, "sae", "gpt2", "blocks.2.hook_resid_post", largest),
        (write_ae, {"submodule_name": "mlp_out_layer_2"} | JUMPRELU, "sae", "gpt2", "blocks.2.mlp.hook_out", jumps),
        (write_sparsify, {}, "gpt_neox.layers.7.attention", "someone/model", "blocks.7.attn.hook_out", largest),
        (write_gemma_3, {}, "sae", "google/gemma-3-270m", "blocks.9.hook_resid_post", jumps),
        (write_gemma_3, OF_HEADS, "sae", "google/gemma-3-4b-it", "blocks.9.attn.hook_z", jumps),
        (write_qwen, {}, QWEN, "Qwen/Qwen3-1.7B-Base", "blocks.7.hook_resid_post", largest_as_it_is),
    ],
)
def test_opened(
    tmp_path: Path, params: Tensors, write: Callable[..., None], changes: dict, folder: str, model_name: str,
    hook_name: str, rule: Callable[[Tensor, Tensors], Tensor],
) -> None:  # fmt: skip
    path = tmp_path / folder
    path.mkdir(parents=True)
    source = write(path, params, **changes) or path
    (path.parent / "config.json").write_text('{"model": "someone/model"}')  # where sparsify says it
    sae = load_pretrained(source)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == (model_name, hook_name)
    assert (sae.cfg.act_size, sae.cfg.dict_size, sae.cfg.input_unit_norm) == (D, F, False)
    assert_computes(sae, rule, params)


@pytest.mark.parametrize("t", [5.0, 0.3], ids=["sae", "transcoder"])
def test_llama_scope(tmp_path: Path, params: Tensors, t: float) -> None:
    """As lm-saes did: norms of inputs and outputs go into the weights, then those of the decoder, then it compares."""
    written = "blocks.4.hook_mlp_out" if t == 5 else "blocks.4.hook_resid_post"
    norms = {"in": 5.0, "out": t}
    write_llama(tmp_path, params, dataset_average_activation_norm=norms, hook_point_out=written)
    W_dec = params["W_dec"] * t / 5
    n = W_dec.norm(dim=1)
    b_enc, b_dec = params["b_enc"] * 5 / D**0.5, params["b_dec"] * t / D**0.5
    scaled = {"W_enc": params["W_enc"] * n, "b_enc": b_enc * n, "W_dec": W_dec / n[:, None], "b_dec": b_dec}
    sae = load_pretrained(tmp_path)
    assert (sae.cfg.sae_type, sae.cfg.model_name) == ("jumprelu", "meta-llama/Llama-3.1-8B")
    assert (sae.cfg.reads, sae.cfg.writes) == (("blocks.4.hook_mlp_out",), (written,))
    x = 2 * torch.randn(30, D)
    acts = jumps(x, scaled | {"threshold": torch.full((F,), 0.4)})
    assert 0 < (acts > 0).sum() < acts.numel()
    assert_close(sae.encode(x).double(), acts, rtol=1e-5, atol=1e-5)
    assert_close(sae(x).sae_out.double(), acts @ scaled["W_dec"].double() + b_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("read, named", [
    ("blocks.9.ln2.hook_normalized", "blocks.9.ln2.hook_normalized"),
    ("model.layers.9.pre_feedforward_layernorm.output", "blocks.9.ln2.hook_out"),
], ids=["Gemma Scope", "2"])  # fmt: skip
def test_transcoders_of_gemma_scope(tmp_path: Path, params: Tensors, read: str, named: str, skip: bool) -> None:
    """The first reads what the RMSNorm gives without its gain, the second what enters the MLP."""
    if named == read:
        if skip:
            return
        (folder := tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_9" / "l0_76").mkdir(parents=True)
        write_npz(folder, params)
    else:
        folder, written = tmp_path, "model.layers.9.post_feedforward_layernorm.output"
        more = {"affine_skip_connection": torch.randn(D, D)} if skip else {}
        write_gemma_3(folder, params | more, hf_hook_point_in=read, hf_hook_point_out=written, type="transcoder")
        params |= more
    sae, x = load_pretrained(folder), 2 * torch.randn(30, D)
    assert (sae.cfg.reads, sae.cfg.writes, sae.cfg.skip) == ((named,), ("blocks.9.hook_mlp_out",), skip)
    acts = jumps(x, params)
    decoded = acts @ params["W_dec"].double() + params["b_dec"]
    decoded += x.double() @ params["affine_skip_connection"].double() if skip else 0
    assert_close(sae.encode(x).double(), acts, rtol=1e-5, atol=1e-5)
    assert_close(sae(x).sae_out.double(), decoded, rtol=1e-5, atol=1e-5)


def test_gated_is_a_jumprelu(tmp_path: Path, params: Tensors) -> None:
    """With gates that open below the magnitude's 0, and above."""
    del params["threshold"]
    params |= {"b_mag": params.pop("b_enc"), "b_gate": torch.randn(F) / 4, "r_mag": torch.randn(F) / 2}
    write_sae_lens(tmp_path, params, architecture="gated", apply_b_dec_to_input=True)
    sae = load_pretrained(tmp_path)
    assert sae.cfg.sae_type == "jumprelu" and 0 < (sae.threshold == 0).sum() < F
    assert_computes(sae, gated, params)
    save_file(params | {"r_mag": torch.full((F,), 99.0)}, tmp_path / "sae_weights.safetensors")
    assert_refused(tmp_path, "W_enc is empty or has numbers that are not finite")


def test_whitened_inputs(tmp_path: Path, params: Tensors) -> None:
    """(x - m) M is encoded, and what is decoded mapped back."""
    matrix, mean = torch.randn(D, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse().contiguous()}
    write_sae_lens(tmp_path, params, normalize_activations="covariance_whitening")
    assert_refused(tmp_path, "activation_whitening.safetensors: not readable")
    save_file(whitening, tmp_path / "activation_whitening.safetensors")
    sae = load_pretrained(tmp_path)
    back = {"W_dec": params["W_dec"].double() @ matrix.inverse(), "b_dec": params["b_dec"] @ matrix.inverse().float()}
    back["b_dec"] = back["b_dec"] + mean
    assert_computes(sae, lambda x, _: jumps((x - mean) @ matrix, params), params | back)


@pytest.mark.parametrize("sae_type", list(TYPES))
@pytest.mark.parametrize("resaved", [False, True], ids=["uploaded", "saved again"])
def test_ours_without_counters(tmp_path: Path, sae_type: str, resaved: bool) -> None:
    """As SAELens uploads a folder of ours, or writes it from its own fields: type, k and prefixes are not lost."""
    fields = dict(act_size=D, dict_size=F, target_l0=K, model_name="gpt2", layer=3, prefixes=(0.25, 0.5, 1.0))
    sae = build_sae(Config(sae_type=sae_type, device="cpu", **fields)).eval()
    if sae.cfg.type.sae_lens == "jumprelu":
        sae.threshold.data.fill_(0.4)
    save_checkpoint(sae, tmp_path)
    (tmp_path / "counters.safetensors").unlink()
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    if resaved:
        del cfg["nn_decompositions"], cfg["sha256"]
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    again, x = load_pretrained(tmp_path), torch.randn(30, D)
    assert again.cfg.sae_type == sae_type and torch.equal(again.encode(x), sae.encode(x))
    assert (again.cfg.hook_name, again.cfg.model_name) == (sae.cfg.hook_name, "gpt2")
    if sae_type == "matryoshka":
        assert again.cfg.prefixes == (0.25, 0.5, 1.0)
    assert again.cfg.target_l0 == K
    assert not again.tokens_since_fired.any() and again.input_scale < 0  # which training measures
    if sae_type == "batchtopk":
        without_k = cfg["metadata"] | {"training_architecture_details": None}  # as files of ours once were
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"metadata": without_k}))
        assert load_pretrained(tmp_path).cfg.sae_type == "jumprelu"
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        tensors = load_file(tmp_path / "sae_weights.safetensors")
        # once norms are folded, each latent has a threshold of its own, which differs in the last bit where they were 1
        for norms, opened in ((1 + 1e-6 * torch.rand(F), "batchtopk"), (torch.rand(F), "jumprelu")):
            thresholds = {"threshold": tensors["threshold"] * norms}
            save_file(tensors | thresholds, tmp_path / "sae_weights.safetensors")
            assert load_pretrained(tmp_path).cfg.sae_type == opened


HOOKS = ["hook_embed", "blocks.3.hook_mlp_in", "blocks.3.ln2.hook_normalized", "blocks.3.mlp.hook_post"]


@pytest.fixture(scope="module")
def tiny_lm() -> HeldOut:
    tokens = torch.randint(1, 4096, (4, 20), generator=torch.Generator().manual_seed(0))
    return HeldOut(load_model(Config(device="cpu")), tokens)


@pytest.mark.parametrize("hook", HOOKS)
def test_on_any_hook_of_the_model(tmp_path: Path, tiny_lm: HeldOut, hook: str) -> None:
    """An SAE that reconstructs everything changes nothing there, one that reconstructs 0 is an ablation."""
    width = 1024 if hook.endswith("post") else 256
    eye = torch.eye(width)
    params = {"W_enc": torch.cat([eye, -eye], dim=1), "b_enc": torch.zeros(2 * width), "b_dec": torch.zeros(width)}
    metadata = METADATA | {"hook_name": hook, "model_name": "tiny-lm"}
    for scale in (1, 0):
        tensors = params | {"W_dec": scale * params["W_enc"].t().contiguous()}
        write_sae_lens(tmp_path, tensors, architecture="standard", d_in=width, d_sae=2 * width, metadata=metadata)
        sae = load_pretrained(tmp_path)
        assert check_hooks(tiny_lm.model, sae.cfg) == sae.cfg
        (found,) = evaluate(tiny_lm, [sae])
        with splice(tiny_lm.model, sae) as latents:
            tiny_lm.model(torch.arange(9)[None])
        assert latents[sae.cfg.hook_name].shape == (1, 9, 2 * width)
        assert found["ce"] == pytest.approx(found["ce_clean" if scale else "ce_zero"], abs=1e-5)
    assert abs(found["ce"] - found["ce_clean"]) > 0.01


@pytest.mark.filterwarnings("ignore:.*from before SAELens 6")
def test_sae_lens_before_version_6(tmp_path: Path, params: Tensors) -> None:
    """One flat cfg.json, with TopK as an activation function, and a scaling factor of ones."""
    cfg = {
        "model_name": "gpt2-small", "hook_point": "blocks.3.attn.hook_z", "hook_point_head_index": None, "d_in": D,
        "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
        "context_size": 128, "dataset_path": "Skylion007/openwebtext",
    }  # fmt: skip
    del params["threshold"]
    save_file(params | {"scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.warns(UserWarning, match="from before SAELens 6 .*raw weights"):
        sae = load_pretrained(tmp_path)
    assert (sae.cfg.sae_type, sae.cfg.target_l0, sae.cfg.site) == ("topk", K, "z")
    assert sae.cfg.model_name == "gpt2"  # which TransformerLens calls gpt2-small
    assert_computes(sae, largest, params)
    save_file(params | {"scaling_factor": torch.full((F,), 1.1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="scaling_factor is not 1"):
        load_pretrained(tmp_path)


def test_sae_lens_scaled_inputs(tmp_path: Path, params: Tensors) -> None:
    """s x is encoded, and what is decoded divided by s."""
    write_sae_lens(tmp_path, params, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match=r"expected_average_only_in', and activation_scaler.json holds no"):
        load_pretrained(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 1.5}')
    sae = load_pretrained(tmp_path)
    scaled = params | {name: params[name] / 1.5 for name in ("W_dec", "b_dec")}
    assert_computes(sae, lambda x, _: jumps(1.5 * x, params), scaled)


def test_embeddings_of_gemma_scope(tmp_path: Path, params: Tensors) -> None:
    """It is of x / sqrt(D), where x is what enters the first block."""
    (folder := tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6").mkdir(parents=True)
    write_npz(folder, params)
    sae = load_pretrained(folder)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("google/gemma-2-2b", "hook_embed")
    scaled = params | {name: params[name] * D**0.5 for name in ("W_dec", "b_dec")}
    assert_computes(sae, lambda x, _: jumps(x / D**0.5, params), scaled)


@pytest.mark.parametrize("module", ["mlp", "self_attn"])
def test_the_output_of_a_module_is_before_a_norm_that_follows(
    tmp_path: Path, params: Tensors, word_tokenizer: Callable, module: str
) -> None:
    """As sparsify's hook on the module gets it, in a model with such norms."""
    sizes = dict(vocab_size=200, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    made = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8)).eval()
    made.save_pretrained(tmp_path)
    word_tokenizer(bos_token="<bos>", eos_token="<eos>").save_pretrained(tmp_path)
    (folder := tmp_path / f"layers.1.{module}").mkdir()
    write_sparsify(folder, params)
    sae, tokens, seen = load_pretrained(folder, model_name=str(tmp_path)), torch.arange(4, 24).view(2, 10), []
    made.model.layers[1].get_submodule(module).register_forward_hook(lambda *call: seen.append(call[2]))
    made(tokens)
    expected = seen[0] if module == "mlp" else seen[0][0]
    assert_close(record(load_model(sae.cfg), tokens, sae.cfg.reads)[sae.cfg.hook_name], expected.detach())


def test_processed_models_are_warned_of(tmp_path: Path, params: Tensors) -> None:
    metadata = METADATA | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    write_sae_lens(tmp_path, params, metadata=metadata)
    with pytest.warns(UserWarning, match="center_writing_weights.*raw weights"):
        load_pretrained(tmp_path)


def test_what_the_files_do_not_say_is_asked_for_and_saved(tmp_path: Path, params: Tensors) -> None:
    write_npz(tmp_path, params)
    with pytest.raises(ValueError, match=r"does not say its model_name; give load_pretrained\(..., model_name="):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say its hook_name"):
        load_pretrained(tmp_path, model_name="google/gemma-2-2b")
    sae = load_pretrained(tmp_path, model_name="google/gemma-2-2b", hook_name="blocks.7.hook_resid_mid")
    assert (sae.cfg.layer, sae.cfg.site) == (7, "resid_mid")

    save_checkpoint(sae, tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert again.cfg == sae.cfg == load_checkpoint(tmp_path / "ours").cfg
    x = torch.randn(7, D)
    assert torch.equal(again(x).sae_out, sae(x).sae_out)
    moved = load_pretrained(tmp_path / "ours", model_name="/models/tiny-lm")
    assert moved.cfg == replace(sae.cfg, model_name="/models/tiny-lm")
    assert load_pretrained(tmp_path / "ours", hook_name="blocks.1.attn.hook_z").cfg.site == "z"


# ---- refused ----


def assert_refused(folder: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 + len(str(folder)) * 2


@pytest.mark.parametrize(
    "write, changes, says",
    [
        (write_sae_lens, {"architecture": "temporal"}, "architecture = 'temporal': not opened here; can be 'standard'"),
        (write_sae_lens, {"architecture": "gated"}, "a gated SAE has"),
        (write_sae_lens, {"architecture": ["jumprelu"]}, "architecture = "),
        (write_sae_lens, {"activation_fn": "tanh-relu"}, "activation_fn = 'tanh-relu'"),
        (write_sae_lens, {"activation_fn": "topk", "activation_fn_kwargs": 3}, "a topk SAE has"),
        (write_sae_lens, {"normalize_activations": "constant_norm_rescale"}, "normalize_activations = 'constant_norm"),
        (write_sae_lens, {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input = 'no'"),
        (write_sae_lens, {"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm = 1"),
        (write_sae_lens, {"rescale_acts_by_decoder_norm": True}, "norm = True: .*can be False"),  # a jumprelu's
        (write_sae_lens, {"hook_head_index": 3}, "hook_head_index = 3"),
        (write_sae_lens, {"hook_point_head_index": 3}, "hook_head_index = 3"),  # before version 6
        (write_sae_lens, {"d_sae": F + 1}, r"W_enc is \[12, 40\] of torch.float32, should be \[12, 41\]"),
        (write_sae_lens, {"metadata": METADATA | {"hook_name": "hook_logits"}}, "no hook of a block; give one such as"),
        (write_sae_lens, {"metadata": METADATA | {"hook_name": 3}}, "does not say its hook_name"),
        (write_sae_lens, {"metadata": METADATA | {"context_size": "x"}}, "seq_len = 'x': give int"),
        (write_sae_lens, {"metadata": 3}, "does not say its model_name"),
        (write_ae, {"dict_class": "CrossCoder"}, "dict_class = 'CrossCoder': .*can be 'AutoEncoder'"),
        (write_gemma_3, {"architecture": "relu"}, "architecture = 'relu'"),
        (write_gemma_3, {"type": "crosscoder"}, "type = 'crosscoder'"),
        (write_gemma_3, {"type": "transcoder"}, "does not say hook_name_out"),
        (write_gemma_3, {"affine_connection": True}, "holds .*; a jumprelu SAE has .*W_skip"),
        (write_gemma_3, {"affine_connection": "yes"}, "affine_connection = 'yes'"),
        (write_gemma_3, {"hf_hook_point_in": ["a", "b"]}, "does not say its hook_name"),
        (write_gemma_3, {"hf_hook_point_out": "model.layers.9.x"}, "does not say hook_name_out"),
        (write_llama, {"act_fn": "topk"}, "act_fn = 'topk'"),
        (write_llama, {"norm_activation": "token-wise"}, "norm_activation = 'token-wise'"),
        (write_llama, {"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder = True"),
        (write_llama, {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "in = 0: should be a number above 0"),
        (write_llama, {"jump_relu_threshold": "x"}, "jump_relu_threshold = 'x': should be a number above 0"),
        (write_llama, {"hook_point_out": "blocks.5.hook_mlp_out"}, "reads layer 4 and writes blocks.5.hook_mlp_out"),
        (write_ae, {"k": 2.5}, "target_l0 = 2.5: give int"),
        (write_ae, {"submodule_name": "attention_layer_2"}, "does not say its hook_name"),
        (write_ae, {"layer": "x"}, "hook_name = 'blocks.x.hook_resid_post': no hook of a block"),
        (write_sparsify, {"transcode": True}, "transcode = True"),
        (write_sparsify, {"skip_connection": True}, "skip_connection = True"),
        (write_sparsify, {"multi_topk": True}, "multi_topk = True"),
        (write_sparsify, {"signed": True}, "signed = True"),
        (write_sparsify, {"activation": "groupmax"}, "activation = 'groupmax'"),
        (write_sparsify, {"num_latents": 0, "expansion_factor": 3}, "should be"),
        (write_sparsify, {"num_latents": 0, "expansion_factor": "3"}, "should be"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*from before SAELens 6")
def test_what_cannot_be_folded_is_refused(
    tmp_path: Path, params: Tensors, write: Callable[..., None], changes: dict, says: str
) -> None:
    write(tmp_path, params, **changes)
    assert_refused(tmp_path, says)


def test_folders_without_an_sae(tmp_path: Path, params: Tensors) -> None:
    for unnamed in ("transcoders/layer_3", "embedding/width_4k"):
        (folder := tmp_path / unnamed).mkdir(parents=True)
        write_npz(folder, params)
        assert_refused(folder, "a transcoder, or of embeddings; name its folders as")
    assert_refused(tmp_path, "holds no SAE")
    (tmp_path / "cfg.json").write_text("{}")
    assert_refused(tmp_path, "holds no SAE")
    write_qwen(tmp_path, params)
    assert_refused(tmp_path, "holds a file for each layer; give one, as in user/repo:layer5.sae.pt")
    assert_refused(tmp_path / "layer7.sae.pt", "does not say model, k and layer; put it in a folder with its repos")


# ---- forged ----


class _Evil:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_nothing_is_unpickled(tmp_path: Path, params: Tensors) -> None:
    evil, trace = _Evil(tmp_path / "trace"), tmp_path / "trace"
    pickle.loads(pickle.dumps(evil))
    trace.unlink()  # it works
    write_ae(tmp_path, params)
    torch.save(ae_tensors(params) | {"k": evil}, tmp_path / "ae.pt")
    assert_refused(tmp_path, "ae.pt: not readable as tensors alone")
    (tmp_path / "ae.pt").unlink()
    objects = np.array([evil], dtype=object)
    np.savez(tmp_path / "params.npz", allow_pickle=True, **{"W_enc": objects})
    assert_refused(tmp_path, "params.npz: not readable as tensors alone")
    assert not trace.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])  # the last is not finite in float32
def test_not_finite(tmp_path: Path, params: Tensors, write: Callable[[Path, Tensors], None], bad: float) -> None:
    params["b_dec"] = torch.full((D,), bad, dtype=torch.float64)
    write(tmp_path, params)
    assert_refused(tmp_path, "b_dec is empty or has numbers that are not finite")


@pytest.mark.parametrize("write", [write_sae_lens, write_npz])
@pytest.mark.parametrize(
    "name, tensor, says",
    [
        ("b_enc", torch.zeros(F + 1), "b_enc is"),
        ("b_enc", torch.zeros(F, dtype=torch.int64), "b_enc is .* of torch.int64"),
        ("W_dec", torch.zeros(D, F), "W_dec is"),
        ("W_enc", torch.zeros(D, F, 1), "should be"),
        ("W_skip", torch.zeros(D, D), "holds .*W_skip"),
        ("threshold", None, "holds .*; a jumprelu SAE has"),
    ],
)
def test_tensors_of_another_kind(
    tmp_path: Path, params: Tensors, write: Callable[[Path, Tensors], None], name: str, tensor: Tensor | None, says: str
) -> None:
    params = {n: t for n, t in (params | {name: tensor}).items() if t is not None}
    write(tmp_path, params)
    assert_refused(tmp_path, says)


@pytest.mark.parametrize("write", WRITERS)
def test_damaged_files(tmp_path: Path, params: Tensors, write: Callable[[Path, Tensors], None]) -> None:
    write(tmp_path, params)
    (weights,) = [path for path in tmp_path.rglob("*.*") if path.suffix != ".json"]
    whole = weights.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):  # cut, or overwritten at the beginning or the end, where the structure is
        start = int(rng.integers(0, 200)) if rng.random() < 0.5 else len(whole) - int(rng.integers(1, 700))
        damaged = whole[:start] + rng.bytes(8) + whole[start + 8 :] if rng.random() < 0.5 else whole[:start]
        weights.write_bytes(damaged)
        try:
            load_pretrained(tmp_path, model_name="gpt2", hook_name="blocks.3.hook_mlp_out")
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("held", [3, torch.zeros(3), [torch.zeros(3)], {"k": 3}])
def test_what_torch_loads_but_is_no_state_dict(tmp_path: Path, params: Tensors, held: object) -> None:
    write_ae(tmp_path, params)
    torch.save(held, tmp_path / "ae.pt")
    assert_refused(tmp_path, "ae.pt: holds more than named tensors")


@pytest.mark.parametrize("cfg", ["[1]", "{", "[" * 100_000, '"x"'])
def test_configurations_that_are_none(tmp_path: Path, params: Tensors, cfg: str) -> None:
    for write, name in ((write_sae_lens, "cfg.json"), (write_ae, "config.json")):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, params)
        (folder / name).write_text(cfg)
        assert_refused(folder, f"{name}: (holds|not JSON)")


# ---- fine-tuning ----


def start_from(path: Path, sae_type: str = "jumprelu", **changes: object) -> BaseAutoencoder:
    fields = dict(
        act_size=D, dict_size=F, target_l0=K, init_from=str(path), device="cpu", batch_size=64, num_tokens=640
    )
    return new_sae(Config(sae_type=sae_type, **fields | changes))


@pytest.mark.parametrize("sae_type", list(TYPES))
def test_training_goes_on_from_weights_that_are_given(tmp_path: Path, params: Tensors, sae_type: str) -> None:
    """With fresh counters, in the scale of the new activations; nothing but the weights is taken."""
    write_sae_lens(tmp_path, params)  # jumprelu, whose thresholds some types have no use for
    other, sae = load_pretrained(tmp_path), start_from(tmp_path, sae_type)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if sae_type == "jumprelu" else [])):
        assert torch.equal(getattr(sae, name), getattr(other, name)), name
    assert sae.W_enc.t().is_contiguous() and not sae.tokens_since_fired.any() and sae.training
    x = 3 * torch.randn(64, D)
    assert_close(sae.eval().encode(x), other.encode(x)) if sae_type == "jumprelu" else None
    trainer = Trainer(sae)
    before = trainer.sae.b_dec.detach().clone()
    trainer.step(x, 0)
    assert (sae.b_dec - before).abs().max() < 1 and sae.input_scale == pytest.approx(x.std().item(), rel=0.01)


def test_a_threshold_for_all_becomes_one_for_each(tmp_path: Path) -> None:
    made = build_sae(Config(sae_type="batchtopk", act_size=D, dict_size=F, target_l0=K, device="cpu"))
    made.threshold.fill_(0.7)
    save_checkpoint(made, tmp_path / "made")
    assert torch.equal(start_from(tmp_path / "made").threshold, torch.full((F,), 0.7))
    assert start_from(tmp_path / "made", "batchtopk").threshold == pytest.approx(0.7)


@pytest.mark.parametrize("changes, says", [
    (dict(dict_size=F + 1), rf"W_dec is \[{F}, {D}\], should be \[{F + 1}, {D}\]; give dict_size = {F}, or another"),
    (dict(act_size=D + 1), rf"W_dec is \[{F}, {D}\], should be \[{F}, {D + 1}\]"),
    (dict(input_unit_norm=True), "a topk SAE, input_unit_norm False; give the same, or another"),
    (dict(target_site="mlp_out", target_size=D), "a topk SAE, input_unit_norm False; give the same, or another"),
    (dict(), "a topk SAE, has no threshold; give one of another type"),
], ids=str)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    made = build_sae(Config(sae_type="topk", act_size=D, dict_size=F, target_l0=K, device="cpu"))
    save_checkpoint(made, tmp_path / "made")
    with pytest.raises(ValueError, match=f"^init_from = .*: {says}") as error:
        start_from(tmp_path / "made", **changes)
    assert "\n" not in str(error.value)
