"""Open our checkpoints in SAELens and circuit-tracer, put them into SAELens' models, and run its evaluations."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from dictionary_learning.evaluation import evaluate as dictionary_learning_evaluate
from hub_server import standing_in
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, get_recons_loss, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import GPT2Config

from analysis.splice import splice
from checkpoint import save_checkpoint
from config import Config
from evaluation import HeldOut, evaluate
from interop.circuit_tracer import save_transcoder_set
from interop.hub import push_to_hub
from interop.pretrained import load_pretrained
from language_model import load_model, ordinary_positions, record, replacing
from sae import SAE_TYPES, BaseAutoencoder

WIDTH = 16  # of tiny_gpt2


def make(sae_type: str, norm: bool, **fields: object) -> BaseAutoencoder:
    """Make an SAE with every parameter away from where it starts."""
    fields = {
        "layer": 1,
        "site": "resid_pre",
        "act_size": WIDTH,
        "dict_size": 64,
        "target_l0": 8,
        "device": "cpu",
    } | fields
    sae = SAE_TYPES[sae_type](Config(sae_type=sae_type, input_unit_norm=norm, **fields))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(sae, name).add_(0.2 * torch.randn_like(getattr(sae, name)))
        sae.constrain()
        if sae.cfg.type.sae_lens == "jumprelu":
            sae.threshold.copy_(torch.rand_like(sae.threshold) + 0.3)
    return sae.eval()


def assert_same(sae: BaseAutoencoder, theirs: SAE, x: torch.Tensor) -> None:
    acts, our_acts = theirs.encode(x), sae.encode(x)
    torch.testing.assert_close(our_acts, acts, rtol=1e-5, atol=1e-6)
    assert 0 < (acts > 0).sum() < acts.numel()
    assert torch.equal(our_acts > 0, acts > 0)
    torch.testing.assert_close(sae(x).sae_out, theirs(x), rtol=1e-5, atol=1e-5)
    if not sae.cfg.input_unit_norm:
        # The same arithmetic, but that SAELens divides a TopK's latents by norms of 1.
        exact = 1e-6 if sae.sae_type == "topk" else 0
        torch.testing.assert_close(sae.decode(our_acts), theirs.decode(our_acts), rtol=exact, atol=10 * exact)
        return
    theirs.encode(x)  # which keeps every token's mean and scale for the next decode
    z, std, mean = sae.normalise(x.reshape(-1, x.shape[-1]))
    decoded = (sae.decode(our_acts).view_as(z) * std + mean).view_as(x)
    torch.testing.assert_close(decoded, theirs.decode(our_acts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, WIDTH), (5, 8, WIDTH)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_load_from_disk(tmp_path: Path, sae_type: str, norm: bool, shape: tuple[int, ...]) -> None:
    sae = make(sae_type, norm)
    save_checkpoint(sae, tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.architecture() == sae.cfg.type.sae_lens
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
    assert theirs.cfg.metadata.exclude_special_tokens is True
    x = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(2)) + 0.5
    assert_same(sae, theirs, x)
    theirs.save_model(tmp_path / "again")
    back = load_pretrained(tmp_path / "again")
    assert (back.cfg.sae_type, back.cfg.prefixes, back.cfg.target_l0) == (sae_type, sae.cfg.prefixes, 8)
    assert_same(back, theirs, x)
    theirs.fold_W_dec_norm()  # which SAELens refuses where it might change a TopK's choice
    theirs.save_model(tmp_path / "folded")
    back = load_pretrained(tmp_path / "folded")
    assert (back.cfg.sae_type, back.cfg.prefixes, back.cfg.target_l0) == (sae_type, sae.cfg.prefixes, 8)
    torch.testing.assert_close(sae.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-6)


def test_a_topk_whose_rows_have_other_norms_says_so(tmp_path: Path) -> None:
    sae = make("topk", False)
    sae.W_dec.data *= torch.linspace(0.5, 2, 64)[:, None]
    save_checkpoint(sae, tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    assert not theirs.cfg.rescale_acts_by_decoder_norm
    assert_same(sae, theirs, 3 * torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("sae_type", [t for t in SAE_TYPES if t != "topk"])
def test_transcoders_open_there_and_come_back(tmp_path: Path, sae_type: str, skip: bool) -> None:
    """With outputs equal to 1e-5; what SAELens saves is opened here with the same."""
    sae = make(sae_type, False, site="mlp_in", target_site="mlp_out", target_size=WIDTH + 4, skip=skip)
    if skip:
        torch.nn.init.normal_(sae.W_skip, std=0.3)
    save_checkpoint(sae, tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    kind = "jumprelu_" * (sae.cfg.type.sae_lens == "jumprelu")
    assert theirs.cfg.architecture() == f"{kind}{'skip_' * skip}transcoder"
    assert theirs.cfg.metadata.hook_name == "blocks.1.ln2.hook_out"
    x = 3 * torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2)) + 0.5
    theirs.save_model(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs", model_name="tiny")
    for ours in (sae, back):
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours(x).sae_out, theirs(x), rtol=1e-5, atol=1e-5)
    assert (back.cfg.site, back.cfg.target_site, back.cfg.skip) == ("mlp_in", "mlp_out", skip)
    assert back.cfg.sae_type == sae_type


def test_all_heads_concatenated(tmp_path: Path) -> None:
    sae = make("topk", False, site="z")
    save_checkpoint(sae, tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    x = torch.randn(6, 2, WIDTH // 2)
    torch.testing.assert_close(sae(x.flatten(1)).sae_out, theirs(x).flatten(1), rtol=1e-5, atol=1e-6)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make("batchtopk", True)
    with standing_in(monkeypatch, tmp_path / "cache"):
        push_to_hub(sae, "someone/saes")
        theirs = SAE.from_pretrained("someone/saes", sae.cfg.name)
    assert_same(sae, theirs, torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3)))


# ---- in a model ----


def fitted(
    tiny_gpt2: Path, windows: torch.Tensor, folder: Path, sae_type: str, norm: bool
) -> tuple[BaseAutoencoder, SAE, object]:
    """Return an SAE about the mean of the model's activations, what SAELens makes of its checkpoint, and the model."""
    sae = make(sae_type, norm, model_name=str(tiny_gpt2))
    model = load_model(sae.cfg)
    sae.initialise_from(record(model, windows, sae.cfg.reads)[sae.cfg.hook_name])
    save_checkpoint(sae, folder)
    return sae, SAE.load_from_disk(folder), model


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_spliced(
    tiny_gpt2: Path, windows: torch.Tensor, hooked: HookedSAETransformer, tmp_path: Path, sae_type: str, norm: bool
) -> None:
    """SAELens replaces every position, or those that our metadata says; CE in its two kinds of model is ours."""
    sae, theirs, model = fitted(tiny_gpt2, windows, tmp_path / "sae", sae_type, norm)
    bridge = SAETransformerBridge.boot_transformers(str(tiny_gpt2), device="cpu")
    with torch.no_grad():
        clean = cross_entropy(model(windows, return_type="logits"), windows)
        with replacing(model, {sae.cfg.hook_name: lambda acts: sae(acts).sae_out}):
            ce = cross_entropy(model(windows, return_type="logits"), windows)
        assert abs(ce - clean) > 1e-2
        for their_model in (hooked, bridge):
            logits = their_model.run_with_saes(windows, saes=[theirs], return_type="logits")
            torch.testing.assert_close(cross_entropy(logits, windows), ce, rtol=1e-5, atol=0)
        with splice(model, sae):
            ordinary = cross_entropy(model(windows, return_type="logits"), windows)
        excluded = theirs.cfg.metadata.exclude_special_tokens
        logits = hooked.run_with_saes(windows, saes=[theirs], exclude_special_tokens=excluded, return_type="logits")
        assert abs(ordinary - ce) > 1e-4
        torch.testing.assert_close(cross_entropy(logits, windows), ordinary, rtol=1e-5, atol=0)


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def store(theirs: SAE, model: HookedSAETransformer, tiny_text: Path) -> ActivationsStore:
    texts = Dataset.from_dict({"text": tiny_text.read_text().split("\n")})
    return ActivationsStore.from_sae(model, theirs, dataset=texts, context_size=32, streaming=False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_evaluations(
    tiny_gpt2: Path, windows: torch.Tensor, hooked: HookedSAETransformer, tiny_text: Path, tmp_path: Path,
    sae_type: str, norm: bool,
) -> None:  # fmt: skip
    """SAELens' own evaluation runs, all of it, and its CE at the positions that ours replaces is ours."""
    sae, theirs, model = fitted(tiny_gpt2, windows, tmp_path / "sae", sae_type, norm)
    scalars, features = run_evals(
        theirs, store(theirs, hooked, tiny_text), hooked, ActivationScaler(),
        get_eval_everything_config(batch_size_prompts=4, n_eval_reconstruction_batches=2),
    )  # fmt: skip
    assert 0 < scalars["sparsity"]["l0"] < 64 and len(features["feature_density"]) == 64
    assert scalars["model_performance_preservation"]["ce_loss_with_sae"] > 0

    (ours,) = evaluate(HeldOut(model, windows), [sae])
    losses = get_recons_loss(theirs, hooked, ActivationScaler(), windows, True, True, ignore_tokens=[0])
    counted = ordinary_positions(windows, model.tokenizer)[:, :-1]
    for our_name, name in {"ce": "ce_loss_with_sae", "ce_clean": "ce_loss_without_sae"}.items():
        assert losses[name][counted].mean().item() == pytest.approx(ours[our_name], rel=1e-5)
    assert losses["kl_div_with_sae"][:, :-1][counted].mean().item() == pytest.approx(ours["kl"], rel=1e-4)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("sae_type", [t for t in SAE_TYPES if t != "topk"])
def test_circuit_tracer_reads_a_transcoder_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae_type: str, skip: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ENABLE_HF_TRANSFER", False, raising=False)  # of hub 0.x
    from circuit_tracer.utils.caching import load_transcoders_from_cache

    hooks = dict(site="mlp_in", target_site="mlp_out", target_size=WIDTH, skip=skip, model_name="tiny")
    saes = [make(sae_type, False, layer=layer, seed=layer, **hooks) for layer in (1, 0)]
    if skip:
        for sae in saes:
            torch.nn.init.normal_(sae.W_skip, std=0.3)
    save_transcoder_set(saes, tmp_path / "user" / "repo")
    theirs, config = load_transcoders_from_cache("user/repo", cache_dir=tmp_path)
    assert (config["model_name"], theirs.feature_input_hook) == ("tiny", "mlp.hook_in")
    assert (theirs.feature_output_hook, theirs.skip_connection) == ("hook_mlp_out", skip)
    x = 3 * torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2)) + 0.5
    for sae in saes:
        theirs_here = theirs[sae.cfg.layer]
        torch.testing.assert_close(sae.encode(x), theirs_here.encode(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae(x).sae_out, theirs_here(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ([], "layers []: give one transcoder for each layer, from 0 on"),
        ([{}, {}], "layers [0, 0]: give one transcoder for each layer"),
        ([{}, {"layer": 2}], "layers [0, 2]: give one transcoder for each layer"),
        ([{}, {"layer": 1, "dict_size": 32}], "dict_size = 32 and 64; give one for all layers"),
        ([{"target_site": None, "target_size": None}], "reads mlp_in and writes mlp_in; give transcoders from mlp_in"),
        ([{"sae_type": "topk"}], "circuit-tracer's files hold no topk; give another type"),
    ],
)
def test_what_circuit_tracer_cannot_read_is_refused(tmp_path: Path, changes: list[dict], expected: str) -> None:
    common = dict(sae_type="batchtopk", layer=0, site="mlp_in", target_site="mlp_out", target_size=WIDTH)
    with pytest.raises(ValueError, match=re.escape(expected)):
        save_transcoder_set([make(norm=False, **common | change) for change in changes], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_circuit_tracers_folder_replaces_nothing_else(tmp_path: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "m")
    hooks = dict(layer=0, site="mlp_in", target_site="mlp_out", target_size=WIDTH)
    sae = make("batchtopk", False, model_name=str(tmp_path / "m"), **hooks)
    for _ in range(2):
        save_transcoder_set([sae], tmp_path / "set")
    assert "model_name: m\n" in (tmp_path / "set" / "config.yaml").read_text()
    GPT2Config(n_layer=4).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"^layers \[0\]: .*/m has 4 blocks; give one for each$"):
        save_transcoder_set([sae], tmp_path / "other")
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "m")
    (tmp_path / "set" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not replaced, as it holds thesis.tex; give a new folder"):
        save_transcoder_set([sae], tmp_path / "set")
    assert (tmp_path / "set" / "thesis.tex").exists()


@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_dictionary_learning_evaluates_ours(sae_type: str) -> None:
    """It calls dictionary(x, output_features=True), so ours take a line around them; the sizes they tell themselves."""
    sae = make(sae_type, False)
    x = 3 * torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(2)) + 0.5

    class Theirs:
        dict_size, activation_dim = sae.dict_size, sae.d_in

        def __call__(self, x: torch.Tensor, output_features: bool) -> tuple[torch.Tensor, torch.Tensor]:
            return sae(x).sae_out, sae.encode(x)

    found = dictionary_learning_evaluate(Theirs(), iter([x]))
    out = sae(x).sae_out
    expected = 1 - (x - out).var(dim=0).sum() / x.var(dim=0).sum()
    assert found["frac_variance_explained"] == pytest.approx(float(expected), abs=1e-5)
    assert found["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(dim=1).float().mean()))
