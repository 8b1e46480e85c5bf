"""Compute the backward of block-local attention with far keys on a GPU; no two programs add to one number.

The forward keeps nothing of the far keys: the backward computes their sums again. That saves a layer 4 m (Dv + 2) / C
bytes per token of a key head until its backward. What each query block adds to the gradients of earlier keys is summed
in the same way, and carried in reverse.
"""

import torch

from longmix_kernels.attention.triton_backward import triton_backward as exact_backward
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.scatter.launch import Call, Sums
from longmix_kernels.scatter.triton_forward import entering_sums, exact_inputs
from longmix_kernels.scatter.triton_grad_key import grad_key_kernel
from longmix_kernels.scatter.triton_grad_query import grad_query_kernel
from longmix_kernels.scatter.triton_scan import grad_scan_kernel
from longmix_kernels.scatter.triton_sums import sums_kernel
from longmix_kernels.tensors import aligned, given, strided, unit_stride

Tensors = tuple[torch.Tensor, ...]


def triton_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
) -> Tensors:
    """Return the gradients of the first eight inputs, in their shapes and dtypes; empty where an input is None.

    Args:
        inputs: as in the forward.
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero.
        output, logsumexp: the first two results of the forward.
    """
    grads = exact_backward(exact_inputs(inputs), grad_output, grad_logsumexp, output, logsumexp)
    if not inputs.has_far_keys():
        return *grads, *(grad_output.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs.flat()[3:8])
    call = Call(inputs)
    grad_output, output, logsumexp = unit_stride(grad_output), unit_stride(output), aligned(logsumexp.contiguous())
    grad_features = call.new_grad_features()
    delta = _query_gradients(call, grad_output, grad_logsumexp, output, logsumexp, grad_features[0])
    leaving, grad_state = _carry_back(call, _sum_over_queries(call, grad_output, logsumexp, delta))
    _key_gradients(call, leaving, grad_features[1], grads[2])
    return *grads, *grad_features, *grad_state


def _query_gradients(
    call: Call,
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_query_features: torch.Tensor,
) -> torch.Tensor:
    """Write the gradient of the query features, and return D, float32 [B, Tq, Hq]; only rows with far keys have it."""
    delta = logsumexp.new_empty(logsumexp.shape)
    call.launch(
        "grad_query",
        grad_query_kernel,
        call.blocks,
        *strided(call.query_features, output, grad_output),
        entering_sums(call),
        logsumexp,
        None if grad_logsumexp is None else aligned(grad_logsumexp.float().contiguous()),
        grad_query_features,
        delta,
        call.row_tiles("grad_query"),
        call.slots,
        call.heads,
        call.group,
        call.queries,
        call.stride_blocks,
    )
    return delta


def _sum_over_queries(call: Call, grad_output: torch.Tensor, logsumexp: torch.Tensor, delta: torch.Tensor) -> Sums:
    """Return what the queries of each block add to the gradients of earlier keys."""
    found = call.new_sums(of_queries=True)
    call.launch(
        "grad_sums",
        sums_kernel,
        call.blocks,
        *strided(call.query_features, grad_output),
        logsumexp,
        delta,
        found,
        call.block_size,
        call.slots,
        call.key_heads,
        call.group,
        call.queries,
        call.stride_blocks,
    )
    return found


def _carry_back(call: Call, found: Sums) -> tuple[Sums, Tensors]:
    """Carry the sums over queries to earlier keys, and return the sums for each block, and the state's gradients."""
    leaving = call.new_sums(of_queries=True)
    state = call.memory, call.normalizer, call.log_scale
    grads = [None if x is None else x.new_empty(x.shape) for x in state]
    call.launch(
        "grad_scan",
        grad_scan_kernel,
        call.blocks,
        found,
        *state,
        *grads,
        leaving,
        call.slots,
        call.key_heads,
        call.stride_blocks,
    )
    return leaving, given(call.value, *grads)


def _key_gradients(call: Call, leaving: Sums, grad_key_features: torch.Tensor, grad_value: torch.Tensor) -> None:
    """Write the gradient of the key features, and add to that of the values."""
    call.launch(
        "grad_key",
        grad_key_kernel,
        call.blocks,
        *strided(call.key_features, call.value),
        leaving,
        grad_key_features,
        grad_value,
        call.row_tiles("grad_key"),
        call.block_size,
        call.slots,
        call.key_heads,
        call.keys,
        call.stride_blocks,
    )
