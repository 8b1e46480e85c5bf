"""Compute a softmax over a run of cached keys that are codes, for each item of a work list, on a GPU.

No number is read back from its codes. A key is k = (step c + low) s in each channel, so that q . k is the product of
the codes with q s step, plus one of q s with low, once for all tokens that share them. A value is that of its token, so
that the weight takes its step, and sum_j w_j v_j = s (sum_j (w_j step_j) c_j + sum_j w_j low_j).

Codes are whole numbers below 256, which bfloat16 holds exactly. What they are multiplied with is the sum of two
numbers in bfloat16, which has 16 bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmix_kernels.attention.triton_decode_exact import (
    bounds_of_rows,
    item_of,
    program_items,
    query_places,
    read_range,
    slots_of_step,
)
from longmix_kernels.attention.triton_tiles import softmax_step
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows


class CodeNumbers(NamedTuple):
    """What codes are multiplied with or added to, [R or 1, H or 1, 1 or tokens, 1 or channels].

    Strides, 0 for a size of 1, and how many tokens and how many channels share an entry are in sixteenths, as in
    `PerRow`.
    """

    pointer: Any
    stride_batch: Any
    stride_head: Any
    stride_token: Any
    stride_channel: Any
    stride_each_token: Any
    stride_each_channel: Any


@triton.jit
def head_numbers(numbers, batch, head):
    """Return a pointer to the first number of a row and head."""
    return numbers.pointer + ((batch * numbers.stride_batch + head * numbers.stride_head) >> 4)


@triton.jit
def load_channels(numbers, batch, head, token, column):
    """Load the numbers of channels, float32 [columns], for one token; there is one for each channel, side by side."""
    token = tl.cast(token // (numbers.stride_each_token >> 4), tl.int64)
    place = head_numbers(numbers, batch, head) + ((token * numbers.stride_token) >> 4)
    return tl.load(place + column).to(tl.float32)


@triton.jit
def load_tokens(numbers, batch, head, token, there, channel):
    """Load the numbers of tokens, float32 [tokens], for one channel, zero where they are not there."""
    place = head_numbers(numbers, batch, head)
    place += (channel // (numbers.stride_each_channel >> 4) * numbers.stride_channel) >> 4
    places = place + token.to(tl.int64) * (numbers.stride_token >> 4)
    return tl.load(places, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_codes(rows, row, there, column: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Load the codes int32 [rows, WIDTH] of rows from column `column` on, zero where they are not there."""
    PER: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PER
    places = rows.pointer + row.to(tl.int64)[:, None] * rows.stride + (column // PER + tl.arange(0, BYTES))[None, :]
    codes = tl.load(places, mask=there[:, None], other=0).to(tl.int32)
    if BITS == 4:
        codes = tl.interleave(codes & 15, codes >> 4)
    elif BITS == 2:
        even = tl.interleave(codes & 3, (codes >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((codes >> 2) & 3, codes >> 6))
    return codes


@triton.jit
def code_product(a, codes, total, FULL: tl.constexpr):
    """Return total + a codes for a in float32, as exact as float32 if `FULL`, and else to 16 bits of a."""
    if FULL:
        total = tl.dot(a, codes.to(tl.float32), total, input_precision="ieee")
    else:
        high = a.to(tl.bfloat16)
        exact = codes.to(tl.float32).to(tl.bfloat16)
        total = tl.dot(high, exact, total)
        total = tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), exact, total)
    return total


