"""Write an SAE for Neuronpedia, and compare with what SAEDashboard writes of its checkpoint on the same text."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from test_ours_there import make

from analysis.dashboard import BINS, WINDOW_CHOICE
from checkpoint import save_checkpoint
from interop.neuronpedia import INTERVALS, save_neuronpedia
from language_model import load_model, record
from sae import SAE_TYPES
from text import held_out_windows

WINDOWS = 30


def saedashboard(theirs: SAE, hooked: HookedSAETransformer, tokens: torch.Tensor, folder: Path) -> dict:
    """Return the batch that SAEDashboard's runner writes; it loads models by the names of known ones only."""
    model = copy.deepcopy(hooked)
    W_U = model.ln_final.w[:, None] * model.W_U  # as it loads one: the final norm in the unembedding, which is centred
    W_U = W_U - W_U.mean(dim=0)
    model.unembed.W_U.data = W_U - W_U.mean(dim=1, keepdim=True)
    sequences = SequencesConfig(stack_mode="stack-all", buffer=None, compute_buffer=True, n_quantiles=INTERVALS)
    column = Column(
        sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3)
    )
    vis = SaeVisConfig(
        hook_point=theirs.cfg.metadata.hook_name, features=list(range(theirs.cfg.d_sae)), minibatch_size_features=64,
        minibatch_size_tokens=8, device="cpu", dtype="float32", verbose=False,
        feature_centric_layout=SaeVisLayoutConfig(columns=[column]), ignore_tokens={model.tokenizer.bos_token_id},
    )  # fmt: skip
    data = SaeVisRunner(vis).run(encoder=theirs, model=model, tokens=tokens)
    cfg = NeuronpediaRunnerConfig("set", "", str(folder), model_id="tiny", layer=1, n_prompts_total=len(tokens))
    vocabulary = NeuronpediaRunner.get_vocab_dict(SimpleNamespace(model=model))
    return json.loads(NeuronpediaConverter.convert_to_np_json(model, data, cfg, vocabulary))


@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_as_saedashboard_writes_it(
    tiny_gpt2: Path, tiny_text: Path, hooked: HookedSAETransformer, tmp_path: Path, sae_type: str
) -> None:
    sae = make(sae_type, False, model_name=str(tiny_gpt2), dataset_path=str(tiny_text), seq_len=24)
    model = load_model(sae.cfg)
    tokens = held_out_windows(sae.cfg, model.tokenizer, WINDOWS, WINDOW_CHOICE)
    sae.initialise_from(record(model, tokens, sae.cfg.reads)[sae.cfg.hook_name])
    save_checkpoint(sae, tmp_path / "sae")
    theirs = saedashboard(SAE.load_from_disk(tmp_path / "sae"), hooked, tokens, tmp_path)

    save_neuronpedia(sae, tmp_path / "neuronpedia", model=model, windows=WINDOWS)
    (file,) = (tmp_path / "neuronpedia").iterdir()
    ours = json.loads(file.read_text())
    assert NeuronpediaDashboardBatch(**ours).to_dict() == ours
    assert file.name == "batch-0.json" and ours.keys() == theirs.keys() and ours["layer"] == 1
    assert [feature["feature_index"] for feature in ours["features"]] == list(range(64))

    one = 1.5 / tokens.numel()  # position, at which a threshold lies
    size = sae.W_dec.std(dim=1, correction=0) / sae.W_dec.pow(2).mean(dim=1).sqrt()  # as the final norm sees it
    for mine, their, scale in zip(ours["features"], theirs["features"], size.tolist(), strict=True):
        assert mine.keys() == their.keys()
        assert mine["neuron_alignment_indices"] == their["neuron_alignment_indices"]
        for name in ("neuron_alignment_values", "neuron_alignment_l1"):
            assert mine[name] == pytest.approx(their[name], abs=1e-3)
        for sign in ("pos", "neg"):
            assert [scale * v for v in mine[f"{sign}_values"]] == pytest.approx(their[f"{sign}_values"], abs=1e-3)
            both = zip(mine[f"{sign}_str"], their[f"{sign}_str"], strict=True)
            assert [a for a, b in both if a != b and b.isascii()] == []  # they show bytes by their stand-ins
        assert mine["frac_nonzero"] == pytest.approx(their["frac_nonzero"], abs=one)
        heights, values = (mine[f"freq_hist_data_bar_{name}"] for name in ("heights", "values"))
        assert sum(heights) == pytest.approx(mine["frac_nonzero"] * tokens.numel())
        if mine["activations"]:
            largest = compare(mine["activations"], their["activations"], one)
            assert heights[-1] > 0 and values[-1] == pytest.approx((BINS - 0.5) / BINS * largest)
    assert sum(bool(feature["activations"]) for feature in ours["features"]) > 30


def compare(ours: list[dict], theirs: list[dict], one: float) -> float:
    """The largest activation is the same, and so are those in contexts shown by both, and intervals' shares.

    Returns the largest.
    """
    largest, their_largest = ours[0]["bin_max"], theirs[0]["bin_max"]
    assert largest == pytest.approx(their_largest, abs=1e-3)
    assert ours[0]["bin_min"] == ours[0]["bin_contains"] == theirs[0]["bin_min"] == theirs[0]["bin_contains"]
    assert ours[0]["values"][ours[0]["qualifying_token_index"]] == pytest.approx(largest, abs=1e-3)
    activations = {(*context["tokens"],): context["values"] for context in theirs}
    shares = {round(context["bin_min"] / their_largest * INTERVALS): context["bin_contains"] for context in theirs[20:]}
    shared = 0
    for context in ours:
        values, strings = context["values"], (*context["tokens"],)
        peak = values[context["qualifying_token_index"]]
        assert 0 < peak == pytest.approx(sorted([context["bin_min"], peak, context["bin_max"]])[1], abs=1e-3)
        if strings in activations:
            assert values == pytest.approx(activations[strings], abs=2e-3)
            shared += 1
        if context["bin_min"] >= 0:
            share = shares[round(context["bin_min"] / largest * INTERVALS)]
            assert context["bin_contains"] == pytest.approx(share, abs=2 * one)
    assert shared
    return largest


def test_files_of_128_latents_in_a_new_folder(tiny_gpt2: Path, tiny_text: Path, tmp_path: Path) -> None:
    """A dead latent has no contexts, and one outside the residual stream no effect on logits."""
    fields = dict(model_name=str(tiny_gpt2), dataset_path=str(tiny_text), seq_len=24)
    sae = make("vanilla", False, site="z", dict_size=130, **fields)
    with torch.no_grad():
        sae.b_enc[129] = -1e4
    save_neuronpedia(sae, tmp_path / "out", windows=4)
    files = sorted((tmp_path / "out").iterdir())
    assert [len(json.loads(file.read_text())["features"]) for file in files] == [128, 2]
    alive, dead = json.loads(files[1].read_text())["features"]
    assert alive["activations"] and alive["pos_str"] == alive["neg_values"] == []
    assert dead["activations"] == dead["freq_hist_data_bar_heights"] == [] and dead["frac_nonzero"] == 0
    with pytest.raises(OSError, match="out: is there already; give a new folder"):
        save_neuronpedia(sae, tmp_path / "out", windows=4)
    for windows in (0, -1):
        with pytest.raises(ValueError, match=f"^windows = {windows}: give 1 or more$"):
            save_neuronpedia(sae, tmp_path / "none", windows=windows)
    with pytest.raises(ValueError, match="reads 2 layers; Neuronpedia shows dictionaries of one"):
        save_neuronpedia(make("vanilla", False, layer=(0, 1), **fields), tmp_path / "other", windows=4)
