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
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from checkpoint import load_checkpoint, save_checkpoint
from config import TYPES, Config
from interop.pretrained import load_pretrained, new_sae
from sae import BaseAutoencoder, build_sae
from training import Trainer

D, F, K = 12, 40, 5
Tensors = dict[str, Tensor]
METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_out", "sae_lens_version": "6.0.0"}
SAE_LENS = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "metadata": METADATA}
SAE_LENS |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
TRAINER = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": K, "layer": 2, "lm_name": "gpt2"}
JUMPRELU = {"dict_class": "JumpReluAutoEncoder"}
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


WRITERS = [write_sae_lens, write_npz, write_ae, write_sparsify]


def jumps(x: Tensor, p: Tensors) -> Tensor:
    """Compute JumpReLU as all libraries do: b_dec is not taken from x, a ReLU stands beside the threshold."""
    pre = x.double() @ p["W_enc"].double() + p["b_enc"].double()
    return pre.relu() * (pre > p["threshold"].double())


def largest(x: Tensor, p: Tensors) -> Tensor:
    pre = ((x - p["b_dec"]).double() @ p["W_enc"].double() + p["b_enc"].double()).relu()
    return pre * (pre >= pre.sort(dim=-1, descending=True).values[..., K - 1 : K])


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


@pytest.mark.parametrize(
    "write, changes, folder, model_name, hook_name, rule",
    [
        (write_sae_lens, {}, "sae", "gpt2", "blocks.3.hook_mlp_out", jumps),
        (write_npz, {}, f"{GEMMA}-2b-pt-res/layer_20/l0_71", "google/gemma-2-2b", "blocks.20.hook_resid_post", jumps),
        (write_npz, {}, f"{GEMMA}-9b-it-mlp/layer_9/l0_1", "google/gemma-2-9b-it", "blocks.9.hook_mlp_out", jumps),
        (write_npz, {}, f"{GEMMA}-2b-pt-att/layer_3/l0_5", "google/gemma-2-2b", "blocks.3.attn.hook_z", jumps),
        (write_ae, {}, "sae", "gpt2", "blocks.2.hook_resid_post", largest),
        (write_ae, {"submodule_name": "mlp_out_layer_2"} | JUMPRELU, "sae", "gpt2", "blocks.2.hook_mlp_out", jumps),
        (write_sparsify, {}, "gpt_neox.layers.7.attention", "someone/model", "blocks.7.hook_attn_out", largest),
    ],
)
def test_opened(
    tmp_path: Path, params: Tensors, write: Callable[..., None], changes: dict, folder: str, model_name: str,
    hook_name: str, rule: Callable[[Tensor, Tensors], Tensor],
) -> None:  # fmt: skip
    path = tmp_path / folder
    path.mkdir(parents=True)
    write(path, params, **changes)
    (path.parent / "config.json").write_text('{"model": "someone/model"}')  # where sparsify says it
    sae = load_pretrained(path)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == (model_name, hook_name)
    assert (sae.cfg.act_size, sae.cfg.dict_size, sae.cfg.input_unit_norm) == (D, F, False)
    assert_computes(sae, rule, params)


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
        (write_sae_lens, {"architecture": "gated"}, "architecture = 'gated': not opened here; can be 'standard'"),
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
        (write_sae_lens, {"metadata": METADATA | {"hook_name": "hook_embed"}}, "no hook of a block; give one such as"),
        (write_sae_lens, {"metadata": METADATA | {"hook_name": 3}}, "does not say its hook_name"),
        (write_sae_lens, {"metadata": METADATA | {"context_size": "x"}}, "seq_len = 'x': give int"),
        (write_sae_lens, {"metadata": 3}, "does not say its model_name"),
        (write_ae, {"dict_class": "GatedAutoEncoder"}, "dict_class = 'GatedAutoEncoder': .*can be 'AutoEncoder'"),
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
    assert_refused(tmp_path, "holds no SAE")
    (tmp_path / "cfg.json").write_text("{}")
    assert_refused(tmp_path, "holds no SAE")
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3"
    folder.mkdir(parents=True)
    write_npz(folder, params)
    assert_refused(folder, "a transcoder")


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
    (weights,) = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
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
