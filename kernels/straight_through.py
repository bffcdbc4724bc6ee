"""JumpReLU's straight-through estimators, on pre-activations, with a rectangular window of width eps.

    f     = pre * [pre > threshold]    d f / d threshold     = -(threshold / eps) [|pre - threshold| < eps / 2]
    fires = [pre > threshold]          d fires / d threshold = -(1 / eps) [|pre - threshold| < eps / 2]

Rajamanoharan et al. 2024 (arXiv:2407.14435), equations 11 and 12.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, eps)
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, eps = ctx.saved_tensors
        d_threshold = -(threshold / eps) * grad * _in_window(pre, threshold, eps)
        return grad * (pre > threshold), d_threshold.sum_to_size(threshold.shape), None


class _Fires(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, eps)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, eps = ctx.saved_tensors
        return None, (-grad / eps * _in_window(pre, threshold, eps)).sum_to_size(threshold.shape), None


def _in_window(pre: Tensor, threshold: Tensor, eps: Tensor) -> Bool[Tensor, "..."]:
    return (pre - threshold).abs() < eps / 2


def jumprelu(pre: Float[Tensor, "..."], threshold: Float[Tensor, "..."], eps: Float[Tensor, ""]) -> Tensor:
    """Zero the pre-activations that are not above their thresholds; gradients reach both."""
    return _JumpReLU.apply(pre, threshold, eps)


def fires(pre: Float[Tensor, "..."], threshold: Float[Tensor, "..."], eps: Float[Tensor, ""]) -> Tensor:
    """Give 1 where a pre-activation is above its threshold, else 0; a gradient reaches the threshold alone."""
    return _Fires.apply(pre, threshold, eps)
