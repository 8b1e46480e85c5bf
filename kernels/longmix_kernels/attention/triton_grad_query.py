"""Compute the gradients of queries on a GPU: one program per tile of query rows.

`triton_backward` has the equations. This kernel also writes what the kernel of keys and values needs of each row.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_tiles import load_slope, load_tile, row_numbers, store_tile, with_alibi
from longmix_kernels.attention.triton_walk import cover, keys_of_rows, program_tile, step_start
from longmix_kernels.tiles import product

STRIDES = [
    "stride_lo_batch",
    "stride_lo_head",
    "stride_hi_batch",
    "stride_hi_head",
    "stride_query_order_batch",
    "stride_query_order_head",
    "stride_key_order_batch",
    "stride_key_order_head",
]
"""Strides that are not specialised: those of bounds and orders depend on the length, and each would start a compile."""


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window", *STRIDES])
def grad_query_kernel(
    query,  # [B, Tq, Hq, DIM]
    key,  # [B, Tk, Hkv, DIM]
    value,  # [B, Tk, Hkv, VALUE_DIM]
    lo,  # int32 [B or 1, Hq or 1, Tq], or None
    hi,  # as lo
    query_order,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    row_offsets,  # int32 [blocks + 1], or None
    row_blocks,  # int32 [n], or None
    output,  # [B, Tq, Hq, VALUE_DIM]
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    grad_output,  # [B, Tq, Hq, VALUE_DIM]
    grad_logsumexp,  # float32 [B, Tq, Hq], contiguous, or None
    grad_query,  # [B, Tq, Hq, DIM], contiguous
    shift,  # written, float32 [B, Hq, Tq], in order: -L / scale; the weights are exp(scale * (score + shift))
    minus_delta,  # written, float32 [B, Hq, Tq], in order
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
    stride_output_batch,
    stride_output_row,
    stride_output_head,
    stride_grad_output_batch,
    stride_grad_output_row,
    stride_grad_output_head,
    stride_lo_batch,
    stride_lo_head,
    stride_hi_batch,
    stride_hi_head,
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
):
    """Write the query gradient of `ROWS` query rows of one head, and their `shift` and `minus_delta`."""
    # Heavy tiles go first, as in the forward.
    tiles = tl.cdiv(queries, ROWS)
    tile, batch, head = program_tile(tiles, heads)
    start = (tiles - 1 - tile) * ROWS
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head // group * stride_key_head
    value += batch * stride_value_batch + head // group * stride_value_head
    grad_output += batch * stride_grad_output_batch + head * stride_grad_output_head
    if MODE == "bounds" or MODE == "documents":
        lo += batch * stride_lo_batch + head * stride_lo_head
    if MODE == "bounds":
        hi += batch * stride_hi_batch + head * stride_hi_head
    if query_order is not None:
        query_order += batch * stride_query_order_batch + head * stride_query_order_head
    if key_order is not None:
        key_order += batch * stride_key_order_batch + head // group * stride_key_order_head
    count = 0
    if BLOCK > 0:
        row_offsets += (start + keys - queries) // BLOCK
        row_blocks += tl.load(row_offsets)
        count = tl.load(row_offsets + 1) - tl.load(row_offsets)

    rows = start + tl.arange(0, ROWS)
    inside = rows < queries
    last = tl.minimum(start + ROWS, queries) - 1
    begin, full_end = keys_of_rows(lo, hi, start, start < queries, queries, keys, window, MODE)
    full_begin, end = keys_of_rows(lo, hi, last, last < queries, queries, keys, window, MODE)
    begin, leading, full_start, full, trailing_start, trailing = cover(
        begin, full_begin, full_end, end, 0, row_blocks, count, KEYS, BLOCK
    )
    first_key, end_key = keys_of_rows(lo, hi, rows, inside, queries, keys, window, MODE)

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    output += batch * stride_output_batch + head * stride_output_head
    out = load_tile(output, start, numbers, queries, stride_output_row, 0, VALUE_MAIN, VALUE_DIM, True, GATHER_QUERY)
    do_main = load_tile(
        grad_output, start, numbers, queries, stride_grad_output_row, 0, VALUE_MAIN, VALUE_DIM, True, GATHER_QUERY
    )
    row_delta = tl.sum(out.to(tl.float32) * do_main.to(tl.float32), 1)
    if VALUE_REST > 0:
        out = load_tile(
            output, start, numbers, queries, stride_output_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, True, GATHER_QUERY
        )
        do_rest = load_tile(
            grad_output,
            start,
            numbers,
            queries,
            stride_grad_output_row,
            VALUE_MAIN,
            VALUE_REST,
            VALUE_DIM,
            True,
            GATHER_QUERY,
        )
        row_delta += tl.sum(out.to(tl.float32) * do_rest.to(tl.float32), 1)
    own = numbers if GATHER_QUERY else rows
    natural_place = batch * queries * heads + head + own.to(tl.int64) * heads
    natural = tl.load(logsumexp + natural_place, mask=inside, other=float("-inf"))
    empty = natural == float("-inf")
    if grad_logsumexp is not None:
        grad_natural = tl.load(grad_logsumexp + natural_place, mask=inside, other=0.0)
        # The gradient that arrives for a row that sees nothing may be NaN.
        row_delta -= tl.where(empty, 0.0, grad_natural)
    # log2(e) turns the natural logsumexp into the base-2 one.
    row_lse = tl.where(empty, float("inf"), natural * 1.4426950408889634)
    row_place = (batch * heads + head) * queries + rows
    tl.store(shift + row_place, -row_lse / scale_log2, mask=inside)
    tl.store(minus_delta + row_place, -row_delta, mask=inside)

    q_main = load_tile(query, start, numbers, queries, stride_query_row, 0, DIM_MAIN, DIM, True, GATHER_QUERY)
    sum_main = tl.zeros([ROWS, DIM_MAIN], tl.float32)
    if DIM_REST > 0:
        q_rest = load_tile(
            query, start, numbers, queries, stride_query_row, DIM_MAIN, DIM_REST, DIM, True, GATHER_QUERY
        )
        sum_rest = tl.zeros([ROWS, DIM_REST], tl.float32)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)

    for EDGE in tl.static_range(2):
        steps = leading + trailing if EDGE else full
        for step in range(steps):
            # [ROWS, KEYS] scores and their gradients.
            place = step_start(step, begin, leading, full_start, trailing_start, 0, row_blocks, KEYS, BLOCK, EDGE)
            columns = row_numbers(key_order, place, end, KEYS, EDGE)
            k_main = load_tile(key, place, columns, end, stride_key_row, 0, DIM_MAIN, DIM, EDGE, GATHER_KEY)
            scores = product(q_main, tl.trans(k_main), None, UPCAST)
            if DIM_REST > 0:
                k_rest = load_tile(key, place, columns, end, stride_key_row, DIM_MAIN, DIM_REST, DIM, EDGE, GATHER_KEY)
                scores = product(q_rest, tl.trans(k_rest), scores, UPCAST)
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
            if EDGE:
                places = (place + tl.arange(0, KEYS))[None, :]
                visible = (first_key[:, None] <= places) & (places < end_key[:, None])
                weights = tl.where(visible, weights, 0.0)
            v = load_tile(value, place, columns, end, stride_value_row, 0, VALUE_MAIN, VALUE_DIM, EDGE, GATHER_KEY)
            grad_weights = product(do_main, tl.trans(v), None, UPCAST)
            if VALUE_REST > 0:
                v = load_tile(
                    value, place, columns, end, stride_value_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, EDGE, GATHER_KEY
                )
                grad_weights = product(do_rest, tl.trans(v), grad_weights, UPCAST)
            grad_scores = (weights * (grad_weights - row_delta[:, None])).to(k_main.dtype)
            sum_main = product(grad_scores, k_main, sum_main, UPCAST)
            if DIM_REST > 0:
                sum_rest = product(grad_scores, k_rest, sum_rest, UPCAST)

    stride_row = heads * DIM
    grad_query += batch * queries * stride_row + head * DIM
    result = sum_main * scale
    store_tile(grad_query, result, start, numbers, queries, stride_row, 0, DIM_MAIN, DIM, GATHER_QUERY)
    if DIM_REST > 0:
        result = sum_rest * scale
        store_tile(grad_query, result, start, numbers, queries, stride_row, DIM_MAIN, DIM_REST, DIM, GATHER_QUERY)
