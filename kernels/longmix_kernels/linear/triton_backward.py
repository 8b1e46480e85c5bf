"""Scalar-gated linear attention on a GPU, backward; deterministic, because no two programs add to one number.

With g_t = dy_t / den_t, W the weights between tokens divided by their row's denominator, and, with a normaliser, the
gradient of the denominator as one number per row,

    delta_t = -(dy_t . y_t) sign(n_t . s q_t)    where n_t . s q_t is what divides, else 0

the gradients are, C the state entering a chunk and dC the gradient of the one leaving it,

    dS = (dY V^T + delta 1^T) * W          R, W_end: the weights `read` / den and `write`
    dQ = s (dS K + R (dY C^T + delta n^T))              one program per tile of rows
    dK = s dS^T Q + W_end (V dC^T + 1 dn^T)             one program per tile of tokens
    dV = s (Q K^T * W)^T dY + W_end K dC                the same, or one of its own where registers are short
    di_t = k_t . dk_t      df_t = sum over rows u >= t of its document of (q_u . dq_u - k_u . dk_u)

and for the last document <C_T, dC_T> + <n_T, dn_T> is added to df. The log scales are constants: they divide out.
States are computed again rather than kept from the forward. The row sums come from what is added up in float32.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.launch import Call
from longmix_kernels.linear.triton_forward import compute_gates, compute_states
from longmix_kernels.linear.triton_gates import grad_gates_kernel
from longmix_kernels.linear.triton_grad_key_value import grad_key_value_kernel
from longmix_kernels.linear.triton_grad_query import grad_query_kernel
from longmix_kernels.linear.triton_states import grad_states_kernel
from longmix_kernels.tensors import Strided, aligned, contiguous, given, strided, unit_stride, vectors
from longmix_kernels.tiles import head_rows, load_tile, program_head


@triton.jit(do_not_specialize=["length", "heads"])
def grad_rows_kernel(
    output: Strided,  # [B, T, H, VALUE_DIM]
    grad_output: Strided,  # [B, T, H, VALUE_DIM]
    row_log_scale,  # float32 [B, T, H], contiguous, in base 2
    denominator,  # float32 [B, T, H], contiguous
    row_rest,  # float32 [B, H, T]
    read,
    grad_rest,  # float32 [B, H, T], all that are written
    grad_read,
    delta,
    length,
    heads,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the denominator and its gradient contribute to `ROWS` rows of one head."""
    tile, batch, head = program_head(tl.cdiv(length, ROWS), heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    there = rows < length
    outputs = head_rows(output, batch, head)
    grad_outputs = head_rows(grad_output, batch, head)
    total = tl.zeros([ROWS], tl.float32)
    for column in range(0, VALUE_DIM, BLOCK):
        y = load_tile(outputs.pointer, tile * ROWS, there, outputs.stride, column, BLOCK, VALUE_DIM)
        dy = load_tile(grad_outputs.pointer, tile * ROWS, there, grad_outputs.stride, column, BLOCK, VALUE_DIM)
        total += tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    place = batch * length * heads + head + rows.to(tl.int64) * heads
    own = (batch * heads + head) * length + rows
    divisor = tl.load(denominator + place, mask=there, other=1.0)
    least = tl.exp2(-tl.minimum(tl.load(row_log_scale + place, mask=there, other=0.0), 126.0))
    divides = tl.abs(divisor) > least
    tl.store(delta + own, tl.where(divides, tl.where(divisor > 0, -total, total), 0.0), mask=there)
    rest = tl.load(row_rest + own, mask=there, other=0.0)
    tl.store(grad_rest + own, rest - tl.log2(tl.abs(divisor)), mask=there)
    tl.store(grad_read + own, tl.load(read + own, mask=there, other=0.0) / tl.abs(divisor), mask=there)


def triton_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_memory: torch.Tensor | None,
    grad_normalizer: torch.Tensor | None,
    output: torch.Tensor,
    row_log_scale: torch.Tensor,
    denominator: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the eleven differentiable inputs, in their shapes and dtypes; empty for an input of None.

    Args:
        inputs: as in the forward.
        grad_output: [B, T, H, Dv].
        grad_memory: float32 [B, H, Dk, Dv], of the final state, or None for zero.
        grad_normalizer: float32 [B, H, Dk], likewise.
        output, row_log_scale, denominator: what the forward returned.
    """
    call = Call(inputs)
    output, grad_output = (unit_stride(x.to(call.query.dtype)) for x in (output, grad_output))
    grad_memory, grad_normalizer = contiguous(grad_memory, grad_normalizer)
    has_final = grad_memory is not None or grad_normalizer is not None
    gates = compute_gates(call, aligned(row_log_scale.contiguous()) if call.normalize else None)
    row_whole, row_rest, column_whole, column_rest, read, write = gates
    grad_rest, grad_read, delta = row_rest, read, None
    if call.normalize:
        grad_rest, grad_read, delta = vectors(row_rest, 3, *row_rest.shape)
        call.launch(
            "grad_rows",
            grad_rows_kernel,
            *strided(output, grad_output),
            row_log_scale,
            denominator,
            row_rest,
            read,
            grad_rest,
            grad_read,
            delta,
            call.length,
            call.heads,
        )
    states, normalizers, final_memory, final_normalizer = compute_states(call, gates, with_final=has_final)
    grad_states, grad_normalizers = call.new_states()
    grad_initial, grad_initial_normalizer, grad_carried, grad_carried_normalizer = (
        None if x is None else row_rest.new_empty(x.shape)
        for x in (call.memory, call.normalizer, call.carried_memory, call.carried_normalizer)
    )
    call.launch(
        "grad_states",
        grad_states_kernel,
        *strided(call.query, grad_output),
        call.document_ids,
        grad_memory,
        grad_normalizer,
        read,
        grad_read,
        delta,
        grad_states,
        grad_normalizers,
        grad_initial,
        grad_initial_normalizer,
        grad_carried,
        grad_carried_normalizer,
        call.scale,
        call.length,
        call.heads,
    )
    grads = [x.new_empty(x.shape) for x in (call.query, call.key, call.value)]
    query_sum, key_sum = vectors(row_rest, 2, *row_rest.shape)
    tokens = strided(call.query, call.key, call.value, grad_output)
    call.launch(
        "grad_query",
        grad_query_kernel,
        *tokens,
        call.document_ids,
        call.memory,
        call.normalizer,
        states,
        normalizers,
        row_whole,
        grad_rest,
        column_whole,
        column_rest,
        grad_read,
        delta,
        grads[0],
        query_sum,
        call.scale,
        call.length,
        call.heads,
    )
    both = (grads[1], grads[2], key_sum)
    apart = (grads[1], None, key_sum), (None, grads[2], None)
    for wanted in (both,) if call.config("grad_key_value").fused else apart:
        call.launch(
            "grad_key_value",
            grad_key_value_kernel,
            *tokens,
            call.document_ids,
            grad_states,
            grad_normalizers,
            row_whole,
            grad_rest,
            column_whole,
            column_rest,
            write,
            delta,
            *wanted,
            call.scale,
            call.length,
            call.heads,
        )
    # <C_T, dC_T> + <n_T, dn_T>, and the same of the states before, which is what a log scale's gradient is.
    final_sum = inner(final_memory, grad_memory, final_normalizer, grad_normalizer) if has_final else None
    grad_log_decay = row_rest.new_empty(call.log_decay.shape)
    grad_log_input = None if call.log_input is None else row_rest.new_empty(call.log_input.shape)
    call.launch(
        "grad_gates",
        grad_gates_kernel,
        query_sum,
        key_sum,
        final_sum,
        call.document_ids,
        grad_log_decay,
        grad_log_input,
        call.length,
        call.heads,
    )
    grad_log_scale = grad_carried_log_scale = None
    if call.log_scale is not None:
        grad_log_scale = inner(call.memory, grad_initial, call.normalizer, grad_initial_normalizer)
    if call.carried_log_scale is not None:
        of_carried = call.carried_memory, grad_carried, call.carried_normalizer, grad_carried_normalizer
        grad_carried_log_scale = inner(*of_carried)
    of_initial = grad_initial, grad_initial_normalizer, grad_log_scale
    others = grad_log_input, *of_initial, grad_carried, grad_carried_normalizer, grad_carried_log_scale
    return *grads, grad_log_decay, *given(grad_output, *others)


def inner(
    memory: torch.Tensor | None,
    grad_memory: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    grad_normalizer: torch.Tensor | None,
) -> torch.Tensor:
    """Return <C, dC> + <n, dn> of states [B, H, ...], as [B, H]; a gradient of None is zero."""
    pairs = ((memory, grad_memory), (normalizer, grad_normalizer))
    sums = [(x * grad).flatten(2).sum(-1) for x, grad in pairs if x is not None and grad is not None]
    return torch.stack(sums).sum(0)
