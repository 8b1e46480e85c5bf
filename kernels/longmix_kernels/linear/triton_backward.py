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

from longmix_kernels.linear.launch import Call, launch_config, on_device, unit_stride
from longmix_kernels.linear.triton_forward import compute_gates, compute_states
from longmix_kernels.linear.triton_gates import grad_gates_kernel
from longmix_kernels.linear.triton_grad_key_value import grad_key_value_kernel
from longmix_kernels.linear.triton_grad_query import grad_query_kernel
from longmix_kernels.linear.triton_states import grad_states_kernel
from longmix_kernels.linear.triton_tiles import load_tile, program_head


@triton.jit(do_not_specialize=["length", "heads"])
def grad_rows_kernel(
    output,  # [B, T, H, VALUE_DIM]
    grad_output,  # [B, T, H, VALUE_DIM]
    row_log_scale,  # float32 [B, T, H], contiguous, in base 2
    denominator,  # float32 [B, T, H], contiguous
    row_rest,  # float32 [B, H, T]
    read,
    grad_rest,  # float32 [B, H, T], all that are written
    grad_read,
    delta,
    length,
    heads,
    stride_output_batch,
    stride_output_row,
    stride_output_head,
    stride_grad_output_batch,
    stride_grad_output_row,
    stride_grad_output_head,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the denominator and its gradient contribute to `ROWS` rows of one head."""
    tile, batch, head = program_head(tl.cdiv(length, ROWS), heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    there = rows < length
    output += batch * stride_output_batch + head * stride_output_head
    grad_output += batch * stride_grad_output_batch + head * stride_grad_output_head
    total = tl.zeros([ROWS], tl.float32)
    for column in range(0, VALUE_DIM, BLOCK):
        y = load_tile(output, tile * ROWS, there, stride_output_row, column, BLOCK, VALUE_DIM)
        dy = load_tile(grad_output, tile * ROWS, there, stride_grad_output_row, column, BLOCK, VALUE_DIM)
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
    grad_output: torch.Tensor,
    grad_memory: torch.Tensor | None,
    grad_normalizer: torch.Tensor | None,
    output: torch.Tensor,
    row_log_scale: torch.Tensor,
    denominator: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    log_input: torch.Tensor | None,
    memory: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    log_scale: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    normalize: bool,
    scale: float,
    chunk_size: int | None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the eight differentiable inputs, in their shapes and dtypes; empty for those of None.

    Args:
        grad_output: [B, T, H, Dv].
        grad_memory: float32 [B, H, Dk, Dv], of the final state, or None for zero.
        grad_normalizer: float32 [B, H, Dk], likewise.
        output, row_log_scale, denominator: what the forward returned.
        query, key, value, log_decay, log_input, memory, normalizer, log_scale, document_ids, normalize, scale,
            chunk_size: as in the forward.
    """
    call = Call(
        query,
        key,
        value,
        log_decay,
        log_input,
        memory,
        normalizer,
        log_scale,
        document_ids,
        normalize,
        scale,
        chunk_size,
    )
    output, grad_output = (unit_stride(x.to(query.dtype)) for x in (output, grad_output))
    grad_memory, grad_normalizer = (None if x is None else x.contiguous() for x in (grad_memory, grad_normalizer))
    has_final = grad_memory is not None or grad_normalizer is not None
    with on_device(call.query):
        gates = compute_gates(call, row_log_scale.contiguous() if normalize else None)
        row_whole, row_rest, column_whole, column_rest, read, write = gates.unbind()
        grad_rest, grad_read, delta = row_rest, read, None
        if normalize:
            grad_rest, grad_read, delta = gates.new_empty(3, *row_rest.shape).unbind()
            config = launch_config("grad_rows", call)
            grad_rows_kernel[(triton.cdiv(call.length, config.rows) * call.batch * call.heads,)](
                output,
                grad_output,
                row_log_scale,
                denominator,
                row_rest,
                read,
                grad_rest,
                grad_read,
                delta,
                call.length,
                call.heads,
                *call.strides(output, grad_output),
                VALUE_DIM=call.value_dim,
                ROWS=config.rows,
                BLOCK=config.block,
                **config.options(),
            )
        states, normalizers, final_memory, final_normalizer = compute_states(call, gates, with_final=has_final)
        grad_states, grad_normalizers = call.new_states()
        grad_initial = None if memory is None else gates.new_empty(memory.shape)
        grad_initial_normalizer = None if normalizer is None else gates.new_empty(normalizer.shape)
        config = launch_config("grad_states", call)
        grad_states_kernel[(call.state_programs(config),)](
            call.query,
            grad_output,
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
            call.scale,
            call.length,
            call.heads,
            *call.strides(call.query, grad_output),
            INITIAL=memory is not None,
            **call.state_constants(config),
        )
        grads = [x.new_empty(x.shape) for x in (call.query, call.key, call.value)]
        query_sum, key_sum = gates.new_empty(2, *row_rest.shape).unbind()
        constants = call.constants()
        strides = call.strides(call.query, call.key, call.value, grad_output)
        config = launch_config("grad_query", call)
        grad_query_kernel[(triton.cdiv(call.length, config.rows) * call.batch * call.heads,)](
            call.query,
            call.key,
            call.value,
            grad_output,
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
            *strides,
            **constants,
            **config.tiles(),
            **config.options(),
        )
        constants.pop("INITIAL")
        config = launch_config("grad_key_value", call)
        both = (grads[1], grads[2], key_sum)
        for wanted in (both,) if config.fused else ((grads[1], None, key_sum), (None, grads[2], None)):
            grad_key_value_kernel[(triton.cdiv(call.length, config.keys) * call.batch * call.heads,)](
                call.query,
                call.key,
                call.value,
                grad_output,
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
                *strides,
                **constants,
                **config.tiles(),
                **config.options(),
            )
        # <C_T, dC_T> + <n_T, dn_T>, and the same of the initial state, which is what a log scale's gradient is.
        final_sum = inner(final_memory, grad_memory, final_normalizer, grad_normalizer) if has_final else None
        grad_log_decay = gates.new_empty(log_decay.shape)
        grad_log_input = None if log_input is None else gates.new_empty(log_input.shape)
        config = launch_config("grad_gates", call)
        grad_gates_kernel[(call.batch * call.heads,)](
            query_sum,
            key_sum,
            final_sum,
            call.document_ids,
            grad_log_decay,
            grad_log_input,
            call.length,
            call.heads,
            ROWS=config.rows,
            **config.options(),
        )
    grad_log_scale = None if log_scale is None else inner(memory, grad_initial, normalizer, grad_initial_normalizer)
    others = grad_log_input, grad_initial, grad_initial_normalizer, grad_log_scale
    return *grads, grad_log_decay, *(grad_output.new_empty(0) if x is None else x for x in others)


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
