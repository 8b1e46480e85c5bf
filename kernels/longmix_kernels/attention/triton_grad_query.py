"""Compute the gradients of queries on a GPU: one program per tile of query rows.

`triton_backward` has the equations. This kernel also writes what the kernel of keys and values needs of each row.
"""

import triton
import triton.language as tl

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
from longmix_kernels.attention.triton_walk import block_list, cover_keys, is_visible, step_start
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, program_head


@triton.jit
def row_sums(a, b, COLUMNS: tl.constexpr):
    """Return the sums over the columns of a * b, float32 [rows]."""
    total = tl.sum(a.main.to(tl.float32) * b.main.to(tl.float32), 1)
    if COLUMNS.REST > 0:
        total += tl.sum(a.rest.to(tl.float32) * b.rest.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def grad_query_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    grad_output: Strided,  # [B, Tq, Hq, VALUE_DIM.SIZE]
    lo: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None
    hi: PerRow,  # as lo
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    row_offsets,  # int32 [blocks + 1], or None
    row_blocks,  # int32 [n], or None
    logsumexp,  # float32 [B, Tq, Hq], contiguous
    grad_logsumexp,  # float32 [B, Tq, Hq], contiguous, or None
    grad_query,  # [B, Tq, Hq, DIM.SIZE], contiguous
    shift,  # written, float32 [B, Hq, Tq], in order: -L / scale; the weights are exp(scale * (score + shift))
    minus_delta,  # written, float32 [B, Hq, Tq], in order
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
):
    """Write the query gradient of `ROWS` query rows of one head, and their `shift` and `minus_delta`."""
    # Heavy tiles go first, as in the forward.
    tiles = tl.cdiv(queries, ROWS)
    tile, batch, head = program_head(tiles, heads)
    start = (tiles - 1 - tile) * ROWS
    query_rows, do_rows = head_rows(query, batch, head), head_rows(grad_output, batch, head)
    key_rows, value_rows = head_rows(key, batch, head // group), head_rows(value, batch, head // group)
    lo = lo if lo is None else head_vector(lo, batch, head, queries)
    hi = hi if hi is None else head_vector(hi, batch, head, queries)
    query_order = query_order if query_order is None else head_vector(query_order, batch, head, queries)
    key_order = key_order if key_order is None else head_vector(key_order, batch, head // group, keys)
    count = 0
    if BLOCK > 0:
        row_blocks, count = block_list(row_offsets, row_blocks, (start + keys - queries) // BLOCK)
    rows = start + tl.arange(0, ROWS)
    inside = rows < queries
    walk, first_key, end_key = cover_keys(
        lo, hi, start, queries, keys, window, row_blocks, count, MODE, ROWS, KEYS, BLOCK
    )

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    out = load_rows(head_rows(output, batch, head), start, numbers, queries, VALUE_DIM, True, GATHER_QUERY)
    do = load_rows(do_rows, start, numbers, queries, VALUE_DIM, True, GATHER_QUERY)
    row_delta = row_sums(out, do, VALUE_DIM)
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

    q = load_rows(query_rows, start, numbers, queries, DIM, True, GATHER_QUERY)
    sums = zeros(ROWS, DIM)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)

    for EDGE in tl.static_range(2):
        steps = walk.leading + walk.trailing if EDGE else walk.full
        for step in range(steps):
            # [ROWS, KEYS] scores and their gradients.
            place = step_start(step, walk, 0, row_blocks, KEYS, BLOCK, EDGE)
            columns = row_numbers(key_order, place, walk.stop, KEYS, EDGE)
            k = load_rows(key_rows, place, columns, walk.stop, DIM, EDGE, GATHER_KEY)
            scores = inner(q, k, None, DIM, UPCAST)
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
            if EDGE:
                weights = tl.where(is_visible(first_key, end_key, place + tl.arange(0, KEYS)), weights, 0.0)
            v = load_rows(value_rows, place, columns, walk.stop, VALUE_DIM, EDGE, GATHER_KEY)
            grad_weights = inner(do, v, None, VALUE_DIM, UPCAST)
            grad_scores = (weights * (grad_weights - row_delta[:, None])).to(k.main.dtype)
            sums = add_products(grad_scores, k, sums, DIM, UPCAST)

    grad_rows = packed_rows(grad_query, batch, queries, head, heads, DIM.SIZE)
    store_rows(grad_rows, scaled(sums, scale, DIM), start, numbers, queries, DIM, GATHER_QUERY)
