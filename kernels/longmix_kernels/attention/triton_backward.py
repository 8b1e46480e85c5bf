"""Compute the backward of bounded attention on a GPU by two kernels.

Both are deterministic, because no two programs add to one number. They recompute the weights P = exp(S - L) from the
logsumexp L. With dS = P * (dO V^T - delta):

    dQ = scale dS K        one program per tile of query rows
    dK = scale dS^T Q      one program per tile of keys, all query heads of the group in turn
    dV = P^T dO
    delta_i = o_i . dO_i - dL_i

The gradient dL of the logsumexp costs one subtraction. The first kernel computes delta for its own rows and leaves it,
with L in base 2, for the second. The second kernel computes S^T = K Q^T directly, since on Hopper the transpose of a
product must not be fed into a product. Together they take seven products per tile. A single kernel that adds to dQ
atomically would need five, but two runs would differ in their bits.
"""

import torch

from longmix_kernels.attention.bounds import rows_up_to
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.launch import Call
from longmix_kernels.attention.triton_grad_key_value import grad_key_value_kernel
from longmix_kernels.attention.triton_grad_query import grad_query_kernel
from longmix_kernels.tensors import aligned, per_row, strided, unit_stride, vectors


def triton_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes.

    Args:
        inputs: as in the forward.
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero; its values in rows that see nothing are not used.
        output, logsumexp: what the forward returned.
    """
    call = Call(inputs)
    grads = [x.new_empty(x.shape) for x in (call.query, call.key, call.value)]
    output, grad_output = (unit_stride(call.take_queries(x.to(call.query.dtype))) for x in (output, grad_output))
    logsumexp = aligned(call.take_queries(logsumexp).contiguous())
    if grad_logsumexp is not None:
        grad_logsumexp = aligned(call.take_queries(grad_logsumexp.float()).contiguous())
    shift, minus_delta = vectors(call.query, 2, call.batch, call.heads, call.queries)
    first_row = end_row = None
    if call.lo is not None:
        # Without `hi`, the first row that sees a key has a closed form, and only the end needs the search.
        end_row = rows_up_to(call.lo, call.keys)
        first_row = None if call.hi is None else rows_up_to(call.hi, call.keys)
    orders = call.query_order, call.key_order
    sizes = call.queries, call.keys, call.heads, call.group, call.window
    call.launch(
        "grad_query",
        grad_query_kernel,
        *strided(call.query, call.key, call.value, output, grad_output),
        *per_row(call.lo, call.hi, *orders),
        call.alibi_slopes,
        call.row_offsets,
        call.row_blocks,
        logsumexp,
        grad_logsumexp,
        grads[0],
        shift,
        minus_delta,
        call.scale,
        call.scale_log2(),
        *sizes,
    )
    call.launch(
        "grad_key_value",
        grad_key_value_kernel,
        *strided(call.query, call.key, call.value, grad_output),
        *per_row(first_row, end_row, *orders),
        call.alibi_slopes,
        call.key_offsets,
        call.key_blocks,
        shift,
        minus_delta,
        grads[1],
        grads[2],
        call.scale,
        call.scale_log2(),
        *sizes,
    )
    return call.put_queries(grads[0]), call.put_keys(grads[1]), call.put_keys(grads[2])
