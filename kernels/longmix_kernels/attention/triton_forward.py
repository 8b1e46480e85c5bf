"""Compute the forward of bounded attention on a GPU: one program per tile of query rows (FlashAttention-2, Dao 2023).

The softmax is in base 2, so that scale * log2(e) goes into one multiply-add per score. It runs online: each step of
keys rescales the earlier sums by exp2(old maximum - new maximum). The division by the sum comes once, at the end.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.launch import Call
from longmix_kernels.attention.triton_tiles import load_slope, load_step, load_tile, row_numbers, store_tile, with_alibi
from longmix_kernels.attention.triton_walk import cover, keys_of_rows, program_tile, step_start
from longmix_kernels.tensors import strides
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
def forward_kernel(
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
    key_steps,  # descriptors of key and value, whose loads take [1, KEYS, 1, DIM]; or None
    value_steps,
    output,  # [B, Tq, Hq, VALUE_DIM], contiguous
    logsumexp,  # float32 [B, Tq, Hq], contiguous
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
    NEGATIVE_SCALE: tl.constexpr,
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
    """Write the output and the logsumexp of `ROWS` query rows of one head."""
    # Late rows see most keys under a causal mask, so they go first and the last programs to finish are short ones.
    tiles = tl.cdiv(queries, ROWS)
    tile, batch, head = program_tile(tiles, heads)
    start = (tiles - 1 - tile) * ROWS
    query += batch * stride_query_batch + head * stride_query_head
    key_head = head // group
    key += batch * stride_key_batch + key_head * stride_key_head
    value += batch * stride_value_batch + key_head * stride_value_head
    if MODE == "bounds" or MODE == "documents":
        lo += batch * stride_lo_batch + head * stride_lo_head
    if MODE == "bounds":
        hi += batch * stride_hi_batch + head * stride_hi_head
    if query_order is not None:
        query_order += batch * stride_query_order_batch + head * stride_query_order_head
    if key_order is not None:
        key_order += batch * stride_key_order_batch + key_head * stride_key_order_head
    count = 0
    if BLOCK > 0:
        row_offsets += (start + keys - queries) // BLOCK
        row_blocks += tl.load(row_offsets)
        count = tl.load(row_offsets + 1) - tl.load(row_offsets)

    rows = start + tl.arange(0, ROWS)
    last = tl.minimum(start + ROWS, queries) - 1
    begin, full_end = keys_of_rows(lo, hi, start, start < queries, queries, keys, window, MODE)
    full_begin, end = keys_of_rows(lo, hi, last, last < queries, queries, keys, window, MODE)
    begin, leading, full_start, full, trailing_start, trailing = cover(
        begin, full_begin, full_end, end, 0, row_blocks, count, KEYS, BLOCK
    )
    first_key, end_key = keys_of_rows(lo, hi, rows, rows < queries, queries, keys, window, MODE)

    numbers = row_numbers(query_order, start, queries, ROWS, True)
    q_main = load_tile(query, start, numbers, queries, stride_query_row, 0, DIM_MAIN, DIM, True, GATHER_QUERY)
    if DIM_REST > 0:
        q_rest = load_tile(
            query, start, numbers, queries, stride_query_row, DIM_MAIN, DIM_REST, DIM, True, GATHER_QUERY
        )
    if alibi_slopes is not None:
        slope = load_slope(alibi_slopes, head, scale_log2)
        row_position = numbers + (keys - queries)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_main = tl.zeros([ROWS, VALUE_MAIN], tl.float32)
    if VALUE_REST > 0:
        sum_rest = tl.zeros([ROWS, VALUE_REST], tl.float32)

    for EDGE in tl.static_range(2):
        steps = leading + trailing if EDGE else full
        for step in range(steps):
            # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
            place = step_start(step, begin, leading, full_start, trailing_start, 0, row_blocks, KEYS, BLOCK, EDGE)
            columns = row_numbers(key_order, place, end, KEYS, EDGE)
            # Hidden keys may be NaN, so steps at an edge mask what they load.
            if EDGE or key_steps is None:
                k = load_tile(key, place, columns, end, stride_key_row, 0, DIM_MAIN, DIM, EDGE, GATHER_KEY)
            else:
                k = load_step(key_steps, batch, place, key_head, KEYS, DIM_MAIN)
            scores = product(q_main, tl.trans(k), None, UPCAST)
            if DIM_REST > 0:
                k = load_tile(key, place, columns, end, stride_key_row, DIM_MAIN, DIM_REST, DIM, EDGE, GATHER_KEY)
                scores = product(q_rest, tl.trans(k), scores, UPCAST)
            if alibi_slopes is not None:
                scores = with_alibi(scores, slope, columns[None, :], row_position[:, None])
            if NEGATIVE_SCALE:
                # The maximum is taken before the scale is multiplied in, so the scale must be positive.
                scores = -scores
            if EDGE:
                places = (place + tl.arange(0, KEYS))[None, :]
                visible = (first_key[:, None] <= places) & (places < end_key[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
            subtrahend = new_highest
            if EDGE:
                # -inf - -inf is NaN, so a row that has seen nothing yet subtracts 0 and keeps weights of 0.
                subtrahend = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores * scale_log2 - subtrahend[:, None])
            shrink = tl.exp2(highest - subtrahend)
            total = total * shrink + tl.sum(weights, 1)
            highest = new_highest
            if EDGE or value_steps is None:
                v = load_tile(value, place, columns, end, stride_value_row, 0, VALUE_MAIN, VALUE_DIM, EDGE, GATHER_KEY)
            else:
                v = load_step(value_steps, batch, place, key_head, KEYS, VALUE_MAIN)
            weights = weights.to(v.dtype)
            sum_main = product(weights, v, sum_main * shrink[:, None], UPCAST)
            if VALUE_REST > 0:
                v = load_tile(
                    value, place, columns, end, stride_value_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, EDGE, GATHER_KEY
                )
                sum_rest = product(weights, v, sum_rest * shrink[:, None], UPCAST)

    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    stride_output_row = heads * VALUE_DIM
    output += batch * queries * stride_output_row + head * VALUE_DIM
    result = sum_main * inverse[:, None]
    store_tile(output, result, start, numbers, queries, stride_output_row, 0, VALUE_MAIN, VALUE_DIM, GATHER_QUERY)
    if VALUE_REST > 0:
        result = sum_rest * inverse[:, None]
        store_tile(
            output, result, start, numbers, queries, stride_output_row, VALUE_MAIN, VALUE_REST, VALUE_DIM, GATHER_QUERY
        )
    # ln 2 turns the base-2 logsumexp into the natural one.
    natural = (highest + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    natural = tl.where(empty, float("-inf"), natural)
    logsumexp += batch * queries * heads + head
    own = numbers if GATHER_QUERY else rows
    tl.store(logsumexp + own.to(tl.int64) * heads, natural, mask=rows < queries)


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
        call.query,
        call.key,
        call.value,
        call.lo,
        call.hi,
        call.query_order,
        call.key_order,
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
        *strides(call.query, call.key, call.value),
        *call.row_strides(call.lo, call.hi, call.query_order, call.key_order),
    )
    return call.put_queries(output), call.put_queries(logsumexp)
