"""Write what Neuronpedia shows of an SAE: batch-<n>.json, as SAEDashboard's runner writes them.

Neuronpedia's own script turns such a folder into what it imports (`neuronpedia_utils`,
convert-saedashboard-to-neuronpedia-export.py), where names of model and set are given. Texts and activations are
those of our dashboard. Tables of correlations and the histogram of logits stay empty.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import dashboard
from interop.hub import published
from language_model import Model, check_model, load_model
from runtime.checks import require
from runtime.disk import write_durably
from sae import BaseAutoencoder
from text import held_out_windows

LATENTS_PER_FILE = 128
INTERVALS = 5  # of a latent's activations, from 0 to its largest; they divide the dashboard's BINS
ALIGNED = 3  # activations that a decoder row writes to most


def save_neuronpedia(
    sae: BaseAutoencoder, folder: str | Path, *, model: Model | None = None, windows: int = 1024
) -> None:
    """Write batch-0.json, batch-1.json, ... with all latents of the SAE or transcoder into `folder`, a new one.

    model: the language model of sae.cfg, loaded when not given. windows: how many context windows of its held-out text
    to read. Shares are of all positions, BOS among them, as SAEDashboard's are. Logits are those that a latent at 1
    adds where the residual stream has root mean square 1.
    Raises: ValueError when windows is below 1, the SAE reads several layers, or the text cannot be read; OSError when
    the folder is there.
    """
    cfg = sae.cfg
    require(windows >= 1, f"windows = {windows}: give 1 or more")
    require(len(cfg.layers) == 1, f"{cfg.name}: reads {len(cfg.layers)} layers; Neuronpedia shows dictionaries of one")
    require(not Path(folder).exists(), f"{folder}: is there already; give a new folder", OSError)
    model = load_model(check_model(cfg)) if model is None else model
    tokens = held_out_windows(cfg, model.tokenizer, windows, dashboard.WINDOW_CHOICE)
    public = published(cfg)
    batch = {"model_id": public.model_name, "layer": cfg.layers[0], "sae_set": public.name, "sae_id_suffix": None}
    feature = _features(sae, model, tokens, public.dataset_path)

    def write(path: Path) -> None:
        path.mkdir()
        for number, latents in enumerate(torch.arange(cfg.dict_size).split(LATENTS_PER_FILE)):
            some = batch | {"features": [feature(j) for j in latents.tolist()]}
            (path / f"batch-{number}.json").write_text(json.dumps(some, allow_nan=False))

    write_durably(folder, write)


@torch.no_grad()
def _features(sae: BaseAutoencoder, model: Model, tokens: Tensor, dataset_path: str) -> Callable[[int], dict[str, Any]]:
    """Measure all latents; return a function that gives the fields of the latent with a given index."""
    cfg, F, found = sae.cfg, sae.cfg.dict_size, dashboard.latent_statistics(sae, model, tokens)
    peaks, shown, positions = found.peaks, found.shown, tokens.numel()
    nothing = torch.empty(F, 0, dtype=torch.int64), torch.empty(F, 0)
    in_residual = (cfg.target_site or cfg.site) in dashboard.RESIDUAL
    raised, lowered = dashboard.direct_effects(sae, model, dashboard.EFFECTS) if in_residual else (nothing, nothing)
    W_dec = sae.W_dec.detach().cpu()
    scale = W_dec.pow(2).mean(dim=1).sqrt()  # direct_effects are those of rows at scale 1
    sizes, aligned = W_dec.topk(ALIGNED)
    ids = torch.cat([tokens[np.unique(peaks["context"] // F)].flatten(), raised[0].flatten(), lowered[0].flatten()])
    ids = ids.unique().tolist()
    strings = dict(zip(ids, dashboard.token_strings(model.tokenizer, ids)))
    starts, ends = (np.searchsorted(shown["context"], peaks["context"], side) for side in ("left", "right"))
    contexts = np.split(np.arange(len(peaks)), np.searchsorted(peaks["context"] % F, np.arange(1, F)))  # by latent
    untold = (f"correlated_{of}_{column}" for of in ("neurons", "features") for column in ("indices", "l1", "pearson"))
    same = {
        **{name: [] for name in (*untold, "decoder_weights_dist", "vector")},
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], "n_prompts_total": len(tokens),
        "n_tokens_in_prompt": tokens.shape[1], "dataset": dataset_path,
    }  # fmt: skip

    def effects(sign: str, some: dashboard.Ranked, j: int) -> dict[str, Any]:
        return {
            f"{sign}_str": [strings[i] for i in some[0][j].tolist()],
            f"{sign}_values": (some[1][j] * scale[j]).tolist(),
        }

    def context(i: int, largest: float, shares: np.ndarray) -> dict[str, Any]:
        fires, window = shown[starts[i] : ends[i]], tokens[peaks["context"][i] // F].tolist()
        values = np.zeros(len(window))
        values[fires["position"]] = fires["value"]
        interval, width = min(int(peaks["value"][i] / largest * INTERVALS), INTERVALS - 1), largest / INTERVALS
        strongest = found.bands[i] < 0
        return {
            "bin_min": -1 if strongest else interval * width,
            "bin_max": largest if strongest else (interval + 1) * width,
            "bin_contains": -1 if strongest else float(shares[interval]),
            "tokens": [strings[i] for i in window[1:]],  # without BOS
            "values": values[1:].round(3).tolist(),
            "qualifying_token_index": int(peaks["position"][i]) - 1,
        }

    def feature(j: int) -> dict[str, Any]:
        largest, fires, histogram = float(found.maxima[j]), found.counts[j] / positions, found.histograms[j]
        shares = histogram.reshape(INTERVALS, -1).sum(axis=1) / positions
        shares[0] += 1 - fires
        bars = (np.arange(dashboard.BINS) + 0.5) * largest / dashboard.BINS
        return same | {
            "feature_index": j,
            "neuron_alignment_indices": aligned[j].tolist(),
            "neuron_alignment_values": sizes[j].tolist(),
            "neuron_alignment_l1": (sizes[j].abs() / W_dec[j].abs().sum()).tolist(),
            **effects("pos", raised, j),
            **effects("neg", lowered, j),
            "frac_nonzero": float(fires),
            "freq_hist_data_bar_values": bars.tolist() if fires else [],
            "freq_hist_data_bar_heights": histogram.tolist() if fires else [],
            "activations": [context(i, largest, shares) for i in contexts[j]],
        }

    return feature
