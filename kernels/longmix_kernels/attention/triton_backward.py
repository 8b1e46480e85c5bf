"""Bounded attention on a GPU, backward: two kernels, both deterministic because no two programs add to one number.

With P = exp(S - L), the weights recomputed from the logsumexp L, and dS = P * (dO V^T - delta):

    dQ = scale dS K        one program per tile of query rows
    dK = scale dS^T Q      one program per tile of keys, all query heads of the group in turn
    dV = P^T dO
    delta_i = o_i . dO_i - dL_i

The gradient dL of the logsumexp costs nothing but the subtraction. The first kernel computes delta for its own rows and
leaves it, with L in base 2, for the second. That one computes S^T = K Q^T directly, since the transpose of a product
must not be fed into a product on Hopper. Together seven products per tile instead of the five that a single kernel
adding to dQ atomically would need: the price of equal bits in every run.
"""

import torch
import triton

from longmix_kernels.attention.bounds import key_bounds
from longmix_kernels.attention.launch import Call, launch_config
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.triton_grad_key_value import grad_key_value_kernel
from longmix_kernels.attention.triton_grad_query import grad_query_kernel
from longmix_kernels.launching import on_device, unit_stride


def triton_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes.

    Args:
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero; what it holds for rows that see nothing is not looked at.
        query, key, value, pattern, scale: as in the forward.
        output, logsumexp: what it returned.
    """
    call = Call(query, key, value, pattern, scale)
    grads = [x.new_empty(x.shape) for x in (call.query, call.key, call.value)]
    output, grad_output = (unit_stride(call.take_queries(x.to(query.dtype))) for x in (output, grad_output))
    logsumexp = call.take_queries(logsumexp).contiguous()
    if grad_logsumexp is not None:
        grad_logsumexp = call.take_queries(grad_logsumexp.float()).contiguous()
    shift, minus_delta = call.query.new_empty(2, call.batch, call.heads, call.queries, dtype=torch.float32)
    first_row = end_row = None
    if call.lo is not None:
        # Without `hi`, the first row that sees a key has a closed form, and only the end needs the search.
        hi = call.lo if call.hi is None else call.hi
        first_row, end_row = key_bounds(call.lo, hi, call.keys)
        first_row = None if call.hi is None else first_row
    constants = call.constants()
    with on_device(call.query):
        config = launch_config("grad_query", call)
        grad_query_kernel[(triton.cdiv(call.queries, config.rows) * call.batch * call.heads,)](
            call.query,
            call.key,
            call.value,
            call.lo,
            call.hi,
            call.query_order,
            call.key_order,
            call.alibi_slopes,
            call.row_offsets,
            call.row_blocks,
            output,
            logsumexp,
            grad_output,
            grad_logsumexp,
            grads[0],
            shift,
            minus_delta,
            call.scale,
            call.scale_log2(),
            call.queries,
            call.keys,
            call.heads,
            call.group,
            call.window,
            *call.strides(output, grad_output),
            *call.row_strides(call.lo, call.hi, call.query_order, call.key_order),
            **constants,
            **config.tiles(),
            **config.options(),
        )
        config = launch_config("grad_key_value", call)
        grad_key_value_kernel[(triton.cdiv(call.keys, config.keys) * call.batch * call.key_heads,)](
            call.query,
            call.key,
            call.value,
            first_row,
            end_row,
            call.query_order,
            call.key_order,
            call.alibi_slopes,
            call.key_offsets,
            call.key_blocks,
            grad_output,
            shift,
            minus_delta,
            grads[1],
            grads[2],
            call.scale,
            call.scale_log2(),
            call.queries,
            call.keys,
            call.heads,
            call.group,
            call.window,
            *call.strides(grad_output),
            *call.row_strides(first_row, end_row, call.query_order, call.key_order),
            **constants,
            FOLD=config.fold,
            **config.tiles(),
            **config.options(),
        )
    return call.put_queries(grads[0]), call.put_keys(grads[1]), call.put_keys(grads[2])
