"""Run SAEBench's evaluations on every type, with texts in place of the data sets that it fetches.

For all but the core one, the model's embeddings of some words point in directions of their own, and the SAE has a
latent for each of them, so that its scores are known: the best there are. SCR, TPP and unlearning decode twice what
they encode once, which SAELens refuses where each token is normalised: their SAEs have input_unit_norm=False.
"""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.unlearning.utils.feature_activation import calculate_sparsity, get_top_features
from sae_bench.evals.unlearning.utils.metrics import modify_model
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE, HookedSAETransformer
from test_ours_there import fitted, make, store
from transformer_lens.hook_points import HookPoint

from checkpoint import save_checkpoint
from sae import SAE_TYPES, BaseAutoencoder

COLOURS, ANIMALS = ["red", "blue"], ["cat", "dog", "hen", "fox", "owl"]
WORDS = [*COLOURS, *ANIMALS]
OWL = WORDS.index("owl")
BIOS = "LabHC/bias_in_bios_class_set1"
PROFESSIONS = {label: [f"{colour} {animal}" for colour in COLOURS] for label, animal in zip("01269", ANIMALS)}
SPURIOUS = {  # colours for genders, animals for professions
    "male / female": ["red cat", "red dog"],
    "female_data_only": ["blue cat", "blue dog"],
    "professor / nurse": ["red cat", "blue cat"],
    "nurse_data_only": ["red dog", "blue dog"],
    "male_professor / female_nurse": ["red cat"],
    "female_nurse_data_only": ["blue dog"],
}
Known = Callable[[str], tuple[BaseAutoencoder, SAE]]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_core(
    tiny_gpt2: Path, windows: torch.Tensor, hooked: HookedSAETransformer, tiny_text: Path, tmp_path: Path,
    sae_type: str, norm: bool,
) -> None:  # fmt: skip
    _, theirs, _ = fitted(tiny_gpt2, windows, tmp_path / "sae", sae_type, norm)
    _, theirs, _ = general_utils.load_and_format_sae("ours", theirs, "cpu")
    cfg = CoreEvalConfig(
        model_name="tiny", batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True, exclude_special_tokens_from_reconstruction=True, context_size=32,
    )  # fmt: skip
    texts = store(theirs, hooked, tiny_text)
    scalars, features = core.run_evals(theirs, texts, hooked, cfg, ignore_tokens={0})
    scalars["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {"eval_cfg": cfg, "metrics": scalars, "feature_metrics": features, "sae_id": "ours", "sae_set": "ours"}
    path = core.save_single_eval_result(result, "1", "6", "none", str(tmp_path / "result.json"), theirs)
    metrics = json.loads(Path(path).read_text())["eval_result_metrics"]
    assert 0 < metrics["sparsity"]["l0"] < 64
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0


def texts(classes: dict[str, list[str]], seed: int) -> dict[str, list[str]]:
    """Write 100 texts for each class, about its subjects in turn."""
    rng = random.Random(seed)
    places = ["barn", "garden", "kitchen", "forest", "river", "attic"]
    return {
        label: [
            f"The {subjects[i % len(subjects)]} in the {rng.choice(places)} at {rng.randint(1, 12)}."
            for i in range(100)
        ]
        for label, subjects in classes.items()
    }


@pytest.fixture
def known(hooked: HookedSAETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Known:
    """Makes SAEs with a latent for each of WORDS, whose embeddings become orthogonal to all others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = torch.nn.init.orthogonal_(torch.empty(len(WORDS), hooked.cfg.d_model))
    others = torch.eye(hooked.cfg.d_model) - rows.t() @ rows
    embeddings = hooked.W_E.detach() @ others
    sizes = torch.tensor([9.0 if word in COLOURS else 3.0 for word in WORDS])
    embeddings[[hooked.to_single_token(f" {word}") for word in WORDS]] = sizes[:, None] * rows
    monkeypatch.setattr(hooked.embed.W_E, "data", embeddings)
    monkeypatch.setattr(hooked.pos_embed.W_pos, "data", hooked.W_pos.detach() @ others)
    for evaluation in (scr_and_tpp, sparse_probing):
        monkeypatch.setattr(evaluation.HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: hooked)

    def make_one(sae_type: str) -> tuple[BaseAutoencoder, SAE]:
        sae = make(sae_type, False, layer=0)
        with torch.no_grad():
            sae.W_dec[: len(WORDS)], sae.W_enc[:, : len(WORDS)] = rows, rows.t()
            sae.b_enc[: len(WORDS)], sae.b_enc[len(WORDS) :] = -0.01, -1
            sae.b_dec.zero_()
        save_checkpoint(sae, tmp_path / "sae")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # which SAEBench gives where decoder rows are not of norm 1
            return sae, general_utils.load_and_format_sae("ours", SAE.load_from_disk(tmp_path / "sae"), "cpu")[1]

    return make_one


@pytest.mark.parametrize("sae_type", SAE_TYPES)
@pytest.mark.parametrize("perform_scr", [True, False], ids=["scr", "tpp"])
def test_scr_and_tpp(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae_type: str, perform_scr: bool
) -> None:
    """Without the colours' latents a probe of both tells animals; without an animal's, a probe of it tells nothing."""
    data = tuple(texts(SPURIOUS if perform_scr else PROFESSIONS, seed) for seed in (0, 1))
    monkeypatch.setattr(scr_and_tpp.dataset_creation, "get_train_test_data", lambda *_: data)
    cfg = ScrAndTppEvalConfig(
        dataset_names=[BIOS], perform_scr=perform_scr, column1_vals_lookup={BIOS: [("professor", "nurse")]},
        context_length=24, n_values=[2], probe_lr=3e-2, llm_batch_size=100, llm_dtype="float32", model_name="tiny",
    )  # fmt: skip
    with torch.enable_grad():  # which it turns off and leaves off
        (result,) = scr_and_tpp.run_eval(
            cfg, [("ours", known(sae_type)[1])], "cpu", str(tmp_path), artifacts_path=str(tmp_path)
        ).values()
    (scores,) = result["eval_result_metrics"].values()
    if perform_scr:
        assert scores["scr_dir1_threshold_2"] == scores["scr_metric_threshold_2"] > 0.95  # of 1
    else:
        assert scores["tpp_threshold_2_intended_diff_only"] > 0.45  # from all right to half
        assert scores["tpp_threshold_2_unintended_diff_only"] < 0.15


@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_sparse_probing(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae_type: str) -> None:
    """One latent tells an animal, as no one neuron does."""
    data = tuple(texts(PROFESSIONS, seed) for seed in (0, 1))
    monkeypatch.setattr(sparse_probing.dataset_utils, "get_multi_label_train_test_data", lambda *_: data)
    checked = probe_training.train_sklearn_probe  # whose shapes, checked with its caller's, are never right
    monkeypatch.setattr(probe_training, "train_sklearn_probe", checked.__wrapped__)
    cfg = SparseProbingEvalConfig(
        dataset_names=[BIOS], context_length=24, k_values=[1], llm_batch_size=100, llm_dtype="float32",
        model_name="tiny",
    )  # fmt: skip
    with torch.enable_grad():
        (result,) = sparse_probing.run_eval(
            cfg, [("ours", known(sae_type)[1])], "cpu", str(tmp_path), artifacts_path=str(tmp_path)
        ).values()
    metrics = result["eval_result_metrics"]
    assert metrics["sae"]["sae_top_1_test_accuracy"] == 1 > metrics["llm"]["llm_top_1_test_accuracy"]


@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_unlearning(hooked: HookedSAETransformer, known: Known, sae_type: str) -> None:
    """It finds the latent of what is to be forgotten and clamps it: logits there, and there only, are as computed here.

    Its score asks questions of WMDP and MMLU, which are fetched, and of Gemma 2 alone.
    """
    sae, theirs = known(sae_type)
    told = texts({"forget": ["red owl"], "retain": [f"red {animal}" for animal in ANIMALS if animal != "owl"]}, seed=0)
    forget, retain = (hooked.to_tokens(some) for some in told.values())
    top = get_top_features(*calculate_sparsity(hooked, theirs, forget, retain, batch_size=50))
    assert OWL in top

    def clamp(acts: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        values = sae.encode(acts)[..., OWL : OWL + 1]
        values[:, 0] = 0
        assert (values > 0).any()
        return acts - torch.where(values > 0, values + 25, 0) * sae.W_dec[OWL]

    with torch.no_grad():
        expected = hooked.run_with_hooks(forget, fwd_hooks=[(sae.cfg.hook_name, clamp)])
        clean = [hooked(tokens) for tokens in (forget, retain)]
        params = {"intervention_method": "clamp_feature_activation", "features_to_ablate": [OWL], "multiplier": 25}
        modify_model(hooked, theirs, **params)
        forgotten, retained = (hooked(tokens) for tokens in (forget, retain))
        hooked.reset_hooks()
    torch.testing.assert_close(forgotten, expected, rtol=1e-4, atol=1e-4)
    assert (forgotten - clean[0]).abs().max() > 1
    torch.testing.assert_close(retained, clean[1], rtol=1e-4, atol=1e-4)
