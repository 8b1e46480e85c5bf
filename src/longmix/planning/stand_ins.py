"""What a GPU does otherwise than a CPU with the same line of code, for models that are rehearsed without one."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix_kernels.launching import replaced


def gpu_functions() -> contextlib.AbstractContextManager[None]:
    """Replace, for fake tensors on a CPU, the functions for which CUDA has a kernel that keeps less."""
    return replaced(vars(F), "rms_norm", _rms_norm)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedRMSNorm.apply(input, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """`aten::_fused_rms_norm`, which keeps its input and one number per row; on a CPU each step of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """Empty, in the shape and dtype of `x`."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Empty gradients."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
