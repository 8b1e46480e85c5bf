"""Compute the gradients of keys and values on a GPU: one program per tile of keys.

`triton_backward` has the equations, and says what the kernel of the queries leaves for this one.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_tiles import (
    load_slope,
    load_tile,
    row_numbers,
    spread,
    store_tile,
    unfolded,
    with_alibi,
)
from longmix_kernels.attention.triton_walk import cover, program_tile, rows_of_keys, step_start
from longmix_kernels.tiles import product

STRIDES = [
    "stride_first_row_batch",
    "stride_first_row_head",
    "stride_end_row_batch",
    "stride_end_row_head",
    "stride_query_order_batch",
    "stride_query_order_head",
    "stride_key_order_batch",
    "stride_key_order_head",
]
"""Strides that are not specialised: those of bounds and orders depend on the length, and each would start a compile."""


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window", *STRIDES])
def grad_key_value_kernel(
    query,  # [B, Tq, Hq, DIM]
    key,  # [B, Tk, Hkv, DIM]
    value,  # [B, Tk, Hkv, VALUE_DIM]
    first_row,  # int32 [B or 1, Hq or 1, Tk], the transposed bounds, or None
    end_row,  # as first_row
    query_order,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    key_offsets,  # int32 [blocks + 1], or None
    key_blocks,  # int32 [n], or None
    grad_output,  # [B, Tq, Hq, VALUE_DIM]
    shift,  # float32 [B, Hq, Tq], in order: -L / scale, as `grad_query_kernel` wrote it
    minus_delta,  # float32 [B, Hq, Tq], in order, as `grad_query_kernel` wrote it
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
    stride_query_order_batch,
    stride_query_order_head,
    stride_key_order_batch,
    stride_key_order_head,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER_KEY: tl.constexpr,
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
    # Under a causal mask most rows see early keys. Heavy tiles go first, so that the last programs are short ones.
    key_heads = heads // group
    tile, batch, key_head = program_tile(tl.cdiv(keys, KEYS), key_heads)
    start = tile * KEYS
    key += batch * stride_key_batch + key_head * stride_key_head
    value += batch * stride_value_batch + key_head * stride_value_head
    if key_order is not None:
        key_order += batch * stride_key_order_batch + key_head * stride_key_order_head
    count = 0
    if BLOCK > 0:
        key_offsets += start // BLOCK
        key_blocks += tl.load(key_offsets)
        count = tl.load(key_offsets + 1) - tl.load(key_offsets)

    columns = start + tl.arange(0, KEYS)
    last = tl.minimum(start + KEYS, keys) - 1
    key_numbers = row_numbers(key_order, start, keys, KEYS, True)
    k_main = load_tile(key, start, key_numbers, keys, stride_key_row, 0, DIM_MAIN, DIM, True, GATHER_KEY)
    v_main = load_tile(value, start, key_numbers, keys, stride_value_row, 0, VALUE_MAIN, VALUE_DIM, True, GATHER_KEY)
    dk_main = tl.zeros([KEYS, DIM_MAIN], tl.float32)
    dv_main = tl.zeros([KEYS, VALUE_MAIN], tl.float32)
    if DIM_REST > 0:
        k_rest = load_tile(key, start, key_numbers, keys, stride_key_row, DIM_MAIN, DIM_REST, DIM, True, GATHER_KEY)
        dk_rest = tl.zeros([KEYS, DIM_REST], tl.float32)
    if VALUE_REST > 0:
        v_rest = load_tile(
            value, start, key_numbers, keys, stride_value_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, True, GATHER_KEY
        )
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
        order_head = query_order
        if query_order is not None:
            order_head = query_order + batch * stride_query_order_batch + head * stride_query_order_head
        if alibi_slopes is not None:
            slope = load_slope(alibi_slopes, head, scale_log2)
        begin, full_end = rows_of_keys(first_head, end_head, start, start < keys, queries, keys, window, MODE)
        full_begin, end = rows_of_keys(first_head, end_head, last, last < keys, queries, keys, window, MODE)
        begin, leading, full_start, full, trailing_start, trailing = cover(
            begin, full_begin, full_end, end, keys - queries, key_blocks, count, ROWS, BLOCK
        )
        first, stop = rows_of_keys(first_head, end_head, columns, columns < keys, queries, keys, window, MODE)

        for EDGE in tl.static_range(2):
            steps = leading + trailing if EDGE else full
            for step in range(steps):
                # [KEYS, ROWS] transposed scores and their gradients.
                place = step_start(
                    step, begin, leading, full_start, trailing_start, keys - queries, key_blocks, ROWS, BLOCK, EDGE
                )
                rows = place + tl.arange(0, ROWS)
                numbers = row_numbers(order_head, place, end, ROWS, EDGE)
                if EDGE:
                    row_shift = tl.load(shift_head + rows, mask=rows < end, other=0.0)
                    row_delta = tl.load(delta_head + rows, mask=rows < end, other=0.0)
                else:
                    row_shift = tl.load(shift_head + rows)
                    row_delta = tl.load(delta_head + rows)
                q_main = load_tile(q_head, place, numbers, end, stride_query_row, 0, DIM_MAIN, DIM, EDGE, GATHER_QUERY)
                scores = product(k_main, tl.trans(q_main), spread(row_shift, KEYS, FOLD), UPCAST)
                if DIM_REST > 0:
                    q_rest = load_tile(
                        q_head, place, numbers, end, stride_query_row, DIM_MAIN, DIM_REST, DIM, EDGE, GATHER_QUERY
                    )
                    scores = product(k_rest, tl.trans(q_rest), scores, UPCAST)
                scores = unfolded(scores, row_shift, FOLD)
                if alibi_slopes is not None:
                    position = (numbers + (keys - queries))[None, :]
                    scores = with_alibi(scores, slope, key_numbers[:, None], position)
                weights = tl.exp2(scores * scale_log2)
                if EDGE:
                    visible = (first[:, None] <= rows[None, :]) & (rows[None, :] < stop[:, None])
                    weights = tl.where(visible, weights, 0.0)
                do_main = load_tile(
                    do_head, place, numbers, end, stride_grad_output_row, 0, VALUE_MAIN, VALUE_DIM, EDGE, GATHER_QUERY
                )
                grad_weights = product(v_main, tl.trans(do_main), spread(row_delta, KEYS, FOLD), UPCAST)
                low_weights = weights.to(do_main.dtype)
                dv_main = product(low_weights, do_main, dv_main, UPCAST)
                if VALUE_REST > 0:
                    do_rest = load_tile(
                        do_head,
                        place,
                        numbers,
                        end,
                        stride_grad_output_row,
                        VALUE_MAIN,
                        VALUE_REST,
                        VALUE_DIM,
                        EDGE,
                        GATHER_QUERY,
                    )
                    grad_weights = product(v_rest, tl.trans(do_rest), grad_weights, UPCAST)
                    dv_rest = product(low_weights, do_rest, dv_rest, UPCAST)
                grad_scores = (weights * unfolded(grad_weights, row_delta, FOLD)).to(q_main.dtype)
                dk_main = product(grad_scores, q_main, dk_main, UPCAST)
                if DIM_REST > 0:
                    dk_rest = product(grad_scores, q_rest, dk_rest, UPCAST)

    stride_row, stride_value = key_heads * DIM, key_heads * VALUE_DIM
    grad_key += batch * keys * stride_row + key_head * DIM
    grad_value += batch * keys * stride_value + key_head * VALUE_DIM
    result = dk_main * scale
    store_tile(grad_key, result, start, key_numbers, keys, stride_row, 0, DIM_MAIN, DIM, GATHER_KEY)
    store_tile(grad_value, dv_main, start, key_numbers, keys, stride_value, 0, VALUE_MAIN, VALUE_DIM, GATHER_KEY)
    if DIM_REST > 0:
        result = dk_rest * scale
        store_tile(grad_key, result, start, key_numbers, keys, stride_row, DIM_MAIN, DIM_REST, DIM, GATHER_KEY)
    if VALUE_REST > 0:
        store_tile(
            grad_value, dv_rest, start, key_numbers, keys, stride_value, VALUE_MAIN, VALUE_REST, VALUE_DIM, GATHER_KEY
        )
