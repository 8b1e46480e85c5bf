"""Block-local attention with far keys through features on a GPU: the exact part in the attention engine's kernels.

The sums over far keys are the torch operations of the blocked form: m * Dv multiply-adds per token, a few percent of
the work of blocks of 128 keys.
"""

import torch

from longmix_kernels.attention.triton_backward import triton_backward as exact_backward
from longmix_kernels.attention.triton_forward import triton_forward as exact_forward
from longmix_kernels.scatter.blocked import ExactPart, Tensors, merged_backward, merged_forward

TRITON = ExactPart(exact_forward, exact_backward, widens=False, closed=True)


def triton_forward(*inputs) -> Tensors:
    """As `blocked.blocked_forward`."""
    return merged_forward(TRITON, inputs)


def triton_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    *inputs,
) -> Tensors:
    """As `blocked.blocked_backward`."""
    return merged_backward(TRITON, grad_output, grad_logsumexp, output, logsumexp, inputs)
