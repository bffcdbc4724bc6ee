"""The sparse code: decode the latents that were chosen (choose.py), and send gradients back through them alone.

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

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

BAGGED_LATENTS = 1024  # whose gradient is made in a CPU's cache before it is copied into reused memory


@dataclass(frozen=True)
class Support:
    """Hold which latents each row keeps, row after row (compressed sparse rows without the values)."""

    indices: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "batch_plus_1"]
    dict_size: int

    @classmethod
    def of(cls, rows: Int[Tensor, "nnz"], indices: Int[Tensor, "nnz"], batch: int, dict_size: int) -> "Support":
        """Make the support of entries that are in the order of their rows."""
        return cls(indices, starts_of(rows, batch), dict_size)

    @cached_property
    def rows(self) -> Int[Tensor, "nnz"]:
        """The row of every entry."""
        rows = torch.arange(len(self.offsets) - 1, device=self.indices.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "dict_size_plus_1"]]:
        """Transpose: the order that sorts entries by latent, their rows in it, and where each latent starts."""
        latents, order = self.indices.sort(stable=True)
        return order, self.rows[order], starts_of(latents, self.dict_size)


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The latents of a batch, as the forward pass had them.

    With a support, pre and acts are [nnz], one entry for each latent that a row keeps; entries may be zero. Without
    one, where so many latents fire that dense products are faster, they are [batch, dict_size]. In either case
    values [nnz], indices [nnz] and offsets [batch + 1] are compressed sparse rows: row b holds entries offsets[b] to
    offsets[b + 1].
    Gradients flow through acts, values and to_dense().
    """

    pre: Float[Tensor, "*entries"]
    acts: Float[Tensor, "*entries"]
    support: Support | None
    y_hats: Float[Tensor, "nested batch d_out"] | None = None
    """What they decode to, in the normalised space: nested reconstructions, the output last."""

    @cached_property
    def _rows(self) -> tuple[Float[Tensor, "nnz"], Support]:
        if self.support is not None:
            return self.acts, self.support
        rows, indices = self.acts.nonzero(as_tuple=True)
        return self.acts[rows, indices], Support.of(rows, indices, *self.acts.shape)

    @property
    def values(self) -> Float[Tensor, "nnz"]:
        return self._rows[0]

    @property
    def indices(self) -> Int[Tensor, "nnz"]:
        return self._rows[1].indices

    @property
    def offsets(self) -> Int[Tensor, "batch_plus_1"]:
        return self._rows[1].offsets

    @property
    def rows(self) -> Int[Tensor, "nnz"]:
        """The row of every entry."""
        return self._rows[1].rows

    def __repr__(self) -> str:
        l0 = float((self.values > 0).sum()) / len(self)
        return f"SparseLatents({len(self)} rows, L0 {l0:.1f}; values, indices, offsets, to_dense())"

    def __len__(self) -> int:
        return len(self.acts) if self.support is None else len(self.support.offsets) - 1

    def to_dense(self) -> Float[Tensor, "batch dict_size"]:
        if self.support is None:
            return self.acts
        zeros = self.acts.new_zeros(len(self), self.support.dict_size)
        return zeros.index_put_((self.rows, self.indices), self.acts)

    def beside(self, per_latent: Float[Tensor, "dict_size"]) -> Float[Tensor, "*entries"]:
        """Lay each latent's number beside its entries: [nnz], or [dict_size] to be broadcast over dense rows."""
        return per_latent if self.support is None else per_latent.index_select(0, self.support.indices)

    def fired(self) -> Bool[Tensor, "dict_size"]:
        """Mark the latents that are above 0 anywhere in the batch."""
        if self.support is None:
            return (self.acts > 0).any(dim=0)
        counts = self.acts.new_zeros(self.support.dict_size, dtype=torch.float32)
        return counts.index_add_(0, self.support.indices, (self.acts > 0).float()) > 0

    def split(self, widths: Int[Tensor, "parts"]) -> tuple[Float[Tensor, "nnz"], Support]:
        """Divide the latents at `widths`: row p * batch + b of the result holds those of row b in part p.

        Part 0 has the latents below widths[0], part 1 the further ones below widths[1], and so on.
        """
        part, order = torch.bucketize(self.indices, widths, right=True).sort(stable=True)
        rows, batch = part * len(self) + self.rows[order], len(widths) * len(self)
        return self.acts[order], Support.of(rows, self.indices[order], batch, self.support.dict_size)


class Selection(NamedTuple):
    """A support and the pre-activations on it, without gradient."""

    pre: Float[Tensor, "nnz"]
    support: Support


