"""Merge the parts of all segments of a decoding step, and attend to the new tokens, on a GPU."""

import triton
import triton.language as tl

from longmix_kernels.tensors import Strided


@triton.jit
def merge_step(each, rows, highest, total, sums):
    """Return maximum, total and sums [columns] after more rows [n, columns], whose base-2 logarithms are `each` [n]."""
    new_highest = tl.maximum(highest, tl.max(each, 0))
    # -inf - -inf is NaN, so what has seen nothing yet subtracts 0 and keeps weights of 0.
    subtrahend = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights, shrink = tl.exp2(each - subtrahend), tl.exp2(highest - subtrahend)
    return new_highest, total * shrink + tl.sum(weights, 0), sums * shrink + tl.sum(weights[:, None] * rows, 0)


@triton.jit
def load_new(matrix, stride, row, column, inside, there):
    """Load rows [rows, columns] of one head as float32, zero where they are not inside or there."""
    places = matrix + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(places, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["queries", "key_heads", "group", "segments"])
def decode_merge_kernel(
    query: Strided,  # [B, T, Hq, DIM.SIZE]
    new_key: Strided,  # [B, T, Hk, DIM.SIZE], or None
    new_value: Strided,  # [B, T, Hk, VALUE_DIM.SIZE], or None
    lists,  # int32 [Layout.size]
    partial,  # float32 [Layout.part_rows, VALUE_DIM.SIZE]
    partial_logsumexp,  # float32 [Layout.part_rows], in base 2
    output,  # [B, T, Hq, VALUE_DIM.SIZE], contiguous
    logsumexp,  # float32 [B, T, Hq], contiguous
    scale_log2,  # scale * log2(e)
    queries,
    key_heads,
    group,  # Hq / Hk
    segments,
    DIM: tl.constexpr,
    DIM_COVER: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COVER: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write the output and the natural logsumexp of one query row."""
    row = tl.program_id(0).to(tl.int64)
    heads = key_heads * group
    head, token = row % heads, row // heads
    key_head, batch = head // group, token // queries
    column = tl.arange(0, VALUE_COVER)
    there = column < VALUE_DIM.SIZE
    number = tl.arange(0, KEYS)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([VALUE_COVER], tl.float32)
    if new_key is not None:
        # A token sees the new tokens up to its own; there are at most 16, one step.
        seen = number <= token % queries
        own = tl.arange(0, DIM_COVER)
        query_row = query.pointer + batch * query.stride_batch + (token % queries) * query.stride_row
        q = tl.load(query_row + head * query.stride_head + own, mask=own < DIM.SIZE, other=0.0).to(tl.float32)
        keys = new_key.pointer + batch * new_key.stride_batch + key_head * new_key.stride_head
        k = load_new(keys, new_key.stride_row, number, own, seen, own < DIM.SIZE)
        values = new_value.pointer + batch * new_value.stride_batch + key_head * new_value.stride_head
        v = load_new(values, new_value.stride_row, number, column, seen, there)
        scores = tl.where(seen, tl.sum(k * q[None, :], 1) * scale_log2, float("-inf"))
        highest, total, sums = merge_step(scores, v, highest, total, sums)
    for segment in range(segments):
        head_place = lists + 8 * segment
        repeats, row_tiles, tile_rows = tl.load(head_place), tl.load(head_place + 1), tl.load(head_place + 2)
        height, groups_place, parts_place = tl.load(head_place + 3), tl.load(head_place + 4), tl.load(head_place + 5)
        key_row = batch // repeats
        own_row = (token - key_row * repeats * queries) * group + head % group
        group_place = lists + groups_place + (key_row * row_tiles + own_row // tile_rows) * key_heads + key_head
        end = tl.load(group_place + 1)
        for start in range(tl.load(group_place), end, KEYS):
            inside = start + number < end
            place = parts_place + (start + number).to(tl.int64) * height + own_row % tile_rows
            each = tl.load(partial_logsumexp + place, mask=inside, other=float("-inf"))
            places = partial + place[:, None] * VALUE_DIM.SIZE + column[None, :]
            rows = tl.load(places, mask=inside[:, None] & there[None, :], other=0.0)
            highest, total, sums = merge_step(each, rows, highest, total, sums)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    tl.store(output + row * VALUE_DIM.SIZE + column, (sums / divisor).to(output.dtype.element_ty), mask=there)
    # ln 2 turns the base-2 logsumexp into the natural one.
    natural = (highest + tl.log2(divisor)) * 0.6931471805599453
    tl.store(logsumexp + row, tl.where(empty, float("-inf"), natural))
