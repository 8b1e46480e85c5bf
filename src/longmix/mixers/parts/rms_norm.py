"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) whose backward pass on a CPU takes half of the time.

    y = w r x,    r = (mean(x^2) + eps)^-1/2
    dw = sum dy r x,    dx = r w dy - x r^3 mean(w dy x)

On a CPU torch makes the norm of elementary operations, and keeps and reads what each of them gave. Here the backward
pass reads x and r alone. It takes the same roundings and sums in the same order, so that gradients are the same bit for
bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last axis, by `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """`F.rms_norm` over the last axis, [..., C]; gradients can be taken once where `has_own_gradient`.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square; None takes that of x's dtype.
    """
    if not has_own_gradient(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # x comes twice, as torch has it: gradients are then added to others of x one after the other, as torch does it.
    result: Tensor = _RMSNorm.apply(x, x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return result


def has_own_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether the backward pass is that of this module: in training on a CPU, uncompiled, in float32 or float64."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.compiler.is_compiling()
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, same: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factor, weight)
        return (x * factor).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, weight = ctx.saved_tensors
        needs_x, _, needs_weight, _ = ctx.needs_input_grad
        dweight = None
        if needs_weight:
            dweight = (x * factor).mul_(dy).sum(tuple(range(x.dim() - 1)))
        if not needs_x:
            return None, None, dweight, None
        dnormed = dy * weight
        product = dnormed * x
        along = product.sum(-1, keepdim=True).mul_(-0.5).mul_(factor.pow(3)).div_(x.shape[-1]).mul_(2)
        return dnormed.mul_(factor), torch.mul(x, along, out=product), dweight, None
