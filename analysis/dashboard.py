"""Write the latents of an SAE on one HTML page that needs no network: dashboard.html with the data put into it.

One pass over held-out text finds every latent's largest activation, its strongest contexts and a uniform sample of its
activations, and writes them all to a temporary file (16 bytes each). A second pass reads them back, for histograms up
to the largest and for the chosen contexts. Memory does not grow with the text.
"""

import json
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from analysis.latents import nearest_latents
from config import Config, setting
from evaluation import evaluation_mode
from interop.pretrained import load_pretrained
from language_model import Model, check_model, load_model, ordinary_positions, record, side_by_side
from runtime.checks import require
from runtime.cli import Parser
from runtime.disk import write_durably
from sae import BaseAutoencoder
from text import held_out_windows

TEMPLATE = Path(__file__).with_name("dashboard.html")
MARK = "<!-- data -->"  # in the template twice: for what the table needs, which can then be drawn, and for all the rest
RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
STRONGEST = 16  # contexts of a latent, each from another window
SAMPLED = 64  # activations of a latent, from which its weaker contexts are chosen
BANDS = 4  # quantiles, each with as many activations
PER_BAND = 4  # contexts
BINS = 40  # of a histogram
EFFECTS = 10  # tokens that a latent promotes, and as many that it suppresses
NEAREST = 10  # latents
TABLE_TOKENS = 6  # in a row of the table
LEVELS = 999  # steps in which an activation is written, as a share of the latent's largest
LATENTS_PER_PIECE = 256  # of the page's data: a piece is read when one of its latents is opened
DENSE_NUMBERS = 1 << 24  # at a time: 64 MB of float32, which malloc gives back at once
READ_BACK = 1 << 20  # activations at a time: 16 MB
WINDOW_CHOICE = 4  # held-out windows to choose each window from

ACTIVATION = np.dtype([("context", np.int64), ("position", np.int32), ("value", np.float32)])
"""An activation above 0, at a position of a context: a latent in a window, numbered window * dict_size + latent."""
Activations = np.ndarray  # of these
Ranked = tuple[Int[Tensor, "dict_size count"], Float[Tensor, "dict_size count"]]  # tokens and logits


@dataclass(frozen=True)
class LatentStatistics:
    """What was found on the text."""

    tokens: int  # at ordinary positions
    counts: Int[np.ndarray, "dict_size"]  # tokens on which a latent fires
    means: Float[np.ndarray, "dict_size"]  # of its activations above 0; 0 where there are none
    maxima: Float[np.ndarray, "dict_size"]
    histograms: Int[np.ndarray, "dict_size bins"]  # of its activations above 0, from 0 to the largest
    peaks: Activations  # for which contexts are shown, latent after latent
    bands: Int[np.ndarray, "peaks"]  # the quantile from which each was sampled, 0 the lowest; -1 for the strongest
    shown: Activations  # all those in the contexts, by context and position


def feature_dashboard(
    sae: BaseAutoencoder,
    path: str | Path = "dashboard.html",
    *,
    model: Model | None = None,
    windows: int = 1024,
    dataset_path: str | None = None,
    dataset_name: str | None = None,
    text_column: str | None = None,
) -> Path:
    """Write one HTML file with a table of the SAE's latents and, for each, its density, largest activation, histogram,
    strongest contexts, contexts of each quarter of its activations, direct effects and nearest decoder rows.

    sae: of any type, used as in evaluation. model: the language model of sae.cfg, loaded when not given.
    windows: how many context windows of held-out text to read. dataset_path, dataset_name, text_column: the text, as in
    Config; that of sae.cfg when not given. Returns the path. Raises ValueError or OSError when model or text cannot be
    read.
    """
    require(windows >= 1, f"windows = {windows}: give 1 or more")
    of_text = {"dataset_name": dataset_name, "text_column": text_column}
    for field, value in of_text.items():
        alone = value is not None and dataset_path is None
        require(not alone, f"{field} = {value!r}: needs its data set; give dataset_path as well")
    cfg = sae.cfg if dataset_path is None else replace(sae.cfg, dataset_path=dataset_path, **of_text)
    model = load_model(check_model(cfg)) if model is None else model
    tokens = held_out_windows(cfg, model.tokenizer, windows, WINDOW_CHOICE)
    write_durably(path, page(sae, model, cfg.dataset_path, tokens).encode())
    return Path(path)


