"""Choosing the latents that can fire, in one pass over the encoder product

    pre = x W_enc + b_enc     x = z - b_dec

a block of rows and latents at a time: on a CPU no [batch, dict_size] tensor is ever made. A choice is a Selection: the
(row, latent) pairs and the pre-activations there, without gradient (sparse.py sends that through them).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


class _Entries(NamedTuple):
    """Some pre-activations, with the row and the latent of each."""

    pre: Float[Tensor, "entries"]
    rows: Int[Tensor, "entries"]
    latents: Int[Tensor, "entries"]


def _chunks(
    x: Float[Tensor, "batch act_size"],
    W_enc: Float[Tensor, "act_size dict_size"],
    b_enc: Float[Tensor, "dict_size"] | None,
) -> Iterator[tuple[slice, slice, Float[Tensor, "rows latents"]]]:
    """Yield x W_enc + b_enc (or without it) in x's dtype, a block at a time, with its rows and latents."""
    batch, dict_size = len(x), W_enc.shape[1]
    if sparse.on_gpu(x):
        rows, latents = batch, min(dict_size, max(1024, GPU_CHUNK_ELEMENTS // batch))
    else:
        rows, latents = min(batch, CPU_CHUNK_ROWS), min(dict_size, CPU_CHUNK_LATENTS)
    buffer = x.new_empty(rows * latents)
    for r in range(0, batch, rows):
        x_r = x[r : r + rows]
        for l in range(0, dict_size, latents):
            block = slice(l, min(l + latents, dict_size))
            pre = buffer[: len(x_r) * (block.stop - l)].view(len(x_r), -1)
            W = W_enc[:, block].to(x.dtype)
            if b_enc is None:
                torch.mm(x_r, W, out=pre)
            else:
                torch.addmm(b_enc[block].to(x.dtype), x_r, W, out=pre)
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
        place = support.rows * width + torch.arange(len(pre)) - support.offsets[support.rows]
        padded = pre.new_full((len(x) * width,), -torch.inf).index_copy_(0, place, pre).view(-1, width)
        top = padded.topk(k, sorted=False)
        values = top.values
        indices = support.indices[(support.offsets[:-1, None] + top.indices).clamp_max(len(pre) - 1)]
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
    found: list[_Entries] = []
    count = 0
    for rows, block, pre in _chunks(x, W_enc, b_enc):
        if block.start == 0:
            maxima = pre[:, : first // GROUP * GROUP].unflatten(1, (GROUP, -1)).amax(dim=1)
            floor = maxima.topk(expected, sorted=False).values.amin(dim=1, keepdim=True)  # [rows, 1]
        found.append(_entries(pre, pre >= floor, rows, block))
        count += len(found[-1].pre)
        if count > MOST_CANDIDATES * k * len(x):  # latents are in an order: the first block is no sample
            return None
    return _by_row(found, len(x), dict_size) if count else None  # none where nothing is finite


def _topk_directly(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Take the k largest of each block, then of what these kept."""
    values, indices = [], []
    best: list[tuple[Tensor, Tensor]] = []
    for _, block, pre in _chunks(x, W_enc, b_enc):
        top = pre.topk(min(k, pre.shape[1]), sorted=False)
        best.append((top.values, top.indices + block.start))
        if block.stop == W_enc.shape[1]:
            candidates, latents = (torch.cat(c, dim=1) for c in zip(*best))
            top = candidates.topk(k, sorted=False)
            values.append(top.values)
            indices.append(latents.gather(1, top.indices))
            best.clear()
    return torch.cat(values), torch.cat(indices)


def _entries(
    pre: Float[Tensor, "rows latents"], mask: Bool[Tensor, "rows latents"], rows: slice, block: slice
) -> _Entries:
    """Collect the few entries of a block where the mask is true, row after row."""
    mask = mask.flatten()
    if len(mask) % 8:
        flat = mask.nonzero().squeeze(1)
    else:  # one look at eight bytes passes over them where all are 0
        eights = mask.view(torch.int64)
        hits = eights.nonzero().squeeze(1)
        hit, place = eights[hits].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
        flat = hits[hit] * 8 + place
    width = pre.shape[1]
    return _Entries(pre.flatten()[flat], flat // width + rows.start, flat % width + block.start)


def _by_row(found: list[_Entries], batch: int, dict_size: int) -> Selection:
    """Sort entries found block by block into rows."""
    values, rows, indices = (torch.cat(c) for c in zip(*found))
    rows, order = rows.sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device))
    return Selection(values[order], Support(indices[order], offsets, dict_size))


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
    _, block, product = next(_chunks(_sample(x), W_enc, None))
    if (product > cut[block]).float().mean() > max_density:
        return None
    found = [_entries(p, p > cut[block], rows, block) for rows, block, p in _chunks(x, W_enc, None)]
    product, support = _by_row(found, len(x), W_enc.shape[1])
    return Selection(product + b_enc[support.indices], support)


def rank_in_group(
    order: Int[Tensor, "nnz"], groups: Int[Tensor, "nnz"], starts: Int[Tensor, "groups"]
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Take entries group by group, each group's in the given order, and number every entry within its group.

    starts: how many entries earlier groups have.
    """
    groups, by_group = groups[order].sort(stable=True)
    return order[by_group], torch.arange(len(order), device=order.device) - starts[groups]


def at_most(selection: Selection, k: int) -> Selection:
    """Keep the k largest pre-activations of each row that has more."""
    pre, support = selection
    counts = support.offsets.diff()
    if counts.max() <= k:
        return selection
    order, rank = rank_in_group(pre.sort(descending=True).indices, support.rows, support.offsets)
    kept = order[rank < k]
    offsets = torch.cat([support.offsets[:1], counts.clamp_max(k).cumsum(0)])
    return Selection(pre[kept], Support(support.indices[kept], offsets, support.dict_size))


@torch.no_grad()
def batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, guess: Float[Tensor, ""]) -> Selection:
    """Choose the k * batch largest positive pre-activations of the whole batch; fewer where fewer are positive.

    `guess` is a number that the smallest of them probably exceeds. It decides the speed, never the result: candidates
    are the entries above it, and where these turn out too few it is lowered and the batch scanned again.
    """
    wanted = k * len(x)
    if sparse.on_gpu(x):
        return _batchtopk_on_gpu(x, W_enc, b_enc, wanted)
    floor = max(guess.item(), 0.0) or _smallest_kept_in_sample(x, W_enc, b_enc, k)
    while True:
        candidates = above(x, W_enc, b_enc, torch.full_like(b_enc, floor), max_density=1.0)
        if len(candidates.pre) >= wanted or floor == 0:
            break
        floor = floor / 2 if 1e-3 < floor < float("inf") else 0.0
    if len(candidates.pre) <= wanted:
        return candidates
    kept = candidates.pre.topk(wanted, sorted=False).indices.sort().values  # rows stay in order
    return _csr(candidates.pre[kept], candidates.support.rows[kept], candidates.support.indices[kept], len(x), b_enc)


def _sample(x: Float[Tensor, "batch act_size"]) -> Float[Tensor, "sample act_size"]:
    return x[:: max(1, len(x) // SAMPLE_ROWS)]


def _smallest_kept_in_sample(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> float:
    """Estimate, somewhat low, the smallest entry that a batch keeps, from a few of its rows."""
    sample = _sample(x)
    pre = torch.addmm(b_enc, sample.to(W_enc.dtype), W_enc)
    return max(0.0, 0.9 * pre.flatten().topk(k * len(sample)).values[-1].item())


def _batchtopk_on_gpu(x: Tensor, W_enc: Tensor, b_enc: Tensor, wanted: int) -> Selection:
    """Do the same without waiting for the device: exactly `wanted` entries, some perhaps not positive."""
    values = x.new_empty(0)
    keys = torch.empty(0, dtype=torch.int64, device=x.device)  # row * dict_size + latent
    for rows, block, pre in _chunks(x, W_enc, b_enc):
        top = pre.flatten().topk(min(wanted, pre.numel()), sorted=False)
        row, latent = top.indices // pre.shape[1], top.indices % pre.shape[1]
        values = torch.cat([values, top.values])
        keys = torch.cat([keys, (row + rows.start) * len(b_enc) + latent + block.start])
        if len(values) > wanted:
            values, kept = values.topk(wanted, sorted=False)
            keys = keys[kept]
    keys, order = keys.sort()
    return _csr(values[order], keys // len(b_enc), keys % len(b_enc), len(x), b_enc)


def _csr(pre: Tensor, rows: Tensor, indices: Tensor, batch: int, b_enc: Tensor) -> Selection:
    offsets = torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device))
    return Selection(pre, Support(indices, offsets, len(b_enc)))


def topk_mask(pre: Float[Tensor, "batch dict_size"], k: int) -> Tensor:
    """Mark the k largest of each row."""
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, dim=1, sorted=False).indices, True)
