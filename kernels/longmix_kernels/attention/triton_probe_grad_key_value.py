"""Compute the gradients of keys and values of attention with a probe on a GPU: one program per tile of keys.

`triton_probe_backward` has the equations, and says what the kernel of the queries leaves for this one.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_tiles import (
    add_products,
    inner,
    load_rows,
    load_slope,
    row_numbers,
    spread,
    store_rows,
    unfolded,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import cover, is_visible, rows_of_keys, step_start
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, program_head


@triton.jit
def load_numbers(vector, rows, end, MASKED: tl.constexpr):
    """Load the numbers of rows [N]; 0 from row `end` on if `MASKED`."""
    if MASKED:
        return tl.load(vector + rows, mask=rows < end, other=0.0)
    else:
        return tl.load(vector + rows)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def probe_grad_key_value_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    probe: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    grad_output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    first_row: PerRow,  # int32 [B or 1, Hq or 1, Tk], the transposed bounds, or None
    end_row: PerRow,  # as first_row
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    shift,  # float32 [B, Hq, Tq], in order, as `probe_grad_query_kernel` wrote it; so are the next three
    minus_level,
    minus_base,
    rest,
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
    # Heavy tiles go first, as in `grad_key_value_kernel`.
    key_heads = heads // group
    tile, batch, key_head = program_head(tl.cdiv(keys, KEYS), key_heads)
    start = tile * KEYS
    key_order = key_order if key_order is None else head_vector(key_order, batch, key_head, keys)
    columns = start + tl.arange(0, KEYS)
    last = tl.minimum(start + KEYS, keys) - 1
    key_numbers = row_numbers(key_order, start, keys, KEYS, True)
    k = load_rows(head_rows(key, batch, key_head), start, key_numbers, keys, DIM, True, GATHER_KEY)
    v = load_rows(head_rows(value, batch, key_head), start, key_numbers, keys, VALUE_DIM, True, GATHER_KEY)
    dk, dv = zeros(KEYS, DIM), zeros(KEYS, VALUE_DIM)

    for member in range(group):
        head = key_head * group + member
        query_rows, probe_rows = head_rows(query, batch, head), head_rows(probe, batch, head)
        do_rows = head_rows(grad_output, batch, head)
        numbers_of_head = (batch * heads + head) * queries
        first_head = first_row if first_row is None else head_vector(first_row, batch, head, keys)
        end_head = end_row if end_row is None else head_vector(end_row, batch, head, keys)
        order_head = query_order if query_order is None else head_vector(query_order, batch, head, queries)
        if alibi_slopes is not None:
            slope = load_slope(alibi_slopes, head, scale_log2)
        begin, full_end = rows_of_keys(first_head, end_head, start, start < keys, queries, keys, window, MODE)
        full_begin, end = rows_of_keys(first_head, end_head, last, last < keys, queries, keys, window, MODE)
        walk = cover(begin, full_begin, full_end, end, keys - queries, None, 0, ROWS, 0)
        first, stop = rows_of_keys(first_head, end_head, columns, columns < keys, queries, keys, window, MODE)

        for EDGE in tl.static_range(2):
            steps = walk.leading + walk.trailing if EDGE else walk.full
            for step in range(steps):
                # [KEYS, ROWS] transposed scores, factors of the weights, and their gradients.
                place = step_start(step, walk, keys - queries, None, ROWS, 0, EDGE)
                rows = place + tl.arange(0, ROWS)
                numbers = row_numbers(order_head, place, end, ROWS, EDGE)
                row_shift = load_numbers(shift + numbers_of_head, rows, end, EDGE)
                q = load_rows(query_rows, place, numbers, end, DIM, EDGE, GATHER_QUERY)
                scores = inner(k, q, spread(row_shift, KEYS, FOLD), DIM, UPCAST)
                scores = unfolded(scores, row_shift, FOLD)
                if alibi_slopes is not None:
                    position = (numbers + (keys - queries))[None, :]
                    scores = with_alibi(scores, slope, key_numbers[:, None], position)
                weights = tl.exp2(scores * scale_log2)
                do = load_rows(do_rows, place, numbers, end, VALUE_DIM, EDGE, GATHER_QUERY)
                row_base = load_numbers(minus_base + numbers_of_head, rows, end, EDGE)
                change = inner(v, do, spread(row_base, KEYS, FOLD), VALUE_DIM, UPCAST)
                change = unfolded(change, row_base, FOLD)
                r = load_rows(probe_rows, place, numbers, end, DIM, EDGE, GATHER_QUERY)
                row_level = load_numbers(minus_level + numbers_of_head, rows, end, EDGE)
                minus_factor = inner(k, r, spread(row_level, KEYS, FOLD), DIM, UPCAST)
                minus_factor = unfolded(minus_factor, row_level, FOLD)
                if EDGE:
                    visible = is_visible(first, stop, rows)
                    weights = tl.where(visible, weights, 0.0)
                    minus_factor = tl.where(visible, minus_factor, 0.0)
                change *= weights
                # Each number is loaded where it is used, and each product is taken as soon as its factors are there:
                # what lives longer takes registers.
                dk = add_products((-change).to(r.main.dtype), r, dk, DIM, UPCAST)
                dv = add_products((weights * -minus_factor).to(do.main.dtype), do, dv, VALUE_DIM, UPCAST)
                row_rest = load_numbers(rest + numbers_of_head, rows, end, EDGE)
                grad_scores = (weights * row_rest[None, :] - minus_factor * change) * scale
                dk = add_products(grad_scores.to(q.main.dtype), q, dk, DIM, UPCAST)

    key_rows = packed_rows(grad_key, batch, keys, key_head, key_heads, DIM.SIZE)
    value_rows = packed_rows(grad_value, batch, keys, key_head, key_heads, VALUE_DIM.SIZE)
    store_rows(key_rows, dk, start, key_numbers, keys, DIM, GATHER_KEY)
    store_rows(value_rows, dv, start, key_numbers, keys, VALUE_DIM, GATHER_KEY)
