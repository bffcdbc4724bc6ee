"""JumpReLU's straight-through estimators, on pre-activations, with a rectangular window of width eps.

    f     = pre * [pre > threshold]    d f / d threshold     = -(threshold / eps) [|pre - threshold| < eps / 2]
    fires = [pre > threshold]          d fires / d threshold = -(1 / eps) [|pre - threshold| < eps / 2]

Rajamanoharan et al. 2024 (arXiv:2407.14435), equations 11 and 12.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, eps: Tensor, times_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold, eps)
        ctx.times_pre = times_pre
        fires = pre > threshold
        return pre * fires if times_pre else fires.to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, eps = ctx.saved_tensors
        height = threshold if ctx.times_pre else 1
        d_threshold = -(height / eps) * grad * ((pre - threshold).abs() < eps / 2)
        d_pre = grad * (pre > threshold) if ctx.times_pre else None
        return d_pre, d_threshold.sum_to_size(threshold.shape), None, None


def jumprelu(pre: Float[Tensor, "..."], threshold: Float[Tensor, "..."], eps: Float[Tensor, ""]) -> Tensor:
    """Zero the pre-activations that are not above their thresholds; gradients reach both."""
    return _Jump.apply(pre, threshold, eps, True)


def fires(pre: Float[Tensor, "..."], threshold: Float[Tensor, "..."], eps: Float[Tensor, ""]) -> Tensor:
    """Give 1 where a pre-activation is above its threshold, else 0; a gradient reaches the threshold alone."""
    return _Jump.apply(pre, threshold, eps, False)
