"""Compute the gradients of keys and values on a GPU: one program per tile of keys.

`triton_backward` has the equations, and says what the kernel of the queries leaves for this one.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_tiles import (
    Parts,
    add_products,
    inner,
    load_part,
    load_rows,
    load_slope,
    row_numbers,
    scaled,
    spread,
    store_rows,
    unfolded,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import block_list, cover, is_visible, rows_of_keys, step_start
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, product, program_head


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def grad_key_value_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    grad_output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    first_row: PerRow,  # int32 [B or 1, Hq or 1, Tk], the transposed bounds, or None
    end_row: PerRow,  # as first_row
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    key_offsets,  # int32 [blocks + 1], or None
    key_blocks,  # int32 [n], or None
    shift,  # float32 [B, Hq, Tq], in order: -L / scale, as `grad_query_kernel` wrote it
    minus_delta,  # float32 [B, Hq, Tq], in order, as `grad_query_kernel` wrote it
    grad_key,  # [B, Tk, Hkv, DIM.SIZE], contiguous
    grad_value,  # [B, Tk, Hkv, VALUE_DIM.SIZE], contiguous
    scale,
    scale_log2,  # scale * log2(e)
    queries,
    keys,
    heads,  # Hq
    group,  # Hq / Hkv
    window,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER_KEY: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write the gradients of `KEYS` keys and values of one key head."""
    # Under a causal mask most rows see early keys. Heavy tiles go first, so that the last programs are short ones.
    key_heads = heads // group
    tile, batch, key_head = program_head(tl.cdiv(keys, KEYS), key_heads)
    start = tile * KEYS
    key_order = key_order if key_order is None else head_vector(key_order, batch, key_head, keys)
    count = 0
    if BLOCK > 0:
        key_blocks, count = block_list(key_offsets, key_blocks, start // BLOCK)

    columns = start + tl.arange(0, KEYS)
    last = tl.minimum(start + KEYS, keys) - 1
    key_numbers = row_numbers(key_order, start, keys, KEYS, True)
    k = load_rows(head_rows(key, batch, key_head), start, key_numbers, keys, DIM, True, GATHER_KEY)
    v = load_rows(head_rows(value, batch, key_head), start, key_numbers, keys, VALUE_DIM, True, GATHER_KEY)
    dk, dv = zeros(KEYS, DIM), zeros(KEYS, VALUE_DIM)

    for member in range(group):
        head = key_head * group + member
        query_rows, do_rows = head_rows(query, batch, head), head_rows(grad_output, batch, head)
        shift_head = shift + (batch * heads + head) * queries
        delta_head = minus_delta + (batch * heads + head) * queries
        first_head = first_row if first_row is None else head_vector(first_row, batch, head, keys)
        end_head = end_row if end_row is None else head_vector(end_row, batch, head, keys)
        order_head = query_order if query_order is None else head_vector(query_order, batch, head, queries)
        if alibi_slopes is not None:
            slope = load_slope(alibi_slopes, head, scale_log2)
        begin, full_end = rows_of_keys(first_head, end_head, start, start < keys, queries, keys, window, MODE)
        full_begin, end = rows_of_keys(first_head, end_head, last, last < keys, queries, keys, window, MODE)
        walk = cover(begin, full_begin, full_end, end, keys - queries, key_blocks, count, ROWS, BLOCK)
        first, stop = rows_of_keys(first_head, end_head, columns, columns < keys, queries, keys, window, MODE)

        for EDGE in tl.static_range(2):
            steps = walk.leading + walk.trailing if EDGE else walk.full
            for step in range(steps):
                # [KEYS, ROWS] transposed scores and their gradients.
                place = step_start(step, walk, keys - queries, key_blocks, ROWS, BLOCK, EDGE)
                rows = place + tl.arange(0, ROWS)
                numbers = row_numbers(order_head, place, end, ROWS, EDGE)
                if EDGE:
                    row_shift = tl.load(shift_head + rows, mask=rows < end, other=0.0)
                    row_delta = tl.load(delta_head + rows, mask=rows < end, other=0.0)
                else:
                    row_shift = tl.load(shift_head + rows)
                    row_delta = tl.load(delta_head + rows)
                q = load_rows(query_rows, place, numbers, end, DIM, EDGE, GATHER_QUERY)
                scores = inner(k, q, spread(row_shift, KEYS, FOLD), DIM, UPCAST)
                scores = unfolded(scores, row_shift, FOLD)
                if alibi_slopes is not None:
                    position = (numbers + (keys - queries))[None, :]
                    scores = with_alibi(scores, slope, key_numbers[:, None], position)
                weights = tl.exp2(scores * scale_log2)
                if EDGE:
                    weights = tl.where(is_visible(first, stop, rows), weights, 0.0)
                # One part after the other: with both parts at once, a head dimension of 192 spills.
                do = load_part(do_rows, place, numbers, end, 0, VALUE_DIM.MAIN, VALUE_DIM.SIZE, EDGE, GATHER_QUERY)
                grad_weights = product(v.main, tl.trans(do), spread(row_delta, KEYS, FOLD), UPCAST)
                low_weights = weights.to(do.dtype)
                dv_main, dv_rest = product(low_weights, do, dv.main, UPCAST), dv.rest
                if VALUE_DIM.REST > 0:
                    do = load_part(
                        do_rows, place, numbers, end, VALUE_DIM.MAIN, VALUE_DIM.REST, VALUE_DIM.SIZE, EDGE, GATHER_QUERY
                    )
                    grad_weights = product(v.rest, tl.trans(do), grad_weights, UPCAST)
                    dv_rest = product(low_weights, do, dv_rest, UPCAST)
                dv = Parts(dv_main, dv_rest)
                grad_scores = (weights * unfolded(grad_weights, row_delta, FOLD)).to(q.main.dtype)
                dk = add_products(grad_scores, q, dk, DIM, UPCAST)

    key_rows = packed_rows(grad_key, batch, keys, key_head, key_heads, DIM.SIZE)
    value_rows = packed_rows(grad_value, batch, keys, key_head, key_heads, VALUE_DIM.SIZE)
    store_rows(key_rows, scaled(dk, scale, DIM), start, key_numbers, keys, DIM, GATHER_KEY)
    store_rows(value_rows, dv, start, key_numbers, keys, VALUE_DIM, GATHER_KEY)