@triton.jit
def code_scores(
    places,
    inside,
    key_rows,
    key_low,
    key_step,
    key_scale,
    batch,
    key_head,
    start,
    token,
    there,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return the scores [rows, tokens] of tokens from `start` on that share low and step, before the scale.

    The query rows at `places` are loaded anew in each step, from the nearest cache. Held in registers, they would make
    the kernel spill: every warp multiplies all of them.
    """
    scores = tl.zeros([inside.shape[0], token.shape[0]], tl.float32)
    offset = tl.zeros([inside.shape[0]], tl.float32)
    # This is 0, as the compiler cannot know; so it leaves the loads of the query in the loop.
    anew = start >> 31
    for number in tl.static_range(COUNT):
        column = number * WIDTH + tl.arange(0, WIDTH)
        q = tl.load((places + anew)[:, None] + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        if key_scale is not None:
            q *= load_channels(key_scale, batch, key_head, 0, column)[None, :]
        low = load_channels(key_low, batch, key_head, start, column)
        step = load_channels(key_step, batch, key_head, start, column)
        codes = load_codes(key_rows, token, there, number * WIDTH, WIDTH, BITS)
        scores = code_product(q * step[None, :], tl.trans(codes), scores, FULL)
        offset += tl.sum(q * low[None, :], 1)
    return scores + offset[:, None]


@triton.jit(
    do_not_specialize=[
        "items_place",
        "programs_place",
        "parts_place",
        "slots",
        "rows",
        "row_tiles",
        "height",
        "tile_keys",
        "queries",
        "group",
    ]
)
def decode_codes_kernel(
    query: Strided,  # [B, T, Hq, DIM]
    key: Strided,  # uint8 [R, S, Hk, DIM * KEY_BITS / 8]
    value: Strided,  # uint8 [R, S, Hk, VALUE_DIM * VALUE_BITS / 8]
    count: PerRow,  # int32 [B or 1, Hk or 1, 1], or None
    first: PerRow,  # int32 [B or 1, 1, 1], or None
    key_low: CodeNumbers,
    key_step: CodeNumbers,
    key_scale: CodeNumbers,  # or None
    value_low: CodeNumbers,
    value_step: CodeNumbers,
    value_scale: CodeNumbers,  # or None
    lists,  # int32 [Layout.size]
    partial,  # float32 [Layout.part_rows, VALUE_DIM]
    partial_logsumexp,  # float32 [Layout.part_rows], in base 2
    scale_log2,  # scale * log2(e)
    items_place,
    programs_place,
    parts_place,
    slots,  # S
    rows,
    row_tiles,
    height,
    tile_keys,
    queries,
    group,  # Hq / Hk
    NEGATIVE_SCALE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a tile of keys
    COUNT: tl.constexpr,  # how many such tiles DIM has
    VALUE_WIDTH: tl.constexpr,  # columns of a tile of values, which share step and low of their token
    VALUE_COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write the partial output and base-2 logsumexp of each item of this program as the item's part.

    `KEYS` divides the tokens that share an entry of `key_low` and `key_step`.
    """
    BOUNDS: tl.constexpr = count is not None or first is not None
    first_item, end_item = program_items(lists, programs_place)
    if NEGATIVE_SCALE:
        scale_log2 = -scale_log2
    for item in range(first_item, end_item):
        batch, tile, key_head, first_tile, end_tile = item_of(lists, items_place, item, row_tiles)
        batch, key_head = batch.to(tl.int64), key_head.to(tl.int64)
        places, own, inside = query_places(query, batch, tile, key_head, rows, queries, group, ROWS)
        begin, end = first_tile * tile_keys, tl.minimum(end_tile * tile_keys, slots)
        row_begin, row_end = bounds_of_rows(count, first, own, key_head, slots, inside)
        if BOUNDS:
            begin, end = read_range(row_begin, row_end, begin, end)
        key_rows, value_rows = head_rows(key, batch, key_head), head_rows(value, batch, key_head)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = ()
        for _ in tl.static_range(VALUE_COUNT):
            sums = sums + (tl.zeros([ROWS, VALUE_WIDTH], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        # Steps begin at multiples of KEYS, so that all tokens of one share their numbers.
        for start in range(begin // KEYS * KEYS, end, KEYS):
            token, visible, there = slots_of_step(None, row_begin, row_end, start, end, KEYS, BOUNDS)
            scores = code_scores(
                places,
                inside,
                key_rows,
                key_low,
                key_step,
                key_scale,
                batch,
                key_head,
                start,
                token,
                there,
                KEY_BITS,
                WIDTH,
                COUNT,
                FULL,
            )
            if NEGATIVE_SCALE:
                # The maximum is taken before the scale is multiplied in, so the scale must be positive.
                scores = -scores
            scores = tl.where(visible, scores, float("-inf"))
            weights, shrink, highest, total = softmax_step(scores, highest, total, scale_log2, BOUNDS)
            added = ()
            for number in tl.static_range(VALUE_COUNT):
                low = load_tokens(value_low, batch, key_head, token, there, number * VALUE_WIDTH)
                step = load_tokens(value_step, batch, key_head, token, there, number * VALUE_WIDTH)
                codes = load_codes(value_rows, token, there, number * VALUE_WIDTH, VALUE_WIDTH, VALUE_BITS)
                more = sums[number] * shrink[:, None] + tl.sum(weights * low[None, :], 1)[:, None]
                added = added + (code_product(weights * step[None, :], codes, more, FULL),)  # type: ignore[assignment]  # noqa: RUF005
            sums = added
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)[:, None]
        place = parts_place + tl.cast(item, tl.int64) * height + tl.arange(0, ROWS)
        for number in tl.static_range(VALUE_COUNT):
            column = number * VALUE_WIDTH + tl.arange(0, VALUE_WIDTH)
            result = sums[number] / divisor
            if value_scale is not None:
                result *= load_channels(value_scale, batch, key_head, 0, column)[None, :]
            tl.store(partial + place[:, None] * (VALUE_COUNT * VALUE_WIDTH) + column[None, :], result, inside[:, None])
        logsumexp = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(partial_logsumexp + place, logsumexp, mask=inside)
