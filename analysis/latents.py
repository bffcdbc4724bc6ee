"""Look at a dictionary's latents: how often they fire, how near to each other they are, and which come back."""

import reprlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from checkpoint import load_checkpoint
from evaluation import batches, check_tokens
from language_model import Model, ordinary_positions, record, side_by_side
from runtime.checks import require
from sae import BaseAutoencoder

COMPARED = 1 << 26  # cosines at a time: 256 MB
BEFORE, AFTER = 12, 4  # tokens of a context, around the one on which a latent fires
LEAST_DENSITY = 1e-6  # of a latent that never fired


def _encoded(
    sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"]
) -> Iterator[tuple[Int[Tensor, "window pos"], Bool[Tensor, "window pos"], Float[Tensor, "position dict_size"]]]:
    """Yield some windows at a time, their ordinary positions, and the latents there as in evaluation.

    Raises: ValueError when the tokens do not fit the model or are special ones only.
    """
    check_tokens(model, tokens)
    require(ordinary_positions(tokens, model.tokenizer).any(), f"tokens = {list(tokens.shape)}: special ones only")
    hooks = sae.cfg.reads
    for batch in batches(tokens.to(model.cfg.device), sae.cfg.dict_size):
        ordinary = ordinary_positions(batch, model.tokenizer)
        x = side_by_side(record(model, batch, hooks), hooks)[ordinary]
        yield batch, ordinary, sae.encode(x.to(sae.W_dec.device)) if len(x) else x.new_zeros(0, sae.cfg.dict_size)


@torch.no_grad()
def feature_density(
    sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"]
) -> Float[Tensor, "dict_size"]:
    """Find the share of ordinary positions at which each latent fires, in evaluation; the shares sum to L0.

    Raises: ValueError when the tokens do not fit the model or are special ones only.
    """
    fired, positions = torch.zeros(sae.cfg.dict_size, dtype=torch.int64, device=sae.W_dec.device), 0
    for *_, latents in _encoded(sae, model, tokens):
        fired += (latents > 0).sum(dim=0)
        positions += len(latents)
    return fired / positions


@torch.no_grad()
def top_contexts(
    sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"], latents: Sequence[int], count: int = 10
) -> DataFrame:
    """Find where latents fire most on a text: a row for each place, up to `count` of each latent, the strongest first.

    Columns: latent, activation, window, position, token, and context, the text around it with the token in brackets.
    Raises: ValueError when a latent is none or the tokens do not fit the model.
    """
    latents = checked_latents(sae, latents)
    acts = torch.zeros(*tokens.shape, len(latents))
    done = 0
    for _, ordinary, encoded in _encoded(sae, model, tokens):
        acts[done : done + len(ordinary)][ordinary.cpu()] = encoded[:, latents].cpu()
        done += len(ordinary)
    rows = []
    for latent, values in zip(latents, acts.flatten(0, 1).T):
        for place in values.topk(min(count, len(values))).indices.tolist():
            if values[place] > 0:
                window, position = divmod(place, tokens.shape[1])
                context = _around(model, tokens[window], position)
                token = model.to_string(tokens[window, position : position + 1])
                rows.append((latent, float(values[place]), window, position, token, context))
    return DataFrame(rows, columns=["latent", "activation", "window", "position", "token", "context"])


def _around(model: Model, tokens: Int[Tensor, "pos"], position: int) -> str:
    """Write the text around a position, with its token in brackets."""
    edges = max(1, position - BEFORE), position, position + 1, position + 1 + AFTER
    parts = [tokens[start:stop] for start, stop in pairwise(edges)]
    before, here, after = (model.to_string(part) if len(part) else "" for part in parts)
    return f"{before}[{here}]{after}"


def checked_latents(sae: BaseAutoencoder, latents: Sequence[int]) -> list[int]:
    """Return the numbers of latents as a list. Raises ValueError when they are none, or there is no such latent."""
    numbers, last = np.asarray(latents), sae.cfg.dict_size - 1
    one_each = numbers.ndim == 1 and numbers.dtype.kind in "iu"
    require(one_each, f"latents = {reprlib.repr(latents)}: give a list of numbers, or a column such as table['latent']")
    wrong = numbers[(numbers < 0) | (numbers > last)].tolist()
    require(not wrong, f"latents = {wrong[:1]}: there is none; give numbers from 0 to {last}")
    return numbers.tolist()