def dashboard_parser() -> Parser:
    parser = Parser(prog="results.py dashboard", description="Write the page of the latents of one SAE.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of an SAE, or user/repo:folder of the Hub")
    parser.add_argument("--windows", type=int, default=1024, help="context windows of text to read (default: 1024)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: beside the folder, as .html)")
    parser.add_argument("--dataset-path", metavar="PATH", help="text, as for main.py (default: that of its Config)")
    parser.add_argument("--dataset-name", metavar="NAME", help="configuration of that data set, if it has several")
    parser.add_argument("--text-column", metavar="NAME", help="column of that data set, of text or of token ids")
    parser.add_argument("--model-name", metavar="NAME", help="the model, where the files are silent or wrong about it")
    parser.add_argument("--hook-name", metavar="HOOK", help="the hook, likewise, as in blocks.8.hook_resid_pre")
    return parser


def command(words: list[str]) -> None:
    """Write the page that `python results.py dashboard` is asked for."""
    args = dashboard_parser().parse_args(words)
    folder = Path(args.checkpoint)
    sae = load_pretrained(args.checkpoint, Config().torch_device, model_name=args.model_name, hook_name=args.hook_name)
    beside = folder.resolve().with_name(f"{folder.resolve().name}.html")
    path = args.output or (beside if folder.is_dir() else Path(f"{sae.cfg.name}.html"))
    of_text = {field: getattr(args, field) for field in ("dataset_path", "dataset_name", "text_column")}
    feature_dashboard(sae, path, windows=args.windows, **of_text)
    print(f"{sae.cfg.dict_size:,} latents, {path.stat().st_size / 1e6:.1f} MB: {path}")


# ---- what latents fire on ----


