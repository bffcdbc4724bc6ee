"""The sparse code: choose the latents that fire, decode them, and send gradients back through them alone.

    pre   = (x - b_dec) W_enc + b_enc          [B, F]   one dense product, a chunk of latents at a time
    S     = the support: the (row, latent) pairs that a type keeps; everything outside has zero derivative
    x_hat = sum over S of f_bj W_dec_j + b_dec [B, D]   a weighted bag of decoder rows

and, with g = d loss / d x_hat and h = d loss / d pre on S,

    d f_bj      = g_b . W_dec_j                         one dot product per entry
    d W_dec_j   = sum over b of f_bj g_b                a weighted bag of rows of g,          one bag per latent
    d W_enc_j   = sum over b of h_bj (x_b - b_dec)      a weighted bag of rows of x - b_dec,  one bag per latent
    d b_enc_j   = sum over b of h_bj
    d b_dec     = sum over b of g_b - W_enc d b_enc     no product of a batch: a matrix times a vector

No [B, F] tensor outlives a chunk. Axes: B batch, D act_size, F dict_size, nnz entries of the support.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# A chunk of pre-activations that stays in a CPU's cache makes the product itself faster; a GPU wants few launches.
CPU_CHUNK_ROWS, CPU_CHUNK_LATENTS = 2048, 3072
GROUP = 16  # pre-activations whose maximum is taken together
GPU_CHUNK_ELEMENTS = 1 << 27
MAX_DENSITY = 0.1  # share of latents above which a dense step is faster than a sparse one
SAMPLE_ROWS = 32  # that tell how dense a batch is
BAGGED_LATENTS = 1024  # whose gradient is made in a CPU's cache before it is copied into reused memory


@dataclass(frozen=True)
class Support:
    """Which latents each row keeps, row after row (compressed sparse rows without the values)."""

    indices: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "batch_plus_1"]
    dict_size: int

    @cached_property
    def rows(self) -> Int[Tensor, "nnz"]:
        """The row of every entry."""
        rows = torch.arange(len(self.offsets) - 1, device=self.indices.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "dict_size_plus_1"]]:
        """The transpose: the order that sorts entries by latent, their rows in it, and where each latent starts."""
        latents, order = self.indices.sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.dict_size + 1, device=latents.device))
        return order, self.rows[order], starts


class SparseLatents:
    """A batch of latent activations, sparse: row b holds entries offsets[b] to offsets[b + 1].

    values [nnz] may hold zeros (a kept latent that did not fire); indices [nnz] are latents; offsets [batch + 1].
    Gradients flow through `values` and `to_dense()`.
    """

    def __init__(self, values: Float[Tensor, "nnz"], support: Support) -> None:
        self.values, self.support = values, support

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "batch dict_size"]) -> "SparseLatents":
        rows, indices = dense.nonzero(as_tuple=True)
        offsets = torch.searchsorted(rows, torch.arange(len(dense) + 1, device=dense.device))
        return cls(dense[rows, indices], Support(indices, offsets, dense.shape[1]))

    @property
    def indices(self) -> Int[Tensor, "nnz"]:
        return self.support.indices

    @property
    def offsets(self) -> Int[Tensor, "batch_plus_1"]:
        return self.support.offsets

    def to_dense(self) -> Float[Tensor, "batch dict_size"]:
        batch, dict_size = len(self.offsets) - 1, self.support.dict_size
        dense = self.values.new_zeros(batch * dict_size)
        return dense.index_add(0, self.support.rows * dict_size + self.indices, self.values).view(batch, dict_size)


class Selection(NamedTuple):
    """A support and the pre-activations on it, without gradient."""

    pre: Float[Tensor, "nnz"]
    support: Support


# ---- choosing: one pass over the encoder product ----


def _chunks(
    x: Float[Tensor, "batch act_size"], W_enc: Float[Tensor, "act_size dict_size"], b_enc: Float[Tensor, "dict_size"]
) -> Iterator[tuple[slice, slice, Float[Tensor, "rows latents"]]]:
    """Pre-activations x W_enc + b_enc in x's dtype, a block at a time, with its rows and latents, in one buffer."""
    batch, dict_size = len(x), W_enc.shape[1]
    if x.is_cuda:
        rows, latents = batch, min(dict_size, max(1024, GPU_CHUNK_ELEMENTS // batch))
    else:
        rows, latents = min(batch, CPU_CHUNK_ROWS), min(dict_size, CPU_CHUNK_LATENTS)
    buffer = x.new_empty(rows * latents)
    for r in range(0, batch, rows):
        x_r = x[r : r + rows]
        for l in range(0, dict_size, latents):
            block = slice(l, min(l + latents, dict_size))
            pre = buffer[: len(x_r) * (block.stop - l)].view(len(x_r), -1)
            torch.addmm(b_enc[block].to(x.dtype), x_r, W_enc[:, block].to(x.dtype), out=pre)
            yield slice(r, r + len(x_r)), block, pre


@torch.no_grad()
def select_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Selection:
    """The k largest pre-activations of each row: x [batch, act_size] (b_dec subtracted) -> nnz = batch * k.

    On a CPU a top-k of everything is slow. The maxima of small groups in the first block of latents tell a number that
    each row's k-th largest entry almost surely reaches; the top-k is then among the entries that do. The rows where
    too few do (they are counted) are chosen directly.
    """
    dict_size = W_enc.shape[1]
    first = min(dict_size, CPU_CHUNK_LATENTS)
    mean = k * first / dict_size  # entries of the top k in the first block, if latents are in no order
    expected = k if first == dict_size else min(k, math.ceil(mean + 4 * mean**0.5 + 3))  # rarely more
    if x.is_cuda or expected > first // GROUP * 3 // 4:
        values, indices = _select_topk_directly(x, W_enc, b_enc, k)
    else:
        found: list[_Entries] = []
        for rows, block, pre in _chunks(x, W_enc, b_enc):
            if block.start == 0:
                maxima = pre[:, : first // GROUP * GROUP].unflatten(1, (GROUP, -1)).amax(dim=1)
                floor = maxima.topk(expected, sorted=False).values.amin(dim=1, keepdim=True)  # [rows, 1]
            found.append(_entries(pre, pre >= floor, rows, block))
        pre, support = _by_row(found, len(x), dict_size)
        counts = support.offsets.diff()
        width = max(k, int(counts.max()))
        place = support.rows * width + torch.arange(len(pre)) - support.offsets[support.rows]
        padded = pre.new_full((len(x) * width,), -torch.inf).index_copy_(0, place, pre).view(-1, width)
        top = padded.topk(k, sorted=False)
        values = top.values
        indices = support.indices[(support.offsets[:-1, None] + top.indices).clamp_max(len(pre) - 1)]
        short = (counts < k).nonzero().squeeze(1)
        if len(short):
            values[short], indices[short] = _select_topk_directly(x[short], W_enc, b_enc, k)
    offsets = torch.arange(0, len(x) * k + 1, k, device=x.device)
    return Selection(values.flatten(), Support(indices.flatten(), offsets, dict_size))


def _select_topk_directly(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """By a top-k of each block, then one of what these kept."""
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


class _Entries(NamedTuple):
    """Some pre-activations, with the row and the latent of each."""

    pre: Float[Tensor, "entries"]
    rows: Int[Tensor, "entries"]
    latents: Int[Tensor, "entries"]


def _entries(
    pre: Float[Tensor, "rows latents"], mask: Bool[Tensor, "rows latents"], rows: slice, block: slice
) -> _Entries:
    """The few entries of a block where the mask is true, row after row."""
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
    """Entries found block by block, row after row."""
    values, rows, indices = (torch.cat(c) for c in zip(*found))
    rows, order = rows.sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device))
    return Selection(values[order], Support(indices[order], offsets, dict_size))


@torch.no_grad()
def select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Float[Tensor, "dict_size"], max_density: float
) -> Selection | None:
    """Every pre-activation above its latent's floor, or None where dense products are the faster way.

    That is where more than `max_density` are, by a sample of rows in the first block of latents, and on a GPU always:
    how many are found is data there, which the host would have to wait for.
    """
    if x.is_cuda:
        return None
    _, block, pre = next(_chunks(_sample(x), W_enc, b_enc))
    if (pre > floor[block]).float().mean() > max_density:
        return None
    found = [_entries(pre, pre > floor[block], rows, block) for rows, block, pre in _chunks(x, W_enc, b_enc)]
    return _by_row(found, len(x), W_enc.shape[1])


def at_most(selection: Selection, k: int) -> Selection:
    """The k largest pre-activations of each row's, where it has more."""
    pre, support = selection
    counts = support.offsets.diff()
    if counts.max() <= k:
        return selection
    order = pre.sort(descending=True).indices
    order = order[support.rows[order].sort(stable=True).indices]  # row after row, the largest first
    rank = torch.arange(len(pre), device=pre.device) - support.offsets[support.rows]
    kept = order[rank < k]
    offsets = torch.cat([support.offsets[:1], counts.clamp_max(k).cumsum(0)])
    return Selection(pre[kept], Support(support.indices[kept], offsets, support.dict_size))


@torch.no_grad()
def select_batchtopk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, guess: Float[Tensor, ""]) -> Selection:
    """The k * batch largest positive pre-activations of the whole batch; fewer where fewer are positive.

    `guess` is a number that the smallest of them probably exceeds. It decides the speed, never the result: candidates
    are the entries above it, and where these turn out too few it is lowered and the batch scanned again.
    """
    wanted = k * len(x)
    if x.is_cuda:
        return _select_batchtopk_cuda(x, W_enc, b_enc, wanted)
    floor = max(guess.item(), 0.0) or _smallest_kept_in_sample(x, W_enc, b_enc, k)
    while True:
        candidates = select_above(x, W_enc, b_enc, torch.full_like(b_enc, floor), max_density=1.0)
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
    """What the k-th largest entry per row, on average, is for a few rows; somewhat less, for a guess."""
    sample = _sample(x)
    pre = torch.addmm(b_enc, sample.to(W_enc.dtype), W_enc)
    return max(0.0, 0.9 * pre.flatten().topk(k * len(sample)).values[-1].item())


