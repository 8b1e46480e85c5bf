"""The delta rule on a GPU, backward; deterministic, because no two programs add to one number.

The forward's kernels run again, for what chunks do and the states between them. The gradients of states go back through
the chunks' maps (`triton_scan`). Then every chunk is on its own: first values and what is removed
(`triton_grad_value`), then all else: `triton_grad_key_bounded` where a bound of the channels' decays is promised, or
else first what rows have, then what columns have (`triton_grad_query_head` and `triton_grad_key_head` where each head
has one decay, `triton_grad_query_exact` and `triton_grad_key_exact` where each channel has its own).
"""

import torch

from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.launch import Call, Ends
from longmix_kernels.delta.triton_forward import run_chunks
from longmix_kernels.delta.triton_grad_key_bounded import grad_key_bounded_kernel
from longmix_kernels.delta.triton_grad_key_exact import grad_key_exact_kernel
from longmix_kernels.delta.triton_grad_key_head import grad_key_head_kernel
from longmix_kernels.delta.triton_grad_query_exact import grad_query_exact_kernel
from longmix_kernels.delta.triton_grad_query_head import grad_query_head_kernel
from longmix_kernels.delta.triton_grad_value import grad_value_kernel
from longmix_kernels.delta.triton_scan import grad_scan_kernel
from longmix_kernels.tensors import contiguous, given, strided, unit_stride


def triton_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_state: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the first eight inputs, in their shapes and dtypes; empty for an input of None.

    Args:
        inputs: as in the forward.
        grad_output: [B, T, H, V].
        grad_state: float32 [B, H, K, V], of the final state, or None for zero.
    """
    call = Call(inputs)
    grad_output = unit_stride(grad_output.to(call.query.dtype))
    (grad_final,) = contiguous(grad_state)
    grads = [None if x is None else x.new_empty(x.shape) for x in inputs.flat()[:8]]
    grad_query, grad_key, grad_value, grad_log_decay, grad_read, grad_write, grad_initial, grad_carried = grads
    states, transitions, reads, inverses, kept = run_chunks(call, None, None)
    grad_states = states.new_empty(states.shape)
    removed = grad_removed = None
    if call.low_rank:
        rows = call.batch, call.heads, call.length, call.value_dim
        removed, grad_removed = (call.query.new_empty(rows) for _ in range(2))
    tokens, sizes = call.tokens(), (call.length, call.heads)
    (dy,) = strided(grad_output)
    ends = Ends(call.initial, dy, states, grad_states, removed, grad_removed)
    of_states = transitions, reads, kept, grad_states, grad_initial, grad_carried
    call.launch("grad_scan", grad_scan_kernel, call.document_ids, dy, grad_final, *of_states, *sizes)
    call.launch("grad_value", grad_value_kernel, tokens, ends, inverses, grad_value, *sizes)
    if call.decay == "bounded":
        found = grad_query, grad_key, grad_log_decay, grad_read, grad_write
        call.launch("grad_key", grad_key_bounded_kernel, tokens, ends, *found, *sizes)
    else:
        of_rows, of_columns = (
            (grad_query_head_kernel, grad_key_head_kernel)
            if call.decay == "head"
            else (grad_query_exact_kernel, grad_key_exact_kernel)
        )
        call.launch("grad_query", of_rows, tokens, ends, grad_query, grad_log_decay, grad_read, *sizes)
        call.launch("grad_key", of_columns, tokens, ends, grad_key, grad_log_decay, grad_write, *sizes)
    return given(grad_output, *grads)