@torch.no_grad()
def latent_statistics(sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"]) -> LatentStatistics:
    """Find what each latent fires on, with the SAE as in evaluation."""
    F, rng = sae.cfg.dict_size, torch.Generator().manual_seed(0)
    counts, sums, maxima = np.zeros(F, np.int64), np.zeros(F), np.zeros(F, np.float32)
    strongest, sampled = Best(F, STRONGEST, apart=True), Best(F, SAMPLED)
    histograms, shown = np.zeros(F * BINS, np.int64), [np.empty(0, ACTIVATION)]
    with evaluation_mode(sae), TemporaryFile() as file:
        for found in activations(sae, model, tokens):
            latents = found["context"] % F
            counts += np.bincount(latents, minlength=F)
            sums += np.bincount(latents, found["value"], minlength=F)
            strongest.add(found, found["value"])
            sampled.add(found, torch.rand(len(found), generator=rng).numpy())
            file.write(found)

        peaks, bands = choose_contexts(strongest.entries(), sampled.entries(), F)
        del strongest, sampled
        np.maximum.at(maxima, peaks["context"] % F, peaks["value"])
        contexts = np.sort(peaks["context"])
        file.seek(0)
        while len(found := np.fromfile(file, ACTIVATION, READ_BACK)):
            latents = found["context"] % F
            bins = (found["value"] / maxima[latents] * BINS).astype(np.int64).clip(max=BINS - 1)
            histograms += np.bincount(latents * BINS + bins, minlength=F * BINS)
            nearest = contexts.take(np.searchsorted(contexts, found["context"]), mode="clip")
            shown.append(found[nearest == found["context"]])

    by_context = np.concatenate(shown)
    return LatentStatistics(
        tokens=int(ordinary_positions(tokens, model.tokenizer).sum()),
        counts=counts,
        means=sums / counts.clip(min=1),
        maxima=maxima,
        histograms=histograms.reshape(F, BINS),
        peaks=peaks,
        bands=bands,
        shown=by_context[by_context["context"].argsort(kind="stable")],
    )


def activations(sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"]) -> Iterator[Activations]:
    """Compute the SAE's activations at the ordinary positions, in order, a few whole windows at a time."""
    F, device, hooks, first = sae.cfg.dict_size, sae.W_dec.device, sae.cfg.reads, 0
    at_a_time = max(1, DENSE_NUMBERS // (tokens.shape[1] * F))
    for batch in tqdm(tokens.split(min(sae.cfg.model_batch_size, at_a_time)), desc="text", disable=None, leave=False):
        ordinary = ordinary_positions(batch, model.tokenizer)
        windows, positions = ordinary.nonzero(as_tuple=True)
        if len(windows):
            x = side_by_side(record(model, batch.to(model.W_U.device), hooks), hooks)
            latents = sae(x[ordinary.to(x.device)].to(device)).latents
            rows = latents.rows.cpu()
            found = np.empty(len(rows), ACTIVATION)
            found["context"] = (first + windows[rows]) * F + latents.indices.cpu()
            found["position"] = positions[rows]
            found["value"] = latents.values.float().cpu()
            yield found[found["value"] > 0]
        first += len(batch)


class Best:
    """Keep, for each latent, the `count` activations with the largest scores of all that are added.

    apart: of each window only one. Among equal scores, those added first are kept.
    Memory is for half as many again, and for sorting. An activation that cannot be among them is dropped at once, so
    that after the first batches few are kept and sorting is rare.
    """

    def __init__(self, dict_size: int, count: int, apart: bool = False) -> None:
        self.count, self.apart = count, apart
        self.to_beat = np.full(dict_size, -np.inf, np.float32)
        # With their scores: first what the last sort kept, then what has been added since.
        self.parts = [(np.empty(0, ACTIVATION), np.empty(0, np.float32))]

    def add(self, found: Activations, scores: Float[np.ndarray, "nnz"]) -> None:
        better = scores > self.to_beat[found["context"] % len(self.to_beat)]
        self.parts.append((found[better], scores[better]))
        if sum(len(scores) for _, scores in self.parts[1:]) > len(self.to_beat) * self.count // 2:
            self.entries()

    def entries(self) -> Activations:
        """Return what is kept, latent after latent, each latent's from the largest score down."""
        F = len(self.to_beat)
        found, scores = (np.concatenate(part) for part in zip(*self.parts))
        self.parts.clear()
        order = np.lexsort((-scores, found["context"] % F))
        order = order[foremost(found["context"][order], F, self.count, self.apart)]
        found, scores = found[order], scores[order]
        sizes = np.bincount(found["context"] % F, minlength=F)
        full = sizes == self.count
        self.to_beat[full] = scores[sizes.cumsum()[full] - 1]
        self.parts = [(found, scores)]
        return found


def foremost(contexts: Int[np.ndarray, "nnz"], dict_size: int, count: int, apart: bool) -> Int[np.ndarray, "kept"]:
    """Find the first `count` of each latent's activations, one of each window if `apart`; latents come in order."""
    first = np.sort(np.unique(contexts, return_index=True)[1]) if apart else np.arange(len(contexts))
    latents = contexts[first] % dict_size
    rank = np.arange(len(first)) - np.searchsorted(latents, latents)  # within the latent
    return first[rank < count]


def choose_contexts(
    strongest: Activations, sampled: Activations, dict_size: int
) -> tuple[Activations, Int[np.ndarray, "peaks"]]:
    """Choose what is shown: the strongest and, from each quantile of a latent's sample, PER_BAND in other windows.

    Returns them and their bands, latent after latent, of each the strongest first, then band after band downwards.
    """
    latents = sampled["context"] % dict_size
    order = np.lexsort((sampled["value"], latents))
    sizes = np.bincount(latents, minlength=dict_size)
    quantiles = np.empty(len(order), np.int8)
    quantiles[order] = (np.arange(len(order)) - (sizes.cumsum() - sizes)[latents]) * BANDS // sizes[latents]
    peaks, bands = strongest, np.full(len(strongest), -1)
    for band in reversed(range(BANDS)):
        others = sampled[quantiles == band]
        others = others[~np.isin(others["context"], peaks["context"])]
        others = others[
            foremost(others["context"], dict_size, PER_BAND, apart=True)
        ]  # in the order of the sample: random
        peaks, bands = np.concatenate([peaks, others]), np.concatenate([bands, np.full(len(others), band)])
    order = np.lexsort((-peaks["value"], -bands, bands >= 0, peaks["context"] % dict_size))
    return peaks[order], bands[order]


# ---- what latents do ----


@torch.no_grad()
def direct_effects(sae: BaseAutoencoder, model: Model, count: int) -> tuple[Ranked, Ranked]:
    """Find the tokens whose logits a latent's decoder row raises most, and those it lowers most, on the direct path.

    The row, scaled to root mean square 1, goes through the model's own final norm and unembedding as if it were the
    whole residual stream. What they make of zero (their biases) is subtracted, and so is the mean over the vocabulary,
    which no probability depends on. With LayerNorm the logits are ((d - mean(d)) / std(d) * ln_final.weight) @ W_U, up
    to that mean, for d = W_dec_j. This holds where what is written is in the residual stream or added to it: RESIDUAL.
    """
    vocab = min(model.cfg.d_vocab, len(model.tokenizer))  # a padded unembedding has tokens without a string
    device, dtype = model.W_U.device, model.W_U.dtype
    count = min(count, vocab // 2)
    zero = model.unembed(model.ln_final(torch.zeros(1, 1, model.cfg.d_model, device=device, dtype=dtype)))[0, :, :vocab]
    parts = []
    for rows in sae.W_dec.split(max(1, DENSE_NUMBERS // model.cfg.d_vocab)):
        direction = rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        logits = model.unembed(model.ln_final(direction.to(device, dtype)[None]))[0, :, :vocab].float()
        logits -= zero
        logits -= logits.mean(dim=1, keepdim=True)
        parts.append([*logits.topk(count), *logits.topk(count, largest=False)])
    raised, up, lowered, down = (torch.cat(part).cpu() for part in zip(*parts))
    return (up, raised), (down, lowered)


# ---- the page ----


def page(sae: BaseAutoencoder, model: Model, dataset_path: str, tokens: Int[Tensor, "window pos"]) -> str:
    """Put the data into the template: tokens as indices into one table of strings, each window once."""
    cfg, F = sae.cfg, sae.cfg.dict_size
    in_residual = (cfg.target_site or cfg.site) in RESIDUAL and len(cfg.layers) == 1
    effects = direct_effects(sae, model, EFFECTS) if in_residual else ()
    pieces = torch.arange(F).split(LATENTS_PER_PIECE)
    neighbours = [nearest_latents(sae.W_dec, piece, NEAREST) for piece in pieces]
    statistics = latent_statistics(sae, model, tokens)  # the last, as it keeps more in memory than the others
    counts, peaks, bands, shown = statistics.counts, statistics.peaks, statistics.bands, statistics.shown
    numbers, window = np.unique(peaks["context"] // F, return_inverse=True)
    ids = torch.cat([tokens[numbers].flatten(), *(some.flatten() for some, _ in effects)]).unique()
    windows = torch.searchsorted(ids, tokens[numbers]).numpy()
    ranked = [(torch.searchsorted(ids, some).tolist(), logits.double().round(decimals=2)) for some, logits in effects]
    contexts = np.split(np.arange(len(peaks)), np.searchsorted(peaks["context"] % F, np.arange(1, F)))  # by latent

    def top(j: int) -> list[int]:
        """Find the distinct tokens at the strongest windows' peaks, the most frequent first, then the strongest."""
        strongest = contexts[j][bands[contexts[j]] < 0]
        peak_tokens = windows[window[strongest], peaks["position"][strongest]].tolist()
        return [token for token, _ in Counter(peak_tokens).most_common(TABLE_TOKENS)]

    table = {
        "title": cfg.name,
        "facts": [
            ("Model", cfg.model_name),
            ("Hook", ", ".join(cfg.reads) if cfg.target_site is None else f"{cfg.reads[0]} to {cfg.writes[0]}"),
            (cfg.kind, f"{cfg.sae_type}, {setting(cfg)}"),
            ("Latents", f"{F:,}, of which {(counts == 0).sum():,} never fired here"),
            ("L0", f"{counts.sum() / max(1, statistics.tokens):.1f}"),
            ("Text", f"the held-out tenth of {dataset_path}: {statistics.tokens:,} tokens in {len(tokens):,} windows"),
        ],
        "tokens": statistics.tokens,
        "levels": LEVELS,
        "bands": BANDS,
        "piece": LATENTS_PER_PIECE,
        "strings": token_strings(model.tokenizer, ids.tolist()),
        "ids": ids.tolist(),
        "counts": counts.tolist(),
        "maxima": four_digits(statistics.maxima),
        "means": four_digits(statistics.means),
        "top": [top(j) for j in range(F)],
        "promoted": ranked[0][0] if ranked else None,
        "shown": TABLE_TOKENS,
    }
    levels = (LEVELS * shown["value"].astype(float) / statistics.maxima[shown["context"] % F]).round().clip(min=1)
    fires = np.stack([shown["position"], levels.astype(np.int32)], axis=1)
    heads = np.stack([window, peaks["position"], bands], axis=1, dtype=np.int32, casting="same_kind")
    starts, ends = (np.searchsorted(shown["context"], peaks["context"], side) for side in ("left", "right"))

    def data(j: int, nearest: list[int], cosines: list[float]) -> dict[str, Any]:
        return {
            "histogram": statistics.histograms[j].tolist() if counts[j] else [],
            # [window, peak, band, position, level, position, level, ...]
            "contexts": [[*heads[i].tolist(), *fires[starts[i] : ends[i]].flatten().tolist()] for i in contexts[j]],
            "nearest": [nearest, cosines],
            # [logits of those promoted, tokens suppressed, their logits]
            "effects": [ranked[0][1][j].tolist(), ranked[1][0][j], ranked[1][1][j].tolist()] if ranked else None,
        }

    before, between, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    parts = [before, script("table", table), script("windows", windows.tolist()), between]
    for number, (piece, (nearest, cosines)) in enumerate(zip(pieces, neighbours)):
        columns = (piece.tolist(), nearest.tolist(), cosines.double().round(decimals=2).tolist())
        parts.append(script(f"latents-{number}", [data(*row) for row in zip(*columns)]))
    return "".join([*parts, after])


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Find what each token adds to a text, with the leading space that some tokenizers drop from a single token."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*before, i] for i in ids], clean_up_tokenization_spaces=False)
    return [text.removeprefix(prefix) for text in texts]


def four_digits(numbers: Float[np.ndarray, "numbers"]) -> list[float]:
    """Round to four significant digits."""
    return [float(f"{number:.4g}") for number in numbers]


def script(name: str, data: Any) -> str:
    """Write data as base64 of compressed JSON, in which no text is left that HTML could take for its own."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return f'<script type="text/plain" id="{name}">{b64encode(zlib.compress(text.encode(), 9)).decode()}</script>\n'