def _select_batchtopk_cuda(x: Tensor, W_enc: Tensor, b_enc: Tensor, wanted: int) -> Selection:
    """The same without waiting for the device: exactly `wanted` entries, of which the non-positive ones do not fire."""
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


# ---- gradients ----


class _PreActivations(torch.autograd.Function):
    """The chosen pre-activations as a function of x, W_enc, b_enc and b_dec; their values are computed already."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, centred: Tensor,
        selection: Selection, memory: Tensor | None,
    ) -> Float[Tensor, "nnz"]:  # fmt: skip
        ctx.save_for_backward(centred, W_enc)
        ctx.support, ctx.memory = selection.support, memory
        return selection.pre.to(W_enc.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "nnz"]) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad.contiguous()
        d_W_enc = _bags_by_latent(grad, support, centred, ctx.memory).t()
        d_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, support.indices, grad)
        d_b_dec = -(W_enc @ d_b_enc)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _bags_by_row(grad, support, W_enc.t())
        return d_x, d_W_enc, d_b_enc, d_b_dec, None, None, None


class _Decode(torch.autograd.Function):
    """Bags of decoder rows, weighted by the latents."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, values: Tensor, W_dec: Tensor, support: Support, memory: Tensor | None
    ) -> Float[Tensor, "batch act_size"]:
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.memory = support, memory
        return _bags_by_row(values, support, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "batch act_size"]) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad.contiguous()
        d_values = _dots(grad, W_dec, support) if ctx.needs_input_grad[0] else None
        d_W_dec = _bags_by_latent(values, support, grad, ctx.memory) if ctx.needs_input_grad[1] else None
        return d_values, d_W_dec, None, None


