"""Choosing the latents that can fire, in one pass over the encoder product

    pre = x W_enc + b_enc     x = z - b_dec

a block of rows and latents at a time: on a CPU no [batch, dict_size] tensor is ever made. A choice is a Selection: the
(row, latent) pairs and the pre-activations there, without gradient (sparse.py sends that through them).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import sparse
from kernels.sparse import Selection, Support

# A chunk of pre-activations that stays in a CPU's cache makes the product itself faster; a GPU wants few launches.
CPU_CHUNK_ROWS, CPU_CHUNK_LATENTS = 2048, 3072
MOST_CANDIDATES = 32  # for each of the k of a row, before choosing directly is faster
GROUP = 16  # pre-activations whose maximum is taken together
GPU_CHUNK_ELEMENTS = 1 << 27
MAX_DENSITY = 0.1  # share of latents above which a dense step is faster than a sparse one
SAMPLE_ROWS = 32  # that tell how dense a batch is


def _chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, bias: bool = True) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield x W_enc + b_enc, or without the bias, in x's dtype, a block at a time: its rows, its latents, its numbers.

    The next block is written over the last.
    """
    batch, dict_size = len(x), W_enc.shape[1]
    rows, latents = CPU_CHUNK_ROWS, CPU_CHUNK_LATENTS
    if sparse.on_gpu(x):
        rows, latents = batch, max(1024, GPU_CHUNK_ELEMENTS // batch)
    buffer = x.new_empty(min(rows, batch) * min(latents, dict_size))
    for r in range(0, batch, rows):
        x_r = x[r : r + rows]
        for l in range(0, dict_size, latents):
            block = slice(l, min(l + latents, dict_size))
            pre = buffer[: len(x_r) * (block.stop - l)].view(len(x_r), -1)
            torch.addmm(b_enc[block].to(x.dtype), x_r, W_enc[:, block].to(x.dtype), beta=float(bias), out=pre)
            yield slice(r, r + len(x_r)), block, pre


@torch.no_grad()
def topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Selection:
    """Choose the k largest pre-activations of each row: x [batch, act_size] (b_dec subtracted) -> nnz = batch * k.

    On a CPU a top-k of everything is slow. The maxima of small groups in the first block of latents tell a number that
    each row's k-th largest entry almost surely reaches; the top-k is then among the entries that do. The rows where
    too few do (they are counted) are chosen directly.
    """
    dict_size = W_enc.shape[1]
    candidates = None if sparse.on_gpu(x) else _candidates(x, W_enc, b_enc, k)
    if candidates is None:
        values, indices = _topk_directly(x, W_enc, b_enc, k)
    else:
        pre, support = candidates
        counts = support.offsets.diff()
        width = max(k, int(counts.max()))
        filled = torch.arange(width) < counts[:, None]
        padded = pre.new_full(filled.shape, -torch.inf).masked_scatter_(filled, pre)
        values, places = padded.topk(k, sorted=False)
        indices = support.indices[(support.offsets[:-1, None] + places).clamp_max(len(pre) - 1)]
        short = (counts < k).nonzero().squeeze(1)
        if len(short):
            values[short], indices[short] = _topk_directly(x[short], W_enc, b_enc, k)
    offsets = torch.arange(0, len(x) * k + 1, k, device=x.device)
    return Selection(values.flatten(), Support(indices.flatten(), offsets, dict_size))


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Selection | None:
    """Collect entries that hold the k largest of almost every row; None where there are none, or too many."""
    dict_size = W_enc.shape[1]
    first = min(dict_size, CPU_CHUNK_LATENTS)
    mean = k * first / dict_size  # entries of the top k in the first block, if latents are in no order
    expected = k if first == dict_size else min(k, math.ceil(mean + 4 * mean**0.5 + 3))  # rarely more
    if expected > first // GROUP * 3 // 4:
        return None
    found, count = [], 0
    for rows, block, pre in _chunks(x, W_enc, b_enc):
        if block.start == 0:
            maxima = pre[:, : first // GROUP * GROUP].unflatten(1, (GROUP, -1)).amax(dim=1)
            floor = maxima.topk(expected, sorted=False).values.amin(dim=1, keepdim=True)  # [rows, 1]
        found.append(_entries(pre, pre >= floor, rows, block))
        count += len(found[-1][0])
        if count > MOST_CANDIDATES * k * len(x):  # latents are in an order: the first block is no sample
            return None
    return _by_row(found, len(x), dict_size) if count else None  # none where nothing is finite


def _topk_directly(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k largest of each block, then of what these kept: values and latents, both [batch, k]."""
    values, indices, best = [], [], []
    for _, block, pre in _chunks(x, W_enc, b_enc):
        top, places = pre.topk(min(k, pre.shape[1]), sorted=False)
        best.append((top, places + block.start))
        if block.stop == W_enc.shape[1]:
            candidates, latents = (torch.cat(c, dim=1) for c in zip(*best))
            top, places = candidates.topk(k, sorted=False)
            values.append(top)
            indices.append(latents.gather(1, places))
            best.clear()
    return torch.cat(values), torch.cat(indices)


def _entries(pre: Tensor, mask: Tensor, rows: slice, block: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Collect the few entries of a block where the mask is true, row after row: pre-activations, rows and latents."""
    mask = mask.flatten()
    if len(mask) % 8:
        flat = mask.nonzero().squeeze(1)
    else:  # one look at eight bytes passes over them where all are 0
        eights = mask.view(torch.int64)
        hits = eights.nonzero().squeeze(1)
        hit, place = eights[hits].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
        flat = hits[hit] * 8 + place
    width = pre.shape[1]
    return pre.flatten()[flat], flat // width + rows.start, flat % width + block.start


def _by_row(found: list[tuple[Tensor, Tensor, Tensor]], batch: int, dict_size: int) -> Selection:
    """Sort entries found block by block into rows."""
    pre, rows, latents = (torch.cat(c) for c in zip(*found))
    rows, order = rows.sort(stable=True)
    return Selection(pre[order], Support.of(rows, latents[order], batch, dict_size))


@torch.no_grad()
def above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Float[Tensor, "dict_size"], max_density: float
) -> Selection | None:
    """Choose every pre-activation above its latent's floor, or None where dense products are the faster way.

    That is where more than `max_density` are, by a sample of rows in the first block of latents, and on a GPU always:
    how many are found is data there, which the host would have to wait for.
    """
    if sparse.on_gpu(x):
        return None
    cut = floor - b_enc  # so that the bias, a pass over every block, is added to the entries alone
    _, block, product = next(_chunks(x[:: max(1, len(x) // SAMPLE_ROWS)], W_enc, b_enc, bias=False))
    if (product > cut[block]).float().mean() > max_density:
        return None
    found = [_entries(p, p > cut[block], rows, block) for rows, block, p in _chunks(x, W_enc, b_enc, bias=False)]
    product, support = _by_row(found, len(x), W_enc.shape[1])
    return Selection(product + b_enc[support.indices], support)


def at_most(selection: Selection, k: int) -> Selection:
    """Keep the k largest pre-activations of each row that has more."""
    pre, support = selection
    if support.offsets.diff().max() <= k:
        return selection
    order = pre.sort(descending=True).indices
    rows, by_row = support.rows[order].sort(stable=True)  # each row's entries, the largest first
    rank = torch.arange(len(pre), device=pre.device) - support.offsets[rows]
    return _only(selection, order[by_row[rank < k]])


def _only(selection: Selection, kept: Int[Tensor, "kept"]) -> Selection:
    """Keep some entries, in the order of their rows."""
    pre, support = selection
    rows, indices = support.rows[kept], support.indices[kept]
    return Selection(pre[kept], Support.of(rows, indices, len(support.offsets) - 1, support.dict_size))


@torch.no_grad()
def batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, guess: Float[Tensor, ""]) -> Selection:
    """Choose the k * batch largest positive pre-activations of the whole batch; fewer where fewer are positive.

    `guess` is a number that the smallest of them probably exceeds. It decides the speed, never the result: candidates
    are the entries above it, and where these turn out too few it is lowered and the batch scanned again.
    """
    wanted = k * len(x)
    if sparse.on_gpu(x):
        return largest(x, W_enc, b_enc, wanted)
    floor = max(guess.item(), 0.0)
    if floor == 0:  # before the first guess: estimate it, somewhat low, from a few rows
        sample = x[:: max(1, len(x) // SAMPLE_ROWS)]
        pre = torch.addmm(b_enc, sample.to(W_enc.dtype), W_enc)
        floor = max(0.0, 0.9 * pre.flatten().topk(k * len(sample)).values[-1].item())
    for low in (floor, floor / 2, floor / 8, 0.0):
        candidates = above(x, W_enc, b_enc, torch.full_like(b_enc, low), max_density=1.0)
        if len(candidates.pre) >= wanted or low == 0:
            break
    if len(candidates.pre) <= wanted:
        return candidates
    return _only(candidates, candidates.pre.topk(wanted, sorted=False).indices.sort().values)  # rows stay in order


@torch.no_grad()
def largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, wanted: int) -> Selection:
    """Choose exactly the `wanted` largest entries, positive or not, without waiting for a GPU."""
    dict_size = len(b_enc)
    found = []
    for rows, block, pre in _chunks(x, W_enc, b_enc):
        values, top = pre.flatten().topk(min(wanted, pre.numel()), sorted=False)
        row, latent = top // pre.shape[1] + rows.start, top % pre.shape[1] + block.start
        found.append((values, row * dict_size + latent))
    values, keys = (torch.cat(c) for c in zip(*found))
    if len(found) > 1:
        values, kept = values.topk(wanted, sorted=False)
        keys = keys[kept]
    keys, order = keys.sort()
    return Selection(values[order], Support.of(keys // dict_size, keys % dict_size, len(x), dict_size))


def topk_mask(pre: Float[Tensor, "batch dict_size"], k: int) -> Tensor:
    """Mark the k largest of each row."""
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, dim=1, sorted=False).indices, True)
