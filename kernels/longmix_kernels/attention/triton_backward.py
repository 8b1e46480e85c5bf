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
import triton.language as tl

from longmix_kernels.attention.bounds import key_bounds
from longmix_kernels.attention.launch import Call, launch_config, on_device, unit_stride
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.triton_tiles import (
    cover,
    keys_of_rows,
    load_tile,
    product,
    rows_of_keys,
    spread,
    step_start,
    store_tile,
    unfolded,
)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def grad_query_kernel(
    query,  # [B, Tq, Hq, DIM]
    key,  # [B, Tk, Hkv, DIM]
    value,  # [B, Tk, Hkv, VALUE_DIM]
    lo,  # int32 [B or 1, Hq or 1, Tq], or None
    hi,
    output,  # [B, Tq, Hq, VALUE_DIM], contiguous
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    grad_output,  # [B, Tq, Hq, VALUE_DIM]
    grad_logsumexp,  # float32 [B, Tq, Hq], contiguous, or None
    grad_query,  # [B, Tq, Hq, DIM], contiguous
    shift,  # float32 [B, Hq, Tq], written: -L / scale, which makes the weights exp(scale * (score + shift))
    minus_delta,  # float32 [B, Hq, Tq], written
    scale,
    scale_log2,  # scale * log2(e)
    queries,
    keys,
    heads,  # Hq
    group,  # Hq / Hkv
    window,
    stride_query_batch,
    stride_query_row,
    stride_query_head,
    stride_key_batch,
    stride_key_row,
    stride_key_head,
    stride_value_batch,
    stride_value_row,
    stride_value_head,
    stride_grad_output_batch,
    stride_grad_output_row,
    stride_grad_output_head,
    stride_lo_batch,
    stride_lo_head,
    stride_hi_batch,
    stride_hi_head,
    MODE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr,
    DIM_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the query gradient, the base-2 logsumexp and delta of `ROWS` query rows of one head."""
    # Heavy tiles first, as in the forward.
    tiles = tl.cdiv(queries, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // group * stride_key_head
    value += batch * stride_value_batch + head // group * stride_value_head
    grad_output += batch * stride_grad_output_batch + head * stride_grad_output_head
    if MODE == "bounds" or MODE == "documents":
        lo += batch * stride_lo_batch + head * stride_lo_head
    if MODE == "bounds":
        hi += batch * stride_hi_batch + head * stride_hi_head

    start = tile * ROWS
    rows = start + tl.arange(0, ROWS)
    inside = rows < queries
    last = tl.minimum(start + ROWS, queries) - 1
    begin, full_end = keys_of_rows(lo, hi, start, start < queries, queries, keys, window, MODE)
    full_begin, end = keys_of_rows(lo, hi, last, last < queries, queries, keys, window, MODE)
    leading, full_start, full, trailing_start, trailing = cover(begin, full_begin, full_end, end, KEYS)
    first_key, end_key = keys_of_rows(lo, hi, rows, inside, queries, keys, window, MODE)

    stride_output_row = heads * VALUE_DIM
    output += batch * queries * stride_output_row + head * VALUE_DIM
    out = load_tile(output, start, queries, stride_output_row, ROWS, 0, VALUE_MAIN, VALUE_DIM, True)
    do_main = load_tile(grad_output, start, queries, stride_grad_output_row, ROWS, 0, VALUE_MAIN, VALUE_DIM, True)
    row_delta = tl.sum(out.to(tl.float32) * do_main.to(tl.float32), 1)
    if VALUE_REST > 0:
        out = load_tile(output, start, queries, stride_output_row, ROWS, VALUE_MAIN, VALUE_REST, VALUE_DIM, True)
        do_rest = load_tile(
            grad_output, start, queries, stride_grad_output_row, ROWS, VALUE_MAIN, VALUE_REST, VALUE_DIM, True
        )
        row_delta += tl.sum(out.to(tl.float32) * do_rest.to(tl.float32), 1)
    natural_place = batch * queries * heads + head + rows.to(tl.int64) * heads
    natural = tl.load(logsumexp + natural_place, mask=inside, other=float("-inf"))
    empty = natural == float("-inf")
    if grad_logsumexp is not None:
        grad_natural = tl.load(grad_logsumexp + natural_place, mask=inside, other=0.0)
        # What arrives for a row that sees nothing may be NaN.
        row_delta -= tl.where(empty, 0.0, grad_natural)
    # log2(e) turns the natural logsumexp into the base-2 one.
    row_lse = tl.where(empty, float("inf"), natural * 1.4426950408889634)
    row_place = (batch * heads + head) * queries + rows
    tl.store(shift + row_place, -row_lse / scale_log2, mask=inside)
    tl.store(minus_delta + row_place, -row_delta, mask=inside)

    q_main = load_tile(query, start, queries, stride_query_row, ROWS, 0, DIM_MAIN, DIM, True)
    sum_main = tl.zeros([ROWS, DIM_MAIN], tl.float32)
    if DIM_REST > 0:
        q_rest = load_tile(query, start, queries, stride_query_row, ROWS, DIM_MAIN, DIM_REST, DIM, True)
        sum_rest = tl.zeros([ROWS, DIM_REST], tl.float32)

    for EDGE in tl.static_range(2):
        steps = leading + trailing if EDGE else full
        for step in range(steps):
            # [ROWS, KEYS] scores and their gradients.
            place = step_start(step, begin, leading, full_start, trailing_start, KEYS, EDGE)
            k_main = load_tile(key, place, end, stride_key_row, KEYS, 0, DIM_MAIN, DIM, EDGE)
            scores = product(q_main, tl.trans(k_main), None, UPCAST)
            if DIM_REST > 0:
                k_rest = load_tile(key, place, end, stride_key_row, KEYS, DIM_MAIN, DIM_REST, DIM, EDGE)
                scores = product(q_rest, tl.trans(k_rest), scores, UPCAST)
            weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
            if EDGE:
                columns = place + tl.arange(0, KEYS)
                visible = (first_key[:, None] <= columns[None, :]) & (columns[None, :] < end_key[:, None])
                weights = tl.where(visible, weights, 0.0)
            v = load_tile(value, place, end, stride_value_row, KEYS, 0, VALUE_MAIN, VALUE_DIM, EDGE)
            grad_weights = product(do_main, tl.trans(v), None, UPCAST)
            if VALUE_REST > 0:
                v = load_tile(value, place, end, stride_value_row, KEYS, VALUE_MAIN, VALUE_REST, VALUE_DIM, EDGE)
                grad_weights = product(do_rest, tl.trans(v), grad_weights, UPCAST)
            grad_scores = (weights * (grad_weights - row_delta[:, None])).to(k_main.dtype)
            sum_main = product(grad_scores, k_main, sum_main, UPCAST)
            if DIM_REST > 0:
                sum_rest = product(grad_scores, k_rest, sum_rest, UPCAST)

    stride_row = heads * DIM
    grad_query += batch * queries * stride_row + head * DIM
    store_tile(grad_query, sum_main * scale, start, queries, stride_row, ROWS, 0, DIM_MAIN, DIM)
    if DIM_REST > 0:
        store_tile(grad_query, sum_rest * scale, start, queries, stride_row, ROWS, DIM_MAIN, DIM_REST, DIM)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def grad_key_value_kernel(
    query,  # [B, Tq, Hq, DIM]
    key,  # [B, Tk, Hkv, DIM]
    value,  # [B, Tk, Hkv, VALUE_DIM]
    first_row,  # int32 [B or 1, Hq or 1, Tk], the transposed bounds, or None
    end_row,
    grad_output,  # [B, Tq, Hq, VALUE_DIM]
    shift,  # float32 [B, Hq, Tq], as the first kernel wrote it
    minus_delta,  # float32 [B, Hq, Tq]
    grad_key,  # [B, Tk, Hkv, DIM], contiguous
    grad_value,  # [B, Tk, Hkv, VALUE_DIM], contiguous
    scale,
    scale_log2,  # scale * log2(e)
    queries,
    keys,
    heads,  # Hq
    group,  # Hq / Hkv
    window,
    stride_query_batch,
    stride_query_row,
    stride_query_head,
    stride_key_batch,
    stride_key_row,
    stride_key_head,
    stride_value_batch,
    stride_value_row,
    stride_value_head,
    stride_grad_output_batch,
    stride_grad_output_row,
    stride_grad_output_head,
    stride_first_row_batch,
    stride_first_row_head,
    stride_end_row_batch,
    stride_end_row_head,
    MODE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr,
    DIM_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write the gradients of `KEYS` keys and values of one key head."""
    # Early keys are seen by most rows under a causal mask: heavy tiles first.
    tiles = tl.cdiv(keys, KEYS)
    tile = tl.program_id(0) % tiles
    key_heads = heads // group
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    key += batch * stride_key_batch + key_head * stride_key_head
    value += batch * stride_value_batch + key_head * stride_value_head

    start = tile * KEYS
    columns = start + tl.arange(0, KEYS)
    last = tl.minimum(start + KEYS, keys) - 1
    k_main = load_tile(key, start, keys, stride_key_row, KEYS, 0, DIM_MAIN, DIM, True)
    v_main = load_tile(value, start, keys, stride_value_row, KEYS, 0, VALUE_MAIN, VALUE_DIM, True)
    dk_main = tl.zeros([KEYS, DIM_MAIN], tl.float32)
    dv_main = tl.zeros([KEYS, VALUE_MAIN], tl.float32)
    if DIM_REST > 0:
        k_rest = load_tile(key, start, keys, stride_key_row, KEYS, DIM_MAIN, DIM_REST, DIM, True)
        dk_rest = tl.zeros([KEYS, DIM_REST], tl.float32)
    if VALUE_REST > 0:
        v_rest = load_tile(value, start, keys, stride_value_row, KEYS, VALUE_MAIN, VALUE_REST, VALUE_DIM, True)
        dv_rest = tl.zeros([KEYS, VALUE_REST], tl.float32)

    for member in range(group):
        head = key_head * group + member
        q_head = query + batch * stride_query_batch + head * stride_query_head
        do_head = grad_output + batch * stride_grad_output_batch + head * stride_grad_output_head
        shift_head = shift + (batch * heads + head) * queries
        delta_head = minus_delta + (batch * heads + head) * queries
        first_head, end_head = first_row, end_row
        if MODE == "bounds":
            first_head = first_row + batch * stride_first_row_batch + head * stride_first_row_head
        if MODE == "bounds" or MODE == "documents":
            end_head = end_row + batch * stride_end_row_batch + head * stride_end_row_head
        begin, full_end = rows_of_keys(first_head, end_head, start, start < keys, queries, keys, window, MODE)
        full_begin, end = rows_of_keys(first_head, end_head, last, last < keys, queries, keys, window, MODE)
        leading, full_start, full, trailing_start, trailing = cover(begin, full_begin, full_end, end, ROWS)
        first, stop = rows_of_keys(first_head, end_head, columns, columns < keys, queries, keys, window, MODE)

        for EDGE in tl.static_range(2):
            steps = leading + trailing if EDGE else full
            for step in range(steps):
                # [KEYS, ROWS] transposed scores and their gradients.
                place = step_start(step, begin, leading, full_start, trailing_start, ROWS, EDGE)
                rows = place + tl.arange(0, ROWS)
                if EDGE:
                    row_shift = tl.load(shift_head + rows, mask=rows < end, other=0.0)
                    row_delta = tl.load(delta_head + rows, mask=rows < end, other=0.0)
                else:
                    row_shift = tl.load(shift_head + rows)
                    row_delta = tl.load(delta_head + rows)
                q_main = load_tile(q_head, place, end, stride_query_row, ROWS, 0, DIM_MAIN, DIM, EDGE)
                scores = product(k_main, tl.trans(q_main), spread(row_shift, KEYS, FOLD), UPCAST)
                if DIM_REST > 0:
                    q_rest = load_tile(q_head, place, end, stride_query_row, ROWS, DIM_MAIN, DIM_REST, DIM, EDGE)
                    scores = product(k_rest, tl.trans(q_rest), scores, UPCAST)
                weights = tl.exp2(unfolded(scores, row_shift, FOLD) * scale_log2)
                if EDGE:
                    visible = (first[:, None] <= rows[None, :]) & (rows[None, :] < stop[:, None])
                    weights = tl.where(visible, weights, 0.0)
                do_main = load_tile(do_head, place, end, stride_grad_output_row, ROWS, 0, VALUE_MAIN, VALUE_DIM, EDGE)
                grad_weights = product(v_main, tl.trans(do_main), spread(row_delta, KEYS, FOLD), UPCAST)
                low_weights = weights.to(do_main.dtype)
                dv_main = product(low_weights, do_main, dv_main, UPCAST)
                if VALUE_REST > 0:
                    do_rest = load_tile(
                        do_head, place, end, stride_grad_output_row, ROWS, VALUE_MAIN, VALUE_REST, VALUE_DIM, EDGE
                    )
                    grad_weights = product(v_rest, tl.trans(do_rest), grad_weights, UPCAST)
                    dv_rest = product(low_weights, do_rest, dv_rest, UPCAST)
                grad_scores = (weights * unfolded(grad_weights, row_delta, FOLD)).to(q_main.dtype)
                dk_main = product(grad_scores, q_main, dk_main, UPCAST)
                if DIM_REST > 0:
                    dk_rest = product(grad_scores, q_rest, dk_rest, UPCAST)

    stride_row, stride_value = heads // group * DIM, heads // group * VALUE_DIM
    grad_key += batch * keys * stride_row + key_head * DIM
    grad_value += batch * keys * stride_value + key_head * VALUE_DIM
    store_tile(grad_key, dk_main * scale, start, keys, stride_row, KEYS, 0, DIM_MAIN, DIM)
    store_tile(grad_value, dv_main, start, keys, stride_value, KEYS, 0, VALUE_MAIN, VALUE_DIM)
    if DIM_REST > 0:
        store_tile(grad_key, dk_rest * scale, start, keys, stride_row, KEYS, DIM_MAIN, DIM_REST, DIM)
    if VALUE_REST > 0:
        store_tile(grad_value, dv_rest, start, keys, stride_value, KEYS, VALUE_MAIN, VALUE_REST, VALUE_DIM)


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
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    grad_output = unit_stride(grad_output.to(call.query.dtype))
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.float().contiguous()
    shift, minus_delta = call.query.new_empty(2, call.batch, call.heads, call.queries, dtype=torch.float32)
    first_row = end_row = None
    if call.lo is not None:
        # Without `hi`, the first row that sees a key has a closed form, and only the end needs the search.
        hi = call.lo if call.hi is None else call.hi
        first_row, end_row = key_bounds(call.lo, hi, call.keys)
        first_row = None if call.hi is None else first_row
    grad_strides = grad_output.stride()[:3]
    constants = call.constants()
    with on_device(call.query):
        config = launch_config("grad_query", call)
        grad_query_kernel[(triton.cdiv(call.queries, config.rows) * call.batch * call.heads,)](
            call.query,
            call.key,
            call.value,
            call.lo,
            call.hi,
            output.contiguous(),
            logsumexp.contiguous(),
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
            *call.strides("query", "key", "value"),
            *grad_strides,
            *call.bound_strides(call.lo, call.hi),
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
            *call.strides("query", "key", "value"),
            *grad_strides,
            *call.bound_strides(first_row, end_row),
            **constants,
            FOLD=config.fold,
            **config.tiles(),
            **config.options(),
        )
    return grads