def pre_activations(
    x: Float[Tensor, "batch act_size"],
    W_enc: Float[Tensor, "act_size dict_size"],
    b_enc: Float[Tensor, "dict_size"],
    b_dec: Float[Tensor, "act_size"],
    centred: Float[Tensor, "batch act_size"],
    selection: Selection,
    memory: Float[Tensor, "dict_size act_size"] | None = None,
) -> Float[Tensor, "nnz"]:
    """The pre-activations of a selection from `centred` = x - b_dec, with gradients to the first four arguments.

    W_enc's gradient is written over `memory`, if given: the last gradient made there must be done with.
    """
    return _PreActivations.apply(x, W_enc, b_enc, b_dec, centred, selection, memory)


def decode(
    values: Float[Tensor, "nnz"],
    support: Support,
    W_dec: Float[Tensor, "dict_size act_size"],
    memory: Float[Tensor, "dict_size act_size"] | None = None,
) -> Float[Tensor, "batch act_size"]:
    """Sum of decoder rows weighted by the latents, without b_dec, with gradients to values and W_dec.

    W_dec's gradient is written over `memory`, if given: the last gradient made there must be done with.
    """
    return _Decode.apply(values, W_dec, support, memory)


class _SplitRows(torch.autograd.Function):
    """A matrix, and some rows of it. The rows' gradient is added to the matrix's in place, not as a second matrix."""

    @staticmethod
    def forward(ctx: FunctionCtx, matrix: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        ctx.chosen = chosen
        return matrix.view_as(matrix), matrix[chosen]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_matrix: Tensor, d_rows: Tensor) -> tuple[Tensor, None]:
        return d_matrix.index_add_(0, ctx.chosen, d_rows), None


