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
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

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
