"""Compute the forward of attention with a probe on a GPU: one program per tile of query rows.

The walk and the softmax are those of `triton_forward`. A second sum, of values weighed by p t, and the sum e of p t
shrink with the first one when the maximum grows. All three are float32. t is taken from the row's own key, so that it
is small before it is rounded to the dtype of the values.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.attention.probe_launch import Call, merged
from longmix_kernels.attention.triton_grad_query import row_sums
from longmix_kernels.attention.triton_tiles import (
    Parts,
    add_products,
    inner,
    load_rows,
    load_slope,
    row_numbers,
    scaled,
    softmax_step,
    store_rows,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import cover, is_visible, keys_of_rows, step_start
from longmix_kernels.tensors import PerRow, Strided, per_row, strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, program_head


@triton.jit
def subtracted(first, second, factor, COLUMNS: tl.constexpr):
    """Return first * factor - second, of two `Parts` and a factor for each row."""
    rest = first.rest
    if COLUMNS.REST > 0:
        rest = first.rest * factor[:, None] - second.rest
    return Parts(first.main * factor[:, None] - second.main, rest)


@triton.jit
def keys_of_part(lo, hi, rows, inside, queries, keys, window, part_begin, part_end, MODE: tl.constexpr):
    """Return the bounds of `keys_of_rows` within a part of the keys."""
    first, end = keys_of_rows(lo, hi, rows, inside, queries, keys, window, MODE)
    return tl.maximum(first, part_begin), tl.minimum(end, part_end)


@triton.jit(do_not_specialize=["batches", "queries", "keys", "heads", "group", "window", "splits"])
def probe_forward_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    probe: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    own: Strided,  # [B, Tk, Hkv, DIM.SIZE], the keys in their own places
    lo: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None
    hi: PerRow,  # as lo
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    own_order: PerRow,  # as query_order, also where copies have put queries in order
    alibi_slopes,  # float32 [Hq], or None
    output,  # [splits, B, Tq, Hq, VALUE_DIM.SIZE], contiguous
    plain,  # as output, that of softmax attention
    logsumexp,  # float32 [splits, B, Tq, Hq], contiguous
    expected,  # as logsumexp, the mean of probe . key
    scale_log2,  # scale * log2(e)
    batches,  # B
    queries,
    keys,
    heads,  # Hq
    group,  # Hq / Hkv
    window,
    splits,
    MODE: tl.constexpr,
    GATHER_QUERY: tl.constexpr,
    GATHER_KEY: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write what a part of the keys gives for `ROWS` query rows of one head: both outputs, L and the mean of r . k."""
    # Heavy tiles go first, as in `triton_forward`.
    tiles = tl.cdiv(queries, ROWS)
    place, batch, head = program_head(tiles * splits, heads)
    start = (tiles - 1 - place // splits) * ROWS
    part = place % splits
    part_begin = part * tl.cdiv(keys, splits)
    part_end = tl.minimum(part_begin + tl.cdiv(keys, splits), keys)
    key_head = head // group
    query_rows, probe_rows = head_rows(query, batch, head), head_rows(probe, batch, head)
    key_rows, value_rows = head_rows(key, batch, key_head), head_rows(value, batch, key_head)
    lo = lo if lo is None else head_vector(lo, batch, head, queries)
    hi = hi if hi is None else head_vector(hi, batch, head, queries)
    query_order = query_order if query_order is None else head_vector(query_order, batch, head, queries)
    key_order = key_order if key_order is None else head_vector(key_order, batch, key_head, keys)
    own_order = own_order if own_order is None else head_vector(own_order, batch, head, queries)
    rows, last = start + tl.arange(0, ROWS), tl.minimum(start + ROWS, queries) - 1
    begin, full_end = keys_of_part(lo, hi, start, start < queries, queries, keys, window, part_begin, part_end, MODE)
    full_begin, end = keys_of_part(lo, hi, last, last < queries, queries, keys, window, part_begin, part_end, MODE)
    walk = cover(begin, full_begin, full_end, end, 0, None, 0, KEYS, 0)
    first_key, end_key = keys_of_part(lo, hi, rows, rows < queries, queries, keys, window, part_begin, part_end, MODE)

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    q = load_rows(query_rows, start, numbers, queries, DIM, True, GATHER_QUERY)
    r = load_rows(probe_rows, start, numbers, queries, DIM, True, GATHER_QUERY)
    # With more queries than keys, early rows take the first key; any vector would do.
    own_numbers = tl.maximum(row_numbers(own_order, start, queries, ROWS, True) + (keys - queries), 0)
    own_keys = load_rows(head_rows(own, batch, key_head), start, own_numbers, queries, DIM, True, True)
    anchor = row_sums(r, own_keys, DIM)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    sums, tilted = zeros(ROWS, VALUE_DIM), zeros(ROWS, VALUE_DIM)

    for EDGE in tl.static_range(2):
        steps = walk.leading + walk.trailing if EDGE else walk.full
        for step in range(steps):
            # [ROWS, KEYS] scores and products with the probe, from [ROWS, DIM] and [KEYS, DIM].
            place = step_start(step, walk, 0, None, KEYS, 0, EDGE)
            columns = row_numbers(key_order, place, walk.stop, KEYS, EDGE)
            k = load_rows(key_rows, place, columns, walk.stop, DIM, EDGE, GATHER_KEY)
            scores = inner(q, k, None, DIM, UPCAST)
            products = inner(r, k, None, DIM, UPCAST) - anchor[:, None]
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            if NEGATIVE_SCALE:
                scores = -scores
            if EDGE:
                visible = is_visible(first_key, end_key, place + tl.arange(0, KEYS))
                scores = tl.where(visible, scores, float("-inf"))
                products = tl.where(visible, products, 0.0)
            weights, shrink, highest, total = softmax_step(scores, highest, total, scale_log2, EDGE)
            products *= weights
            mean = mean * shrink + tl.sum(products, 1)
            v = load_rows(value_rows, place, columns, walk.stop, VALUE_DIM, EDGE, GATHER_KEY)
            sums = scaled(sums, shrink[:, None], VALUE_DIM)
            tilted = scaled(tilted, shrink[:, None], VALUE_DIM)
            sums = add_products(weights.to(v.main.dtype), v, sums, VALUE_DIM, UPCAST)
            tilted = add_products(products.to(v.main.dtype), v, tilted, VALUE_DIM, UPCAST)

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    share = 1.0 / divisor
    mean *= share
    sums = scaled(sums, share[:, None], VALUE_DIM)
    tilted = scaled(tilted, share[:, None], VALUE_DIM)
    batch += part.to(tl.int64) * batches
    plain_rows = packed_rows(plain, batch, queries, head, heads, VALUE_DIM.SIZE)
    store_rows(plain_rows, sums, start, numbers, queries, VALUE_DIM, GATHER_QUERY)
    output_rows = packed_rows(output, batch, queries, head, heads, VALUE_DIM.SIZE)
    result = subtracted(sums, tilted, 1.0 + mean, VALUE_DIM)
    store_rows(output_rows, result, start, numbers, queries, VALUE_DIM, GATHER_QUERY)
    # ln 2 turns the base-2 logsumexp into the natural one.
    natural = tl.where(empty, float("-inf"), (highest + tl.log2(divisor)) * 0.6931471805599453)
    places = batch * queries * heads + head + (numbers if GATHER_QUERY else rows).to(tl.int64) * heads
    tl.store(logsumexp + places, natural, mask=rows < queries)
    tl.store(expected + places, tl.where(empty, 0.0, mean + anchor), mask=rows < queries)


def triton_forward(call_inputs: ProbeInputs) -> tuple[torch.Tensor, ...]:
    """Return the output, that of softmax attention, the logsumexp, and the mean of r . k, as `reference_forward` does.

    Args:
        call_inputs: the call, with head dimensions up to 128 and no float64.
    """
    call = Call(call_inputs)
    dtype, parts = (call.query.dtype, ()) if call.splits == 1 else (torch.float32, (call.splits,))
    shape = *parts, *call.query.shape[:3]
    outputs = [call.query.new_empty((*shape, call.value_dim), dtype=dtype) for _ in range(2)]
    numbers = [call.query.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    call.launch(
        call.forward_kernel(),
        probe_forward_kernel,
        *strided(call.query, call.probe, call.key, call.value, call.own),
        *per_row(call.lo, call.hi, call.query_order, call.key_order, call.own_order),
        call.alibi_slopes,
        *outputs,
        *numbers,
        call.scale_log2(),
        call.batch,
        call.queries,
        call.keys,
        call.heads,
        call.group,
        call.window,
        call.splits,
    )
    results = (*outputs, *numbers) if call.splits == 1 else merged((*outputs, *numbers), call.query.dtype)
    return tuple(call.put_queries(x) for x in results)
