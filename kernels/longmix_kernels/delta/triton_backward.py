"""The delta rule on a GPU, backward; deterministic, because no two programs add to one number.

The gradients of states go back through the chunks' maps, which the forward kept (`triton_scan`). Then every chunk is on
its own: first values and what is removed (`triton_grad_value`), then all else (`triton_grad_key`).
"""

import torch

from longmix_kernels.delta.launch import Call, launch_config, on_device, unit_stride
from longmix_kernels.delta.triton_grad_key import grad_key_kernel
from longmix_kernels.delta.triton_grad_value import grad_value_kernel
from longmix_kernels.delta.triton_scan import grad_scan_kernel


def triton_backward(
    grad_output: torch.Tensor,
    grad_state: torch.Tensor | None,
    states: torch.Tensor,
    transitions: torch.Tensor,
    reads: torch.Tensor,
    inverses: torch.Tensor,
    kept: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    low_rank_read: torch.Tensor | None,
    low_rank_write: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    min_log_decay: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the first seven inputs, in their shapes and dtypes; empty where an input is None.

    Args:
        grad_output: [B, T, H, V].
        grad_state: float32 [B, H, K, V], of the final state, or None for zero.
        states, transitions, reads, inverses, kept: what the forward returned.
        query and others: as in the forward.
    """
    inputs = query, key, value, log_decay, low_rank_read, low_rank_write, initial_state
    call = Call(*inputs, document_ids, scale, chunk_size, min_log_decay)
    grad_output = unit_stride(grad_output.to(query.dtype))
    grad_final = None if grad_state is None else grad_state.contiguous()
    grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
    grad_query, grad_key, grad_value, grad_log_decay, grad_read, grad_write, grad_initial = grads
    grad_states = states.new_empty(states.shape)
    removed = grad_removed = None
    if call.low_rank:
        removed, grad_removed = (query.new_empty(call.batch, call.heads, call.length, call.value_dim) for _ in range(2))
    strides = call.token_strides() + call.strides(grad_output)
    with on_device(call.query):
        config = launch_config("grad_scan", call)
        grad_scan_kernel[call.scan_programs(config)](
            call.document_ids,
            grad_output,
            grad_final,
            transitions if call.low_rank else None,
            reads,
            kept,
            grad_states,
            grad_initial,
            call.length,
            call.heads,
            *call.strides(grad_output),
            **call.scan_constants(config),
        )
        config = launch_config("grad_value", call)
        grad_value_kernel[call.chunk_programs()](
            call.query,
            call.key,
            call.value,
            call.log_decay,
            call.low_rank_read,
            call.low_rank_write,
            call.document_ids,
            call.initial,
            grad_output,
            states,
            grad_states,
            inverses if call.low_rank else None,
            grad_value,
            removed,
            grad_removed,
            call.scale,
            call.floor,
            call.length,
            call.heads,
            *strides,
            **call.chunk_constants(config),
        )
        config = launch_config("grad_key", call)
        grad_key_kernel[call.chunk_programs()](
            call.query,
            call.key,
            call.value,
            call.log_decay,
            call.low_rank_read,
            call.low_rank_write,
            call.document_ids,
            call.initial,
            grad_output,
            states,
            grad_states,
            removed,
            grad_removed,
            grad_query,
            grad_key,
            grad_log_decay,
            grad_read,
            grad_write,
            call.scale,
            call.floor,
            call.length,
            call.heads,
            *strides,
            **call.chunk_constants(config),
        )
    return tuple(grad_output.new_empty(0) if x is None else x for x in grads)