def starts_of(sorted_groups: Int[Tensor, "nnz"], count: int) -> Int[Tensor, "count_plus_1"]:
    """Find where each of `count` groups starts among entries that are sorted by group, and where the last one ends."""
    return torch.searchsorted(sorted_groups, torch.arange(count + 1, device=sorted_groups.device))


def on_gpu(tensor: Tensor) -> bool:
    """Say whether to go the GPU's way: few large launches, and no look at data that the host would have to wait for.

    The one place that decides it; tests force either way on any device.
    """
    return tensor.is_cuda


class GradientMemory:
    """Lend the memory in which a weight's last gradient was made, once until it is free again.

    Fresh memory of a weight's size costs a CPU more, in page faults, than the gradient itself.
    """

    def __init__(self, **matrices: Float[Tensor, "dict_size _width"]) -> None:
        self._all = matrices
        self.free()

    def free(self) -> None:
        """Take back all memory: the gradients made in it are done with."""
        self._free = dict(self._all)

    def take(self, name: str) -> Tensor | None:
        """Lend the memory of a weight; None when it is lent already, or there is none."""
        return self._free.pop(name, None)


# ---- gradients ----


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, centred: Tensor,
        selection: Selection, memory: GradientMemory,
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
        d_W_enc = _bags_by_latent(grad, support, centred, ctx.memory.take("W_enc")).t()
        d_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, support.indices, grad)
        d_x = _bags(grad, support.indices, support.offsets, W_enc.t()) if ctx.needs_input_grad[0] else None
        d_b_dec = -(W_enc @ d_b_enc) if ctx.needs_input_grad[3] else None
        return d_x, d_W_enc, d_b_enc, d_b_dec, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, W_dec: Tensor, support: Support, memory: GradientMemory) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.memory = support, memory
        return _bags(values, support.indices, support.offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "batch act_size"]) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        d_W_dec = _bags_by_latent(values, ctx.support, grad, ctx.memory.take("W_dec"))
        return _dots(grad, W_dec, ctx.support), d_W_dec, None, None


def pre_activations(
    x: Float[Tensor, "batch act_size"],
    W_enc: Float[Tensor, "act_size dict_size"],
    b_enc: Float[Tensor, "dict_size"],
    b_dec: Float[Tensor, "act_size"] | None,
    centred: Float[Tensor, "batch act_size"],
    selection: Selection,
    memory: GradientMemory | None = None,
) -> Float[Tensor, "nnz"]:
    """Let gradients flow from a selection, made of `centred` = x - b_dec or x, to the first four arguments."""
    return _PreActivations.apply(x, W_enc, b_enc, b_dec, centred, selection, memory or GradientMemory())


def decode(
    values: Float[Tensor, "nnz"],
    support: Support,
    W_dec: Float[Tensor, "dict_size act_size"],
    memory: GradientMemory | None = None,
) -> Float[Tensor, "batch act_size"]:
    """Sum the decoder rows of each row's latents, weighted by them, without b_dec; gradients go to values and W_dec."""
    return _Decode.apply(values, W_dec, support, memory or GradientMemory())


class _SplitRows(torch.autograd.Function):
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
    """Return the matrix, to be used by `pre_activations` or `decode` alone, and its chosen rows, for any use.

    The rows' gradient is added in place to the matrix's, which those two made: there is no second matrix.
    """
    return _SplitRows.apply(matrix, chosen)


def _bags(weights: Tensor, indices: Tensor, offsets: Tensor, matrix: Tensor) -> Float[Tensor, "bags act_size"]:
    """Sum weight * matrix[index] over the entries of each bag, which begin at the offsets."""
    return embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _bags_by_latent(weights: Tensor, support: Support, matrix: Tensor, memory: Tensor | None) -> Tensor:
    """Sum weight * matrix[row] over the entries of each latent: [dict_size, act_size], in `memory` if given."""
    order, rows, starts = support.by_latent
    weights = weights[order]
    if memory is None:
        return _bags(weights, rows, starts, matrix)
    for latent, block in zip(range(0, len(memory), BAGGED_LATENTS), memory.split(BAGGED_LATENTS)):
        edges = starts[latent : latent + len(block) + 1]
        first, last = int(edges[0]), int(edges[-1])
        block.copy_(_bags(weights[first:last], rows[first:last], edges - first, matrix))
    return memory.detach()  # a tensor of its own, which autograd makes the parameter's gradient without a copy


def _dots(rows: Tensor, matrix: Tensor, support: Support) -> Float[Tensor, "nnz"]:
    """Multiply rows[row] . matrix[latent] for every entry."""
    zeros, size = rows.new_zeros(len(support.indices)), (len(rows), len(matrix))
    pattern = torch.sparse_csr_tensor(support.offsets, support.indices, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, matrix.t(), beta=0.0).values()
