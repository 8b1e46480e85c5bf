"""Compute the backward of attention with a probe on a GPU by two kernels.

Both are deterministic, because no two programs add to one number. They recompute the weights P from the logsumexp, and
the factors w = 1 + e - t from the mean e of t = R K^T. With g = dO V^T, b_i = dO_i . O1_i, where O1 is the output of
softmax attention, and delta_i = dO_i . o_i:

    h  = P * (g - b)
    dS = w * h + P * (b - delta)
    dQ = scale dS K    dR = -h K                one program per tile of query rows
    dK = scale dS^T Q - h^T R                   one program per tile of keys, all query heads of the group in turn
    dV = (P * w)^T dO

Nothing flows through L and e, which the output holds in full. The first kernel computes b and delta for its own rows
and leaves them, with L and e, for the second. Together they take eleven products per tile, where attention takes seven.
"""

import torch

from longmix_kernels.attention.bounds import rows_up_to
from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.attention.probe_launch import Call
from longmix_kernels.attention.triton_probe_grad_key_value import probe_grad_key_value_kernel
from longmix_kernels.attention.triton_probe_grad_query import probe_grad_query_kernel
from longmix_kernels.tensors import aligned, per_row, strided, unit_stride, vectors


def triton_backward(
    call_inputs: ProbeInputs,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    plain: torch.Tensor,
    logsumexp: torch.Tensor,
    expected: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of probe, query, key and value, in their shapes and dtypes.

    Args:
        call_inputs: as in the forward.
        grad_output: [B, Tq, Hq, Dv].
        output, plain, logsumexp, expected: what the forward returned.
    """
    call = Call(call_inputs)
    grads = [x.new_empty(x.shape) for x in (call.probe, call.query, call.key, call.value)]
    output, plain, grad_output = (
        unit_stride(call.take_queries(x.to(call.query.dtype))) for x in (output, plain, grad_output)
    )
    logsumexp, expected = (aligned(call.take_queries(x).contiguous()) for x in (logsumexp, expected))
    of_rows = vectors(call.query, 4, call.batch, call.heads, call.queries)
    first_row = end_row = None
    if call.lo is not None:
        # Without `hi`, the first row that sees a key has a closed form, and only the end needs the search.
        end_row = rows_up_to(call.lo, call.keys)
        first_row = None if call.hi is None else rows_up_to(call.hi, call.keys)
    orders = call.query_order, call.key_order
    sizes = call.queries, call.keys, call.heads, call.group, call.window
    call.launch(
        "probe_grad_query",
        probe_grad_query_kernel,
        *strided(call.query, call.probe, call.key, call.value, output, plain, grad_output),
        *per_row(call.lo, call.hi, *orders),
        call.alibi_slopes,
        logsumexp,
        expected,
        grads[1],
        grads[0],
        *of_rows,
        call.scale,
        call.scale_log2(),
        *sizes,
    )
    call.launch(
        "probe_grad_key_value",
        probe_grad_key_value_kernel,
        *strided(call.query, call.probe, call.key, call.value, grad_output),
        *per_row(first_row, end_row, *orders),
        call.alibi_slopes,
        *of_rows,
        grads[2],
        grads[3],
        call.scale,
        call.scale_log2(),
        *sizes,
    )
    return *(call.put_queries(x) for x in grads[:2]), *(call.put_keys(x) for x in grads[2:])
