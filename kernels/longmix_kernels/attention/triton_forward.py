"""Compute the forward of bounded attention on a GPU: one program per tile of query rows (FlashAttention-2, Dao 2023).

The softmax is in base 2, so that scale * log2(e) goes into one multiply-add per score. It runs online: each step of
keys rescales the earlier sums by exp2(old maximum - new maximum). The division by the sum comes once, at the end.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.launch import Call
from longmix_kernels.attention.triton_tiles import (
    add_products,
    inner,
    load_rows,
    load_slope,
    load_step,
    row_numbers,
    scaled,
    softmax_step,
    store_rows,
    with_alibi,
    zeros,
)
from longmix_kernels.attention.triton_walk import block_list, cover_keys, is_visible, step_start
from longmix_kernels.tensors import PerRow, Strided, per_row, strided
from longmix_kernels.tiles import head_rows, head_vector, packed_rows, program_head


@triton.jit(do_not_specialize=["queries", "keys", "heads", "group", "window"])
def forward_kernel(
    query: Strided,  # [B, Tq, Hq, DIM.SIZE]
    key: Strided,  # [B, Tk, Hkv, DIM.SIZE]
    value: Strided,  # [B, Tk, Hkv, VALUE_DIM.SIZE]
    lo: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None
    hi: PerRow,  # as lo
    query_order: PerRow,  # int32 [B or 1, Hq or 1, Tq], or None: `query_rows` of the pattern
    key_order: PerRow,  # int32 [B or 1, Hkv or 1, Tk], or None: `key_rows`
    alibi_slopes,  # float32 [Hq], or None
    row_offsets,  # int32 [blocks + 1], or None
    row_blocks,  # int32 [n], or None
    key_steps,  # descriptors of key and value, whose loads take [1, KEYS, 1, DIM.SIZE]; or None
    value_steps,
    output,  # [B, Tq, Hq, VALUE_DIM.SIZE], contiguous
    logsumexp,  # float32 [B, Tq, Hq], contiguous
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
    NEGATIVE_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the output and the logsumexp of `ROWS` query rows of one head."""
    # Late rows see most keys under a causal mask, so they go first and the last programs to finish are short ones.
    tiles = tl.cdiv(queries, ROWS)
    tile, batch, head = program_head(tiles, heads)
    start = (tiles - 1 - tile) * ROWS
    key_head = head // group
    query_rows = head_rows(query, batch, head)
    key_rows = head_rows(key, batch, key_head)
    value_rows = head_rows(value, batch, key_head)
    lo = lo if lo is None else head_vector(lo, batch, head, queries)
    hi = hi if hi is None else head_vector(hi, batch, head, queries)
    query_order = query_order if query_order is None else head_vector(query_order, batch, head, queries)
    key_order = key_order if key_order is None else head_vector(key_order, batch, key_head, keys)
    count = 0
    if BLOCK > 0:
        row_blocks, count = block_list(row_offsets, row_blocks, (start + keys - queries) // BLOCK)
    walk, first_key, end_key = cover_keys(
        lo, hi, start, queries, keys, window, row_blocks, count, MODE, ROWS, KEYS, BLOCK
    )

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    q = load_rows(query_rows, start, numbers, queries, DIM, True, GATHER_QUERY)
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = zeros(ROWS, VALUE_DIM)

    for EDGE in tl.static_range(2):
        steps = walk.leading + walk.trailing if EDGE else walk.full
        for step in range(steps):
            # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
            place = step_start(step, walk, 0, row_blocks, KEYS, BLOCK, EDGE)
            columns = row_numbers(key_order, place, walk.stop, KEYS, EDGE)
            # Hidden keys may be NaN, so steps at an edge mask what they load.
            if EDGE or key_steps is None:
                k = load_rows(key_rows, place, columns, walk.stop, DIM, EDGE, GATHER_KEY)
            else:
                k = load_step(key_steps, batch, place, key_head, KEYS, DIM)
            scores = inner(q, k, None, DIM, UPCAST)
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            if NEGATIVE_SCALE:
                # The maximum is taken before the scale is multiplied in, so the scale must be positive.
                scores = -scores
            if EDGE:
                scores = tl.where(is_visible(first_key, end_key, place + tl.arange(0, KEYS)), scores, float("-inf"))
            weights, shrink, highest, total = softmax_step(scores, highest, total, scale_log2, EDGE)
            if EDGE or value_steps is None:
                v = load_rows(value_rows, place, columns, walk.stop, VALUE_DIM, EDGE, GATHER_KEY)
            else:
                v = load_step(value_steps, batch, place, key_head, KEYS, VALUE_DIM)
            sums = scaled(sums, shrink[:, None], VALUE_DIM)
            sums = add_products(weights.to(v.main.dtype), v, sums, VALUE_DIM, UPCAST)

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    output_rows = packed_rows(output, batch, queries, head, heads, VALUE_DIM.SIZE)
    result = scaled(sums, (1.0 / divisor)[:, None], VALUE_DIM)
    store_rows(output_rows, result, start, numbers, queries, VALUE_DIM, GATHER_QUERY)
    # ln 2 turns the base-2 logsumexp into the natural one.
    natural = tl.where(empty, float("-inf"), (highest + tl.log2(divisor)) * 0.6931471805599453)
    rows = start + tl.arange(0, ROWS)
    own = numbers if GATHER_QUERY else rows
    tl.store(logsumexp + batch * queries * heads + head + own.to(tl.int64) * heads, natural, mask=rows < queries)


def triton_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, Tq, Hq, Dv] and the logsumexp [B, Tq, Hq], float32.

    Args:
        inputs: the call, with head dimensions up to 256 and no float64.
    """
    call = Call(inputs)
    output = call.query.new_empty(*call.query.shape[:3], call.value_dim)
    logsumexp = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    call.launch(
        "forward",
        forward_kernel,
        *strided(call.query, call.key, call.value),
        *per_row(call.lo, call.hi, call.query_order, call.key_order),
        call.alibi_slopes,
        call.row_offsets,
        call.row_blocks,
        *call.steps("forward"),
        output,
        logsumexp,
        call.scale_log2(),
        call.queries,
        call.keys,
        call.heads,
        call.group,
        call.window,
    )
    return call.put_queries(output), call.put_queries(logsumexp)
