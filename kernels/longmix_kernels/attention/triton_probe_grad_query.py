"""Compute the gradients of queries and probes on a GPU: one program per tile of query rows.

`triton_probe_backward` has the equations. This kernel also writes what the kernel of keys and values needs of each row.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_grad_query import row_sums
from longmix_kernels.attention.triton_tiles import (
    add_products,
    inner,
    load_rows,
    load_slope,
    row_numbers,
    scaled,
    store_rows,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import cover_keys, is_visible, step_start
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, program_head


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def probe_grad_query_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    probe: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    plain: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    grad_output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    lo: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None
    hi: PerRow,  # as lo
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    expected,  # float32 [B, Tq, Hq], contiguous, the mean of probe . key
    grad_query,  # [B, Tq, Hq, DIM.SIZE], contiguous
    grad_probe,  # [B, Tq, Hq, DIM.SIZE], contiguous
    shift,  # written, float32 [B, Hq, Tq], in order: -L / scale; the weights are exp(scale * (score + shift))
    minus_level,  # written, float32 [B, Hq, Tq], in order: -(1 + expected)
    minus_base,  # written, float32 [B, Hq, Tq], in order: -b
    rest,  # written, float32 [B, Hq, Tq], in order: b - delta
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
):
    """Write the gradients of `ROWS` queries and probes of one head, and four numbers of each row."""
    # Heavy tiles go first, as in the forward.
    tiles = tl.cdiv(queries, ROWS)
    tile, batch, head = program_head(tiles, heads)
    start = (tiles - 1 - tile) * ROWS
    key_rows, value_rows = head_rows(key, batch, head // group), head_rows(value, batch, head // group)
    lo = lo if lo is None else head_vector(lo, batch, head, queries)
    hi = hi if hi is None else head_vector(hi, batch, head, queries)
    query_order = query_order if query_order is None else head_vector(query_order, batch, head, queries)
    key_order = key_order if key_order is None else head_vector(key_order, batch, head // group, keys)
    rows = start + tl.arange(0, ROWS)
    inside = rows < queries
    walk, first_key, end_key = cover_keys(lo, hi, start, queries, keys, window, None, 0, MODE, ROWS, KEYS, 0)

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    do = load_rows(head_rows(grad_output, batch, head), start, numbers, queries, VALUE_DIM, True, GATHER_QUERY)
    of_row = load_rows(head_rows(plain, batch, head), start, numbers, queries, VALUE_DIM, True, GATHER_QUERY)
    row_base = row_sums(of_row, do, VALUE_DIM)
    of_row = load_rows(head_rows(output, batch, head), start, numbers, queries, VALUE_DIM, True, GATHER_QUERY)
    row_rest = row_base - row_sums(of_row, do, VALUE_DIM)
    natural_place = batch * queries * heads + head + (numbers if GATHER_QUERY else rows).to(tl.int64) * heads
    natural = tl.load(logsumexp + natural_place, mask=inside, other=float("-inf"))
    level = 1.0 + tl.load(expected + natural_place, mask=inside, other=0.0)
    # log2(e) turns the natural logsumexp into the base-2 one; a row that sees nothing weighs nothing.
    row_lse = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
    row_place = (batch * heads + head) * queries + rows
    tl.store(shift + row_place, -row_lse / scale_log2, mask=inside)
    tl.store(minus_level + row_place, -level, mask=inside)
    tl.store(minus_base + row_place, -row_base, mask=inside)
    tl.store(rest + row_place, row_rest, mask=inside)

    q = load_rows(head_rows(query, batch, head), start, numbers, queries, DIM, True, GATHER_QUERY)
    r = load_rows(head_rows(probe, batch, head), start, numbers, queries, DIM, True, GATHER_QUERY)
    dq, minus_dr = zeros(ROWS, DIM), zeros(ROWS, DIM)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)

    for EDGE in tl.static_range(2):
        steps = walk.leading + walk.trailing if EDGE else walk.full
        for step in range(steps):
            # [ROWS, KEYS] scores, factors of the weights, and their gradients.
            place = step_start(step, walk, 0, None, KEYS, 0, EDGE)
            columns = row_numbers(key_order, place, walk.stop, KEYS, EDGE)
            k = load_rows(key_rows, place, columns, walk.stop, DIM, EDGE, GATHER_KEY)
            scores = inner(q, k, None, DIM, UPCAST)
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
            factor = level[:, None] - inner(r, k, None, DIM, UPCAST)
            v = load_rows(value_rows, place, columns, walk.stop, VALUE_DIM, EDGE, GATHER_KEY)
            change = inner(do, v, None, VALUE_DIM, UPCAST) - row_base[:, None]
            if EDGE:
                visible = is_visible(first_key, end_key, place + tl.arange(0, KEYS))
                weights = tl.where(visible, weights, 0.0)
                factor = tl.where(visible, factor, 0.0)
            change *= weights
            grad_scores = (factor * change + weights * row_rest[:, None]).to(k.main.dtype)
            dq = add_products(grad_scores, k, dq, DIM, UPCAST)
            minus_dr = add_products(change.to(k.main.dtype), k, minus_dr, DIM, UPCAST)

    grad_rows = packed_rows(grad_query, batch, queries, head, heads, DIM.SIZE)
    store_rows(grad_rows, scaled(dq, scale, DIM), start, numbers, queries, DIM, GATHER_QUERY)
    grad_rows = packed_rows(grad_probe, batch, queries, head, heads, DIM.SIZE)
    store_rows(grad_rows, scaled(minus_dr, -1.0, DIM), start, numbers, queries, DIM, GATHER_QUERY)