def split_rows(
    matrix: Float[Tensor, "dict_size act_size"], chosen: Int[Tensor, "chosen"]
) -> tuple[Float[Tensor, "dict_size act_size"], Float[Tensor, "chosen act_size"]]:
    """The matrix, for `pre_activations` or `decode` alone, and its chosen rows, for anything."""
    return _SplitRows.apply(matrix, chosen)


class _WithRowNorms(torch.autograd.Function):
    """A matrix, and the norms of its rows, whose gradient is added to the matrix's in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, matrix: Tensor) -> tuple[Tensor, Tensor]:
        norms = matrix.norm(dim=1)
        ctx.save_for_backward(matrix, norms)
        return matrix.view_as(matrix), norms

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_matrix: Tensor, d_norms: Tensor) -> Tensor:
        matrix, norms = ctx.saved_tensors
        return d_matrix.addcmul_(matrix, (d_norms / norms).unsqueeze(1))


def with_row_norms(
    matrix: Float[Tensor, "dict_size act_size"],
) -> tuple[Float[Tensor, "dict_size act_size"], Float[Tensor, "dict_size"]]:
    """The matrix, for `decode` alone, and the Euclidean norms of its rows, none of which may be 0."""
    return _WithRowNorms.apply(matrix)


def _bags_by_row(weights: Tensor, support: Support, matrix: Float[Tensor, "dict_size act_size"]) -> Tensor:
    """Row b: sum over its entries of weight * matrix[latent]."""
    return embedding_bag(
        support.indices, matrix, support.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _bags_by_latent(
    weights: Tensor, support: Support, matrix: Float[Tensor, "batch act_size"], memory: Tensor | None
) -> Float[Tensor, "dict_size act_size"]:
    """Row j: sum over the entries of latent j of weight * matrix[row]. In `memory`, if given."""
    order, rows, starts = support.by_latent
    weights = weights[order]

    def bags(entries: slice, starts: Tensor) -> Tensor:
        return embedding_bag(
            rows[entries], matrix, starts, mode="sum", per_sample_weights=weights[entries], include_last_offset=True
        )

    if memory is None:
        return bags(slice(None), starts)
    for latent, block in zip(range(0, len(memory), BAGGED_LATENTS), memory.split(BAGGED_LATENTS)):
        edges = starts[latent : latent + len(block) + 1]
        first, last = int(edges[0]), int(edges[-1])
        block.copy_(bags(slice(first, last), edges - first))
    return memory.detach()  # a tensor of its own, which autograd makes the parameter's gradient without a copy


def _dots(
    rows: Float[Tensor, "batch act_size"], matrix: Float[Tensor, "dict_size act_size"], support: Support
) -> Tensor:
    """For every entry: rows[row] . matrix[latent]."""
    pattern = torch.sparse_csr_tensor(
        support.offsets,
        support.indices,
        rows.new_zeros(len(support.indices)),
        size=(len(rows), len(matrix)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, rows, matrix.t(), beta=0.0).values()


# ---- the same choice on dense pre-activations ----


def topk_mask(pre: Float[Tensor, "batch dict_size"], k: int) -> Tensor:
    """True at the k largest of each row."""
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, dim=1, sorted=False).indices, True)
