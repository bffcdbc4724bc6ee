"""Look at a dictionary's latents: how often they fire, how near to each other they are, and which come back."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from checkpoint import load_checkpoint
from evaluation import batches, check_tokens
from language_model import Model, ordinary_positions, record, side_by_side
from runtime.checks import require
from sae import BaseAutoencoder

COMPARED = 1 << 26  # cosines at a time: 256 MB


@torch.no_grad()
def feature_density(
    sae: BaseAutoencoder, model: Model, tokens: Int[Tensor, "window pos"]
) -> Float[Tensor, "dict_size"]:
    """Find the share of ordinary positions at which each latent fires, in evaluation; the shares sum to L0.

    Raises: ValueError when the tokens do not fit the model or are special ones only.
    """
    check_tokens(model, tokens)
    device, hooks = sae.W_dec.device, sae.cfg.reads
    fired, positions = torch.zeros(sae.cfg.dict_size, dtype=torch.int64, device=device), 0
    for batch in batches(tokens.to(model.cfg.device), sae.cfg.dict_size):
        ordinary = ordinary_positions(batch, model.tokenizer)
        if ordinary.any():
            x = side_by_side(record(model, batch, hooks), hooks)[ordinary]
            fired += (sae.encode(x.to(device)) > 0).sum(dim=0)
            positions += int(ordinary.sum())
    require(positions, f"tokens = {list(tokens.shape)}: special ones only; give text")
    return fired / positions


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