@torch.no_grad()
def find_latents(
    sae: BaseAutoencoder,
    model: Model,
    text: str | Int[Tensor, "window pos"],
    density: Float[Tensor, "dict_size"],
    count: int = 20,
) -> DataFrame:
    """Find the latents that fire on a text and seldom elsewhere, the most telling first.

    density: how often each fires on any text, from `feature_density`. Columns: latent; activation, its largest; token,
    where that is; share, of the text's tokens on which it fires; density; and nats, share * ln(share / density), what
    the text says of the latent, by which they are ordered. Raises: ValueError when the tokens do not fit the model, or
    density the SAE.
    """
    tokens = model.to_tokens(text, prepend_bos=True) if isinstance(text, str) else text
    density = torch.as_tensor(density, dtype=torch.float64, device="cpu")
    one_each = f"density = {list(density.shape)}: give one of each of the {sae.cfg.dict_size} latents"
    require(density.shape == (sae.cfg.dict_size,), one_each)
    found = [(batch[ordinary].cpu(), acts.cpu()) for batch, ordinary, acts in _encoded(sae, model, tokens)]
    ids, acts = (torch.cat(parts) for parts in zip(*found))
    share = (acts > 0).double().mean(dim=0)
    nats = share * (share / density.clamp_min(LEAST_DENSITY)).log()
    nats[share == 0] = -torch.inf
    strongest, places = acts.max(dim=0)
    latents = nats.topk(min(count, int((share > 0).sum()))).indices
    columns = {
        "latent": latents, "activation": strongest[latents],
        "token": [model.to_string(ids[place : place + 1]) for place in places[latents].tolist()],
        "share": share[latents], "density": density[latents], "nats": nats[latents],
    }  # fmt: skip
    return DataFrame(columns)


@torch.no_grad()
def nearest_latents(
    W_dec: Float[Tensor, "dict_size act_size"], latents: Int[Tensor, "latents"], count: int
) -> tuple[Int[Tensor, "latents count"], Float[Tensor, "latents count"]]:
    """Find the `count` latents whose decoder rows have the largest cosines with those of `latents`, and the cosines.

    A latent is not its own neighbour; where there are no more than `count` others, all of them.
    """
    rows = F.normalize(W_dec, dim=1)  # a row of zeros, which other libraries' SAEs may have, stays one
    found = []
    for some in latents.split(max(1, COMPARED // len(rows))):
        cosines = rows[some] @ rows.t()
        cosines[torch.arange(len(some)), some] = -torch.inf
        found.append(cosines.topk(min(count, len(rows) - 1)))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


@torch.no_grad()
def match(a: BaseAutoencoder, b: BaseAutoencoder) -> DataFrame:
    """Find the latent of b nearest to each latent of a, by the cosine of their decoder rows.

    Columns: latent, nearest, cosine. `matched_cosines` matches them one to one. Dictionaries of one seed and size begin
    with the same weights, which short training leaves alike: to see what both have found, give them different seeds.
    Raises: ValueError when they write activations of different widths.
    """
    wide = f"b: writes {b.cfg.d_out} activations, and a {a.cfg.d_out}; give dictionaries of one hook"
    require(a.cfg.d_out == b.cfg.d_out, wide)
    theirs, found = F.normalize(b.W_dec, dim=1), []
    for rows in F.normalize(a.W_dec, dim=1).split(max(1, COMPARED // len(theirs))):
        found.append((rows @ theirs.t()).max(dim=1))
    columns = {name: torch.cat(parts).cpu() for name, parts in zip(("cosine", "nearest"), zip(*found))}
    return DataFrame({"latent": range(len(a.W_dec)), "nearest": columns["nearest"], "cosine": columns["cosine"]})


@torch.no_grad()
def nearest_cosines(W_dec: Float[Tensor, "dict_size act_size"], at_most: int = 4096) -> Float[Tensor, "latents"]:
    """Compute the cosine of decoder rows with the row nearest to each, for `at_most` rows, evenly spaced."""
    spaced = torch.linspace(0, len(W_dec) - 1, min(at_most, len(W_dec)), dtype=torch.float64, device=W_dec.device)
    return nearest_latents(W_dec, spaced.round().long(), 1)[1].flatten()


def of_checkpoint(path: str) -> tuple[Float[np.ndarray, "latents"], Float[np.ndarray, "dict_size layers"] | None]:
    """Compute the nearest cosines of a saved dictionary and, if it is a crosscoder, its norms by layer.

    Raises ValueError when it is damaged.
    """
    sae = load_checkpoint(path)
    norms = norms_by_layer(sae).numpy() if len(sae.cfg.layers) > 1 else None
    return nearest_cosines(sae.W_dec).numpy(), norms


@torch.no_grad()
def norms_by_layer(sae: BaseAutoencoder) -> Float[Tensor, "dict_size layers"]:
    """Compute the norm of each latent's decoder row at each layer of a crosscoder; over all layers it is 1."""
    return sae.W_dec.unflatten(1, (len(sae.cfg.layers), -1)).norm(dim=2)


@torch.no_grad()
def encoder_alignment(sae: BaseAutoencoder) -> Float[Tensor, "dict_size"]:
    """Compute the cosine of each latent's encoder direction with its decoder row, which are as wide in an SAE."""
    return torch.cosine_similarity(sae.W_enc.t(), sae.W_dec)


@torch.no_grad()
def matched_cosines(
    W_dec: Float[Tensor, "dict_size act_size"], other: Float[Tensor, "other_size act_size"]
) -> Float[Tensor, "matched"]:
    """Match the decoder rows of two dictionaries one to one, with the largest sum of cosines; return the cosines.

    Their mean is how far one dictionary comes back in the other, such as one of another seed (Paulo and Belrose 2025,
    arXiv:2501.16615). Takes time that grows with the cube of the size: seconds for 2,048 latents.
    """
    cosines = (F.normalize(W_dec, dim=1) @ F.normalize(other, dim=1).t()).cpu()
    return cosines[linear_sum_assignment(cosines.numpy(), maximize=True)]
