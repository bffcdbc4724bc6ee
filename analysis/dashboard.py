"""Write the latents of an SAE on one HTML page that needs no network: dashboard.html with the data put into it.

One pass over held-out text finds every latent's largest activation, its strongest contexts and a uniform sample of its
activations. It writes every activation to a temporary file (20 bytes each). A second pass reads them back to count
histograms up to that largest activation and to collect the chosen contexts. No [tokens, dict_size] tensor is made, so
memory does not grow with the text.
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
from huggingface_hub.utils.logging import set_verbosity_error
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from analysis.latents import nearest_latents
from config import Config, setting
from evaluation import evaluation_mode
from interop.pretrained import load_pretrained
from kernels.choose import rank_in_group
from language_model import check_model, load_model, ordinary_positions, record
from runtime.checks import require
from runtime.cli import Parser
from runtime.disk import write_durably
from sae import BaseAutoencoder
from text import held_out_windows

TEMPLATE = Path(__file__).with_name("dashboard.html")
MARK = "<!-- data -->"  # in the template twice: for the table, which can then be drawn, and for all the rest
STRONGEST = 16  # contexts of a latent, each from another window
SAMPLED = 64  # activations of a latent, from which its weaker contexts are chosen
BANDS = 4  # quantiles, each with as many activations
PER_BAND = 4  # contexts
BINS = 40  # of a histogram
EFFECTS = 10  # tokens that a latent promotes, and as many that it suppresses
NEAREST = 10  # latents
TABLE_TOKENS = 6  # in a row of the table
LEVELS = 999  # steps in which an activation is written, as a share of the latent's largest
LATENTS_PER_PIECE = 256  # of the page's data: a piece is parsed when one of its latents is opened
DENSE_NUMBERS = 1 << 26  # at a time: 256 MB of float32
TINY = 1e-12  # for decoder rows of zeros, which other libraries' SAEs may have
WINDOW_CHOICE = 4  # held-out windows to choose each window from


class Activations(NamedTuple):
    """Activations above 0: of which latents, at which places (window * pos + position, ascending), how large."""

    latents: Int[Tensor, "nnz"]
    places: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]

    def at(self, where: Tensor) -> "Activations":
        return Activations(*(part[where] for part in self))


class Context(NamedTuple):
    """A window in which a latent fires, shown for its activation at `peak`.

    band: the quantile from which that one was sampled, 0 for the lowest, or -1 for one of the latent's strongest.
    """

    window: int
    peak: int
    band: int
    positions: list[int]  # where the latent fires, ascending
    values: list[float]


@dataclass(frozen=True)
class LatentStatistics:
    """What was found on the text, all on the CPU."""

    tokens: int  # at ordinary positions
    counts: Int[Tensor, "dict_size"]  # tokens on which a latent fires
    means: Float[Tensor, "dict_size"]  # of its activations above 0; 0 where there are none
    maxima: Float[Tensor, "dict_size"]
    histograms: Int[Tensor, "dict_size bins"]  # of its activations above 0, from 0 to the largest
    contexts: list[list[Context]]  # of each latent, the strongest first, then band after band downwards


def feature_dashboard(
    sae: BaseAutoencoder,
    path: str | Path = "dashboard.html",
    *,
    model: TransformerBridge | None = None,
    windows: int = 1024,
    dataset_path: str | None = None,
    dataset_name: str | None = None,
) -> Path:
    """Write one HTML file, which needs no network, with a table of the SAE's latents and what is known of each:

    density, largest activation, histogram, the contexts that activate it most, contexts from each quarter of its
    activations, the tokens it promotes and suppresses (`direct_effects`) and the nearest decoder rows.

    sae: of any type, used as in evaluation. model: the language model of sae.cfg, loaded when not given.
    windows: how many context windows of sae.cfg.seq_len held-out tokens to read; special tokens are left out.
    dataset_path, dataset_name: the text, as in Config; that of sae.cfg when not given.
    Returns the path. Raises ValueError or OSError when the model or the held-out text cannot be read.
    """
    require(windows >= 1, f"windows = {windows}: give 1 or more")
    alone = dataset_name is not None and dataset_path is None
    require(not alone, f"dataset_name = {dataset_name!r}: needs its data set; give dataset_path as well")
    cfg = sae.cfg if dataset_path is None else replace(sae.cfg, dataset_path=dataset_path, dataset_name=dataset_name)
    model = load_model(check_model(cfg)) if model is None else model
    tokens = held_out_windows(cfg, model.tokenizer, windows, WINDOW_CHOICE)
    statistics = latent_statistics(sae, model, tokens)
    effects = None if cfg.site == "z" else direct_effects(sae, model, EFFECTS)
    neighbours = nearest_latents(sae.W_dec, torch.arange(cfg.dict_size), NEAREST)
    text = page(sae, model.tokenizer, cfg.dataset_path, tokens, statistics, effects, neighbours)
    write_durably(path, text.encode())
    return Path(path)


def dashboard_parser() -> Parser:
    parser = Parser(prog="results.py dashboard", description="Write the page of the latents of one SAE.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of an SAE, or user/repo:folder of the Hub")
    parser.add_argument("--windows", type=int, default=1024, help="context windows of text to read (default: 1024)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: beside the folder, as .html)")
    parser.add_argument("--dataset-path", metavar="PATH", help="text, as for main.py (default: that of its Config)")
    parser.add_argument("--dataset-name", metavar="NAME", help="configuration of that data set, if it has several")
    parser.add_argument("--model-name", metavar="NAME", help="the model, where the files are silent or wrong about it")
    parser.add_argument("--hook-name", metavar="HOOK", help="the hook, likewise, as in blocks.8.hook_resid_pre")
    return parser


def command(words: list[str]) -> None:
    """Write the page that `python results.py dashboard` is asked for."""
    options = dashboard_parser().parse_args(words)
    disable_progress_bar()
    set_verbosity_error()  # retries are a line each
    device, folder = Config().torch_device, Path(options.checkpoint)
    sae = load_pretrained(options.checkpoint, device, model_name=options.model_name, hook_name=options.hook_name)
    beside = folder.resolve().with_name(f"{folder.resolve().name}.html")
    path = options.output or (beside if folder.is_dir() else Path(f"{sae.cfg.name}.html"))
    text = dict(dataset_path=options.dataset_path, dataset_name=options.dataset_name)
    feature_dashboard(sae, path, windows=options.windows, **text)
    print(f"{sae.cfg.dict_size:,} latents, {path.stat().st_size / 1e6:.1f} MB: {path}")


# ---- what latents fire on ----


@torch.no_grad()
def latent_statistics(
    sae: BaseAutoencoder, model: TransformerBridge, tokens: Int[Tensor, "window pos"]
) -> LatentStatistics:
    """Find what each latent fires on, with the SAE as in evaluation."""
    F, pos, device = sae.cfg.dict_size, tokens.shape[1], sae.W_dec.device
    rng = torch.Generator(device).manual_seed(0)
    counts = torch.zeros(F, dtype=torch.int64, device=device)
    sums = torch.zeros(F, dtype=torch.float64, device=device)
    strongest, sampled = Best(F, STRONGEST, device), Best(F, SAMPLED, device)
    lengths = []
    with evaluation_mode(sae), TemporaryFile() as file:
        for found in activations(sae, model, tokens):
            counts += found.latents.bincount(minlength=F)
            sums.index_add_(0, found.latents, found.values.double())
            peaks = window_peaks(found, F, pos)
            strongest.add(peaks, peaks.values)
            sampled.add(found, torch.rand(len(found.values), generator=rng, device=device))
            lengths.append(len(found.values))
            for part in found:
                file.write(part.cpu().numpy())

        best = strongest.entries()
        maxima = torch.zeros(F, device=device).scatter_reduce_(0, best.latents, best.values, "amax")
        chosen = choose_contexts(best, sampled.entries(), F, pos)
        keys = sorted(window * F + latent for latent, windows in enumerate(chosen) for window in windows)
        keys = torch.tensor(keys, dtype=torch.int64, device=device)
        histograms = torch.zeros(F * BINS, dtype=torch.int64, device=device)
        read: list[tuple[Tensor, Tensor, Tensor]] = []  # index of the key, position, value
        for found in read_back(file, lengths, device):
            bins = (found.values / maxima[found.latents] * BINS).long().clamp(max=BINS - 1)
            histograms += (found.latents * BINS + bins).bincount(minlength=F * BINS)
            key = found.places // pos * F + found.latents
            index = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            wanted = keys[index] == key
            read.append((index[wanted], found.places[wanted] % pos, found.values[wanted]))

    return LatentStatistics(
        tokens=int(ordinary_positions(tokens, model.tokenizer).sum()),
        counts=counts.cpu(),
        means=(sums / counts.clamp_min(1)).float().cpu(),
        maxima=maxima.cpu(),
        histograms=histograms.view(F, BINS).cpu(),
        contexts=whole_contexts(chosen, keys, read),
    )


def activations(
    sae: BaseAutoencoder, model: TransformerBridge, tokens: Int[Tensor, "window pos"]
) -> Iterator[Activations]:
    """Compute the SAE's activations at the ordinary positions, a few whole windows at a time."""
    at_a_time = max(1, DENSE_NUMBERS // (tokens.shape[1] * sae.cfg.dict_size))
    device, hook, first = sae.W_dec.device, sae.cfg.hook_name, 0
    for batch in tqdm(tokens.split(min(sae.cfg.model_batch_size, at_a_time)), desc="text", disable=None, leave=False):
        places = ordinary_positions(batch, model.tokenizer).flatten().nonzero().squeeze(1)
        if len(places):
            x = record(model, batch.to(model.W_U.device), [hook])[hook].flatten(0, 1)
            latents = sae(x[places.to(x.device)].to(device)).latents
            entries = Activations(latents.indices, first + places.to(device)[latents.rows], latents.values.float())
            yield entries.at(entries.values > 0)
        first += batch.numel()


def read_back(file: IO[bytes], lengths: list[int], device: torch.device) -> Iterator[Activations]:
    """Read activations as they were written, batch by batch."""
    file.seek(0)
    for length in lengths:
        parts = [np.fromfile(file, dtype, length) for dtype in (np.int64, np.int64, np.float32)]
        yield Activations(*(torch.from_numpy(part).to(device) for part in parts))


def window_peaks(found: Activations, dict_size: int, pos: int) -> Activations:
    """Keep the largest activation of each latent in each window, the first of equal ones."""
    if not len(found.places):
        return found
    windows = found.places // pos
    key = (windows - windows[0]) * dict_size + found.latents
    shape = int(windows[-1] - windows[0] + 1) * dict_size
    largest = found.values.new_zeros(shape).scatter_reduce_(0, key, found.values, "amax")
    peak = found.values == largest[key]
    beyond = found.places[-1] + 1
    first = beyond.expand(shape).clone().scatter_reduce_(0, key[peak], found.places[peak], "amin")
    return found.at(peak & (found.places == first[key]))


class Best:
    """Keep, for each latent, the `count` activations with the largest scores of all that are added.

    Memory is for about twice that many. An activation that cannot be among them is dropped at once, so that after the
    first batches few are kept and sorting is rare.
    """

    def __init__(self, dict_size: int, count: int, device: torch.device) -> None:
        self.count = count
        self.to_beat = torch.full((dict_size,), -torch.inf, device=device)
        nothing = torch.empty(0, device=device)
        # With their scores: first what the last sort kept, then what has been added since.
        self.parts = [(Activations(nothing.long(), nothing.long(), nothing), nothing)]

    def add(self, found: Activations, scores: Float[Tensor, "nnz"]) -> None:
        better = scores > self.to_beat[found.latents]
        self.parts.append((found.at(better), scores[better]))
        if sum(len(scores) for _, scores in self.parts[1:]) > len(self.to_beat) * self.count:
            self.entries()

    def entries(self) -> Activations:
        """Return what is kept, latent after latent, each latent's from the largest score down."""
        found = Activations(*(torch.cat(part) for part in zip(*(found for found, _ in self.parts))))
        scores = torch.cat([scores for _, scores in self.parts])
        self.parts.clear()
        sizes = found.latents.bincount(minlength=len(self.to_beat))
        order = scores.sort(descending=True, stable=True).indices
        order, rank = rank_in_group(order, found.latents, sizes.cumsum(0) - sizes)
        last = order[rank == self.count - 1]
        self.to_beat[found.latents[last]] = scores[last]
        kept = order[rank < self.count]
        self.parts.append((found.at(kept), scores[kept]))
        return self.parts[0][0]


def choose_contexts(
    strongest: Activations, sampled: Activations, dict_size: int, pos: int
) -> list[dict[int, tuple[int, int]]]:
    """Choose what is shown of each latent: {window: (peak, band)}.

    These are its strongest windows and, from each quantile of its sampled activations, at most PER_BAND others.
    """
    sizes = sampled.latents.bincount(minlength=dict_size)
    order = sampled.values.sort(stable=True).indices
    order, rank = rank_in_group(order, sampled.latents, sizes.cumsum(0) - sizes)
    bands = torch.empty_like(rank).index_copy_(0, order, rank * BANDS // sizes[sampled.latents[order]])
    down = bands.sort(descending=True, stable=True).indices  # within a band in the order of the sample, which is random
    latents, places = (part.tolist() + rest[down].tolist() for part, rest in zip(strongest[:2], sampled[:2]))
    chosen: list[dict[int, tuple[int, int]]] = [{} for _ in range(dict_size)]
    taken: Counter[tuple[int, int]] = Counter()
    for latent, place, band in zip(latents, places, [-1] * len(strongest.latents) + bands[down].tolist()):
        window, peak = divmod(place, pos)
        if window not in chosen[latent] and (band < 0 or taken[latent, band] < PER_BAND):
            taken[latent, band] += 1
            chosen[latent][window] = (peak, band)
    return chosen


def whole_contexts(
    chosen: list[dict[int, tuple[int, int]]], keys: Int[Tensor, "keys"], read: list[tuple[Tensor, Tensor, Tensor]]
) -> list[list[Context]]:
    """Add to the chosen contexts all of the latent's activations in their windows.

    keys: window * dict_size + latent, ascending; read: the index of a key, a position and a value for each activation.
    """
    contexts: list[list[Context]] = [[] for _ in chosen]
    if not len(keys):
        return contexts
    index, positions, values = (torch.cat(parts) for parts in zip(*read))
    index, order = index.sort(stable=True)
    positions, values = positions[order].tolist(), values[order].tolist()
    ends = index.bincount(minlength=len(keys)).cumsum(0).tolist()
    spans = dict(zip(keys.tolist(), zip([0, *ends], ends)))
    for latent, windows in enumerate(chosen):
        for window, (peak, band) in windows.items():
            span = slice(*spans[window * len(chosen) + latent])
            contexts[latent].append(Context(window, peak, band, positions[span], values[span]))
        contexts[latent].sort(key=lambda c: (c.band >= 0, -c.band, -c.values[c.positions.index(c.peak)]))
    return contexts


# ---- what latents do ----


class Ranked(NamedTuple):
    """Tokens and their logits, the strongest effect first."""

    tokens: Int[Tensor, "dict_size count"]
    logits: Float[Tensor, "dict_size count"]


@torch.no_grad()
def direct_effects(sae: BaseAutoencoder, model: TransformerBridge, count: int) -> tuple[Ranked, Ranked]:
    """Find the tokens whose logits a latent's decoder row raises most and lowers most on the direct path.

    That path leads past all later blocks: the row, scaled to root mean square 1, goes through the model's own final
    norm and unembedding as if it were the whole residual stream. What they make of zero (their biases) is subtracted,
    and so is the mean over the vocabulary, which no probability depends on. With LayerNorm the logits are, up to that
    mean,

        ((d - mean(d)) / std(d) * ln_final.weight) @ W_U      d = W_dec_j, std biased

    The order of tokens does not depend on the scale of d, so input_unit_norm makes no difference. This holds for sites
    in the residual stream or added to it: all but "z".
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
        parts.append((logits.topk(count), logits.topk(count, largest=False)))
    (raised, up), (lowered, down) = ([torch.cat(part).cpu() for part in zip(*side)] for side in zip(*parts))
    return Ranked(up, raised), Ranked(down, lowered)


# ---- the page ----


def page(
    sae: BaseAutoencoder,
    tokenizer: PreTrainedTokenizerBase,
    dataset_path: str,
    tokens: Int[Tensor, "window pos"],
    statistics: LatentStatistics,
    effects: tuple[Ranked, Ranked] | None,
    neighbours: tuple[Int[Tensor, "dict_size count"], Float[Tensor, "dict_size count"]],
) -> str:
    """Put the data into the template: tokens as indices into one table of strings, each window once."""
    cfg, contexts, sides = sae.cfg, statistics.contexts, effects or ()
    dead = int((statistics.counts == 0).sum())
    windows = sorted({context.window for of_latent in contexts for context in of_latent})
    window_index = {window: i for i, window in enumerate(windows)}
    ids = torch.cat([tokens[windows].flatten(), *(side.tokens.flatten() for side in sides)]).unique()

    def indices(some: Int[Tensor, "..."]) -> list:
        return torch.searchsorted(ids, some).tolist()

    # Distinct tokens at the strongest windows' peaks, the most frequent first, then the strongest.
    peaks = ([int(tokens[c.window, c.peak]) for c in of_latent if c.band < 0] for of_latent in contexts)
    top = ([token for token, _ in Counter(of_latent).most_common(TABLE_TOKENS)] for of_latent in peaks)
    ranked = [(indices(side.tokens), four_digits(side.logits)) for side in sides]
    table = {
        "title": cfg.name,
        "facts": [
            ("Model", cfg.model_name),
            ("Hook", cfg.hook_name),
            ("SAE", f"{cfg.sae_type}, {setting(cfg)}"),
            ("Latents", f"{cfg.dict_size:,}, of which {dead:,} never fired here"),
            ("L0", f"{float(statistics.counts.sum()) / max(1, statistics.tokens):.1f}"),
            ("Text", f"the held-out tenth of {dataset_path}: {statistics.tokens:,} tokens in {len(tokens):,} windows"),
        ],
        "tokens": statistics.tokens,
        "levels": LEVELS,
        "bands": BANDS,
        "piece": LATENTS_PER_PIECE,
        "strings": token_strings(tokenizer, ids.tolist()),
        "ids": ids.tolist(),
        "counts": statistics.counts.tolist(),
        "maxima": four_digits(statistics.maxima),
        "means": four_digits(statistics.means),
        "top": [indices(torch.tensor(of_latent, dtype=torch.int64)) for of_latent in top],
        "promoted": ranked[0][0] if ranked else None,
        "shown": TABLE_TOKENS,
    }
    maxima, histograms = statistics.maxima.tolist(), statistics.histograms.tolist()
    nearest, cosines = (part.tolist() for part in neighbours)

    def data(j: int) -> dict[str, Any]:
        return {
            "histogram": histograms[j] if contexts[j] else [],
            "contexts": [written(context, window_index, maxima[j]) for context in contexts[j]],
            "nearest": [nearest[j], [round(cosine, 3) for cosine in cosines[j]]],
            "effects": [[tokens[j], logits[j]] for tokens, logits in ranked] or None,
        }

    before, between, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    parts = [before, script("table", table), between, script("windows", indices(tokens[windows]))]
    for number, piece in enumerate(torch.arange(cfg.dict_size).split(LATENTS_PER_PIECE)):
        parts.append(script(f"latents-{number}", [data(j) for j in piece.tolist()]))
    return "".join([*parts, after])


def written(context: Context, window_index: dict[int, int], maximum: float) -> list[int]:
    """Write a context as [window, peak, band, position, level, position, level, ...]."""
    levels = (max(1, round(LEVELS * value / maximum)) for value in context.values)
    fires = (number for pair in zip(context.positions, levels) for number in pair)
    return [window_index[context.window], context.peak, context.band, *fires]


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Find what each token adds to a text, with the leading space that some tokenizers drop from a single token."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prefix = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*before, i] for i in ids], clean_up_tokenization_spaces=False)
    return [text.removeprefix(prefix) for text in texts]


def four_digits(numbers: Float[Tensor, "..."]) -> list:
    """Make nested lists of numbers with four significant digits."""
    if numbers.ndim > 1:
        return [four_digits(row) for row in numbers]
    return [float(f"{number:.4g}") for number in numbers.tolist()]


def script(name: str, data: Any) -> str:
    """Write JSON that the HTML parser reads past: ASCII, and without the < that could close the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
