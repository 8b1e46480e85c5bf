"""Block-local attention with far keys through features on a GPU, backward; no two programs add to one number.

Nothing is kept of the far keys: their sums are found again, 4 m (Dv + 2) / C bytes per token of a key head that a layer
does not hold until its backward. Then what each query block adds to the gradients of earlier keys is summed the same
way, and carried in reverse.
"""

import torch

from longmix_kernels.attention.triton_backward import triton_backward as exact_backward
from longmix_kernels.scatter.launch import Call, launch_config, on_device, strides, unit_stride
from longmix_kernels.scatter.triton_forward import entering_sums, exact_pattern, has_far_keys
from longmix_kernels.scatter.triton_grad_key import grad_key_kernel
from longmix_kernels.scatter.triton_grad_query import grad_query_kernel
from longmix_kernels.scatter.triton_scan import grad_scan_kernel
from longmix_kernels.scatter.triton_sums import sums_kernel

Tensors = tuple[torch.Tensor, ...]


def triton_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    *inputs,
) -> Tensors:
    """Return the gradients of the first eight inputs, as `blocked.blocked_backward` does."""
    query, key, value = inputs[:3]
    pattern, scale = exact_pattern(inputs), inputs[-1]
    grads = exact_backward(grad_output, grad_logsumexp, query, key, value, pattern, output, logsumexp, scale)
    if not has_far_keys(inputs):
        return *grads, *(grad_output.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs[3:8])
    call = Call(*inputs)
    with on_device(call.value):
        grad_output, output, logsumexp = unit_stride(grad_output), unit_stride(output), logsumexp.contiguous()
        grad_features = call.new_grad_features()
        delta = _query_gradients(call, grad_output, grad_logsumexp, output, logsumexp, grad_features[0])
        scales, weights, sums = call.new_sums()
        leaving = scales, weights, scales.new_empty(scales.shape), sums
        _sum_over_queries(call, grad_output, logsumexp, delta, leaving)
        grad_state = _carry_back(call, leaving)
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
    """Write the gradient of the query features, and return D of rows that see far keys, float32 [B, Tq, Hq]."""
    delta = logsumexp.new_empty(logsumexp.shape)
    config = launch_config("grad_query", call)
    row_tiles = call.row_tiles(config)
    grad_query_kernel[(call.slots * row_tiles * call.batch * call.heads,)](
        call.blocks,
        call.query_features,
        *entering_sums(call),
        output,
        logsumexp,
        grad_output,
        None if grad_logsumexp is None else grad_logsumexp.float().contiguous(),
        grad_query_features,
        delta,
        row_tiles,
        call.slots,
        call.heads,
        call.group,
        call.queries,
        call.stride_blocks,
        *strides(call.query_features, output, grad_output),
        **call.product_constants(config),
    )
    return delta


def _sum_over_queries(
    call: Call, grad_output: torch.Tensor, logsumexp: torch.Tensor, delta: torch.Tensor, leaving: Tensors
) -> None:
    config = launch_config("grad_sums", call)
    sums_kernel[call.sums_programs(config)](
        call.blocks,
        call.query_features,
        grad_output,
        logsumexp,
        delta,
        *leaving,
        call.block_size,
        call.slots,
        call.key_heads,
        call.group,
        call.queries,
        call.stride_blocks,
        *strides(call.query_features, grad_output),
        **call.product_constants(config),
    )


def _carry_back(call: Call, leaving: Tensors) -> Tensors:
    """Carry the sums over queries to earlier keys, and return the gradients of the initial state."""
    state = call.memory, call.normalizer, call.log_scale
    grads = [None if x is None else x.new_empty(x.shape) for x in state]
    config = launch_config("grad_scan", call)
    grad_scan_kernel[call.scan_programs(config)](
        call.blocks,
        *leaving,
        *state,
        *grads,
        call.slots,
        call.key_heads,
        call.stride_blocks,
        **call.constants(config),
    )
    return tuple(call.value.new_empty(0) if x is None else x for x in grads)


def _key_gradients(call: Call, leaving: Tensors, grad_key_features: torch.Tensor, grad_value: torch.Tensor) -> None:
    """Write the gradient of the key features, and add to that of the values."""
    config = launch_config("grad_key", call)
    row_tiles = call.row_tiles(config)
    grad_key_kernel[(call.slots * row_tiles * call.batch * call.key_heads,)](
        call.blocks,
        call.key_features,
        call.value,
        *leaving,
        grad_key_features,
        grad_value,
        row_tiles,
        call.block_size,
        call.slots,
        call.key_heads,
        call.keys,
        call.stride_blocks,
        *strides(call.key_features, call.value),
        **call.product_constants(config),
    )
