"""The latents of an SAE on one HTML page, which needs no network: assets/dashboard.html with the data written into it.

One pass over held-out text finds every latent's largest activation, its strongest contexts and a uniform sample of its
activations. What fired goes to a temporary file (20 bytes each), from which a second pass counts histograms up to that
largest activation and reads the chosen contexts. Nothing of [tokens, dict_size] is made: memory does not grow with the
text.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from activation_store import check_model, held_out_windows, load_model, ordinary_positions, record
from config import setting
from disk import write_durably
from evaluation import nearest_latents
from sae import BaseAutoencoder

TEMPLATE = Path(__file__).parent / "assets" / "dashboard.html"
MARK = "<!-- data -->"  # in the template: first of the table, then of all else, so that the table is drawn before it
STRONGEST = 16  # contexts of a latent, of different windows
SAMPLED = 64  # activations of a latent, which the contexts of lower quantiles are chosen from
BANDS = 4  # quantiles, of equal numbers of activations
PER_BAND = 4  # contexts
BINS = 40  # of a histogram
EFFECTS = 10  # tokens that a latent promotes, and as many that it suppresses
NEAREST = 10  # latents
TABLE_TOKENS = 6  # in a row of the table
LEVELS = 999  # in which an activation in a context is written, as a share of the latent's largest
LATENTS_PER_PIECE = 256  # of the page's data: a piece is parsed when one of its latents is opened
DENSE_NUMBERS = 1 << 26  # at a time: 256 MB of float32
TINY = 1e-12  # of a decoder row of zeros, which other libraries' SAEs may have
WINDOW_CHOICE = 4  # held-out windows read for each one shown


class Activations(NamedTuple):
    """Those above 0: of which latent, at which place (window * pos + position, ascending), how large."""

    latents: Int[Tensor, "nnz"]
    places: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]


@dataclass(frozen=True)
class LatentStatistics:
    """What was found on the text; all on the CPU."""

    tokens: int  # at ordinary positions
    counts: Int[Tensor, "dict_size"]  # tokens on which a latent fires
    means: Float[Tensor, "dict_size"]  # of its activations above 0; 0 where there is none
    maxima: Float[Tensor, "dict_size"]
    histograms: Int[Tensor, "dict_size bins"]  # of the activations above 0, from 0 to the largest
    contexts: list[list["Context"]]  # of each latent, the strongest first, then band after band down


class Context(NamedTuple):
    """A window in which a latent fires: at `peak` it is one of its strongest activations (band -1), or one sampled from
    a band of quantiles (BANDS - 1 is the highest).
    """

    window: int
    peak: int
    band: int
    positions: list[int]  # all at which the latent fires, ascending
    values: list[float]


def write_dashboard(
    sae: BaseAutoencoder,
    path: Path,
    model: TransformerBridge | None,
    windows: int,
    dataset_path: str | None,
    dataset_name: str | None,
) -> None:
    """See `results.feature_dashboard`."""
    if windows < 1:
        raise ValueError(f"windows = {windows}: give 1 or more")
    if dataset_name is not None and dataset_path is None:
        raise ValueError(f"dataset_name = {dataset_name!r}: of no data set; give its dataset_path as well")
    cfg = sae.cfg if dataset_path is None else replace(sae.cfg, dataset_path=dataset_path, dataset_name=dataset_name)
    model = load_model(check_model(cfg)) if model is None else model
    tokens = held_out_windows(cfg, model.tokenizer, windows, WINDOW_CHOICE)
    statistics = latent_statistics(sae, model, tokens)
    effects = None if cfg.site == "z" else direct_effects(sae, model, EFFECTS)
    neighbours = nearest_latents(sae.W_dec, torch.arange(cfg.dict_size), NEAREST)
    text = page(sae, model.tokenizer, cfg.dataset_path, tokens, statistics, effects, neighbours)
    write_durably(path, text.encode())


# ---- what latents fire on ----


@torch.no_grad()
def activations(
    sae: BaseAutoencoder, model: TransformerBridge, tokens: Int[Tensor, "window pos"]
) -> Iterator[Activations]:
    """The SAE's activations as in evaluation, at the ordinary positions, a few whole windows at a time."""
    at_a_time = max(1, DENSE_NUMBERS // (tokens.shape[1] * sae.cfg.dict_size))
    device, first = sae.W_dec.device, 0
    for batch in tqdm(tokens.split(min(sae.cfg.model_batch_size, at_a_time)), desc="text", disable=None, leave=False):
        places = ordinary_positions(batch, model.tokenizer).flatten().nonzero().squeeze(1)
        if len(places):
            x = record(model, batch.to(model.W_U.device), sae.cfg.hook_point).flatten(0, 1)
            latents = sae(x[places.to(x.device)].to(device)).latents
            fired = latents.values > 0
            rows = latents.support.rows[fired]
            yield Activations(latents.indices[fired], first + places.to(device)[rows], latents.values[fired].float())
        first += batch.numel()


def latent_statistics(
    sae: BaseAutoencoder, model: TransformerBridge, tokens: Int[Tensor, "window pos"]
) -> LatentStatistics:
    """What each latent does on the tokens. The SAE is used in evaluation mode and left as it was."""
    was_training = sae.training
    sae.eval()
    F, pos, device = sae.cfg.dict_size, tokens.shape[1], sae.W_dec.device
    rng = torch.Generator(device).manual_seed(0)
    counts = torch.zeros(F, dtype=torch.int64, device=device)
    sums = torch.zeros(F, dtype=torch.float64, device=device)
    strongest, sampled = Best(F, STRONGEST, device), Best(F, SAMPLED, device)
    lengths = []
    with TemporaryFile() as file:
        for found in activations(sae, model, tokens):
            counts += found.latents.bincount(minlength=F)
            sums.index_add_(0, found.latents, found.values.double())
            peaks = window_peaks(found, F, pos)
            strongest.add(peaks, peaks.values)
            sampled.add(found, torch.rand(len(found.values), generator=rng, device=device))
            lengths.append(len(found.values))
            for part in found:
                file.write(part.cpu().numpy())

        maxima = strongest.largest()
        chosen = choose_contexts(strongest.entries(), sampled.entries(), F, pos)
        keys = torch.tensor(sorted(window * F + latent for latent, window, *_ in chosen), dtype=torch.int64)
        keys = keys.to(device)
        histograms = torch.zeros(F * BINS, dtype=torch.int64, device=device)
        read: list[tuple[Tensor, Tensor, Tensor]] = []  # key's index, position, value
        for found in _read_back(file, lengths, device):
            bins = (found.values / maxima[found.latents] * BINS).long().clamp(max=BINS - 1)
            histograms += (found.latents * BINS + bins).bincount(minlength=F * BINS)
            key = found.places // pos * F + found.latents
            index = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            wanted = keys[index] == key
            read.append((index[wanted], found.places[wanted] % pos, found.values[wanted]))
    sae.train(was_training)

    return LatentStatistics(
        tokens=int(ordinary_positions(tokens, model.tokenizer).sum()),
        counts=counts.cpu(),
        means=(sums / counts.clamp_min(1)).float().cpu(),
        maxima=maxima.cpu(),
        histograms=histograms.view(F, BINS).cpu(),
        contexts=_contexts(chosen, keys, read, F),
    )


def _read_back(file: IO[bytes], lengths: list[int], device: torch.device) -> Iterator[Activations]:
    file.seek(0)
    for length in lengths:
        parts = [np.fromfile(file, dtype, length) for dtype in (np.int64, np.int64, np.float32)]
        yield Activations(*(torch.from_numpy(part).to(device) for part in parts))


def window_peaks(found: Activations, dict_size: int, pos: int) -> Activations:
    """The largest activation of each latent in each window; the first of equal ones."""
    if not len(found.places):
        return found
    windows = found.places // pos
    key = (windows - windows[0]) * dict_size + found.latents
    shape = int(windows[-1] - windows[0] + 1) * dict_size
    largest = found.values.new_zeros(shape).scatter_reduce_(0, key, found.values, "amax")
    peak = found.values == largest[key]
    beyond = found.places[-1] + 1
    first = beyond.expand(shape).clone().scatter_reduce_(0, key[peak], found.places[peak], "amin")
    peak &= found.places == first[key]
    return Activations(*(part[peak] for part in found))


class Best:
    """Keeps, for each latent, the `count` activations with the largest scores among all that were added.

    Memory is for about twice that many. An activation that cannot be among them is dropped at once, so that after the
    first batches few are kept and sorting is rare.
    """

    def __init__(self, dict_size: int, count: int, device: torch.device) -> None:
        self.dict_size, self.count = dict_size, count
        self.to_beat = torch.full((dict_size,), -torch.inf, device=device)
        self.scores = torch.empty(0, device=device)
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self.kept = Activations(nothing, nothing, self.scores)
        self.added: list[tuple[Activations, Tensor]] = []

    def add(self, found: Activations, scores: Float[Tensor, "nnz"]) -> None:
        better = scores > self.to_beat[found.latents]
        self.added.append((Activations(*(part[better] for part in found)), scores[better]))
        if sum(len(scores) for _, scores in self.added) > self.dict_size * self.count:
            self._sort()

    def entries(self) -> Activations:
        """Those kept, latent after latent, each latent's from the largest score down."""
        self._sort()
        return self.kept

    def largest(self) -> Float[Tensor, "dict_size"]:
        """The largest score of each latent, 0 where there is none."""
        self._sort()
        return torch.zeros_like(self.to_beat).scatter_reduce_(0, self.kept.latents, self.scores, "amax")

    def _sort(self) -> None:
        scores = torch.cat([self.scores, *(scores for _, scores in self.added)])
        all_ = [torch.cat(parts) for parts in zip(self.kept, *(found for found, _ in self.added))]
        self.added = []
        order = scores.sort(descending=True, stable=True).indices
        order = order[all_[0][order].sort(stable=True).indices]
        latents = all_[0][order]
        starts = torch.searchsorted(latents, torch.arange(self.dict_size, device=latents.device))
        rank = torch.arange(len(latents), device=latents.device) - starts[latents]
        order = order[rank < self.count]
        self.scores, self.kept = scores[order], Activations(*(part[order] for part in all_))
        last = rank == self.count - 1
        self.to_beat[latents[last]] = scores[order][rank[rank < self.count] == self.count - 1]


def choose_contexts(
    strongest: Activations, sampled: Activations, dict_size: int, pos: int
) -> list[tuple[int, int, int, int]]:
    """(latent, window, position, band) of what is shown, no window twice for a latent: its strongest windows, then from
    each quantile of its sampled activations, the highest first, at most PER_BAND windows.
    """
    shown: list[list[tuple[int, int, int]]] = [[] for _ in range(dict_size)]
    for latent, place in zip(strongest.latents.tolist(), strongest.places.tolist()):
        shown[latent].append((place // pos, place % pos, -1))

    order = sampled.values.sort(stable=True).indices
    order = order[sampled.latents[order].sort(stable=True).indices]  # by latent, each latent's ascending
    sizes = sampled.latents.bincount(minlength=dict_size)
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[sampled.latents[order]]
    band = torch.empty_like(rank).index_copy_(0, order, rank * BANDS // sizes[sampled.latents[order]])
    bands: list[list[list[tuple[int, int]]]] = [[[] for _ in range(BANDS)] for _ in range(dict_size)]
    for latent, place, b in zip(sampled.latents.tolist(), sampled.places.tolist(), band.tolist()):
        bands[latent][b].append((place // pos, place % pos))  # in their random order

    for contexts, candidates in zip(shown, bands):
        windows = {window for window, _, _ in contexts}
        for b in reversed(range(BANDS)):
            room = PER_BAND
            for window, position in candidates[b]:
                if room and window not in windows:
                    windows.add(window)
                    contexts.append((window, position, b))
                    room -= 1
    return [(latent, *context) for latent, contexts in enumerate(shown) for context in contexts]


def _contexts(
    chosen: list[tuple[int, int, int, int]], keys: Tensor, read: list[tuple[Tensor, Tensor, Tensor]], dict_size: int
) -> list[list[Context]]:
    """The chosen contexts of each latent, with all of its activations in their windows."""
    contexts: list[list[Context]] = [[] for _ in range(dict_size)]
    if not chosen:
        return contexts
    index, positions, values = (torch.cat(parts) for parts in zip(*read))
    index, order = index.sort(stable=True)
    positions, values = positions[order].tolist(), values[order].tolist()
    ends = index.bincount(minlength=len(keys)).cumsum(0).tolist()
    spans = dict(zip(keys.tolist(), zip([0, *ends], ends)))
    for latent, window, peak, band in chosen:
        span = slice(*spans[window * dict_size + latent])
        contexts[latent].append(Context(window, peak, band, positions[span], values[span]))
    for of_latent in contexts:
        of_latent.sort(key=lambda c: (c.band >= 0, -c.band, -c.values[c.positions.index(c.peak)]))
    return contexts


# ---- what latents do ----


class Effects(NamedTuple):
    """Tokens and their logits, the most promoted and the most suppressed first."""

    promoted: Int[Tensor, "dict_size count"]
    promoted_logits: Float[Tensor, "dict_size count"]
    suppressed: Int[Tensor, "dict_size count"]
    suppressed_logits: Float[Tensor, "dict_size count"]


@torch.no_grad()
def direct_effects(sae: BaseAutoencoder, model: TransformerBridge, count: int) -> Effects:
    """The tokens whose logits a latent's decoder row raises and lowers most on the direct path, past all later blocks.

    The row, at root mean square 1, goes through the model's own final norm and unembedding as if it were the whole
    residual stream; what these make of zero (their biases) is taken away, and so is the mean over the vocabulary, which
    no probability depends on. With LayerNorm that is, before the mean is taken away,

        ((d - mean(d)) / std(d) * ln_final.weight) @ W_U      d = W_dec_j, std biased

    which the order of tokens shares with any scale of d, so input_unit_norm makes no difference. Only for sites in the
    residual stream or added to it: all but "z".
    """
    vocab = min(model.cfg.d_vocab, len(model.tokenizer))  # a padded unembedding has tokens without a string
    device, dtype = model.W_U.device, model.W_U.dtype
    count = min(count, vocab // 2)
    zero = model.unembed(model.ln_final(torch.zeros(1, 1, model.cfg.d_model, device=device, dtype=dtype)))
    parts = []
    for rows in sae.W_dec.split(max(1, DENSE_NUMBERS // model.cfg.d_vocab)):
        direction = rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt().clamp_min(TINY)
        logits = (model.unembed(model.ln_final(direction.to(device, dtype)[None])) - zero)[0, :, :vocab].float()
        logits -= logits.mean(dim=1, keepdim=True)
        most, least = logits.topk(count), logits.topk(count, largest=False)
        parts.append((most.indices.cpu(), most.values.cpu(), least.indices.cpu(), least.values.cpu()))
    return Effects(*(torch.cat(part) for part in zip(*parts)))


# ---- the page ----


def page(
    sae: BaseAutoencoder,
    tokenizer: PreTrainedTokenizerBase,
    dataset_path: str,
    tokens: Int[Tensor, "window pos"],
    statistics: LatentStatistics,
    effects: Effects | None,
    neighbours: tuple[Int[Tensor, "dict_size count"], Float[Tensor, "dict_size count"]],
) -> str:
    """The template with the data in it: tokens as indices into one table of strings, each window once."""
    F, contexts = sae.cfg.dict_size, statistics.contexts
    windows = sorted({context.window for of_latent in contexts for context in of_latent})
    window_index = {window: i for i, window in enumerate(windows)}
    ids = tokens[windows].unique()
    if effects is not None:
        ids = torch.cat([ids, effects.promoted.flatten(), effects.suppressed.flatten()]).unique()
    index = torch.zeros(int(ids.max()) + 1 if len(ids) else 0, dtype=torch.int64)
    index[ids] = torch.arange(len(ids))

    # Distinct tokens at the strongest windows' peaks, the most frequent first, then the strongest.
    top = [
        [token for token, _ in Counter(int(tokens[c.window, c.peak]) for c in of_latent if c.band < 0).most_common()]
        for of_latent in contexts
    ]
    table = {
        "title": sae.cfg.name,
        "facts": _facts(sae, dataset_path, statistics, len(tokens)),
        "tokens": statistics.tokens,
        "levels": LEVELS,
        "bands": BANDS,
        "piece": LATENTS_PER_PIECE,
        "strings": token_strings(tokenizer, ids.tolist()),
        "ids": ids.tolist(),
        "counts": statistics.counts.tolist(),
        "maxima": _digits(statistics.maxima),
        "means": _digits(statistics.means),
        "top": [index[of_latent[:TABLE_TOKENS]].tolist() for of_latent in top],
        "promoted": None if effects is None else index[effects.promoted].tolist(),
        "shown": TABLE_TOKENS,
    }
    histograms, (nearest, cosines) = statistics.histograms.tolist(), (n.tolist() for n in neighbours)
    if effects is not None:
        effect_tokens = [index[part].tolist() for part in (effects.promoted, effects.suppressed)]
        effect_logits = [_digits(part) for part in (effects.promoted_logits, effects.suppressed_logits)]
    pieces = []
    for first in range(0, F, LATENTS_PER_PIECE):
        piece = []
        for j in range(first, min(F, first + LATENTS_PER_PIECE)):
            scale = LEVELS / max(float(statistics.maxima[j]), torch.finfo(torch.float32).tiny)
            latent = {
                "histogram": histograms[j] if contexts[j] else [],
                "contexts": [_context(context, window_index, scale) for context in contexts[j]],
                "nearest": [nearest[j], [round(cosine, 3) for cosine in cosines[j]]],
            }
            if effects is not None:
                latent["effects"] = [[t[j], v[j]] for t, v in zip(effect_tokens, effect_logits)]
            piece.append(latent)
        pieces.append(_script(f"latents-{first // LATENTS_PER_PIECE}", piece))
    before, between, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    windows_script = _script("windows", index[tokens[windows]].tolist())
    return "".join([before, _script("table", table), between, windows_script, *pieces, after])


def _context(context: Context, window_index: dict[int, int], scale: float) -> list[int]:
    """[window, peak, band, position, level, position, level, ...]"""
    fired = zip(context.positions, (max(1, round(value * scale)) for value in context.values))
    return [window_index[context.window], context.peak, context.band, *(number for pair in fired for number in pair)]


def _facts(
    sae: BaseAutoencoder, dataset_path: str, statistics: LatentStatistics, windows: int
) -> list[tuple[str, str]]:
    cfg = sae.cfg
    dead = int((statistics.counts == 0).sum())
    return [
        ("Model", cfg.model_name),
        ("Hook", cfg.hook_point),
        ("SAE", f"{cfg.sae_type}, {setting(cfg)}"),
        ("Latents", f"{cfg.dict_size:,}, of which {dead:,} never fired here"),
        ("L0", f"{float(statistics.counts.sum()) / max(1, statistics.tokens):.1f}"),
        ("Text", f"the held-out tenth of {dataset_path}: {statistics.tokens:,} tokens in {windows:,} windows"),
    ]


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to a text, its leading space included, which some tokenizers drop from a token alone."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*before, i] for i in ids], clean_up_tokenization_spaces=False)
    return [text.removeprefix(prefix) for text in texts]


def _digits(numbers: Float[Tensor, "..."]) -> list:
    """Nested lists with four significant digits."""
    if numbers.ndim > 1:
        return [_digits(row) for row in numbers]
    return [float(f"{number:.4g}") for number in numbers.tolist()]


def _script(name: str, data: Any) -> str:
    """JSON that the HTML parser reads past: ASCII, and without the < that could close the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
