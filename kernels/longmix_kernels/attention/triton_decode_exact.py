"""Compute a softmax over a run of cached keys that are no codes for each item of a work list, on a GPU.

A program loops over its items (`decode_schedule`). The rows of a tile are the queries of all heads that share a key
head, and of all rows that share the keys, so that these load their keys once.
"""

import triton
import triton.language as tl

from longmix_kernels.attention.triton_split import load_placed, store_placed
from longmix_kernels.attention.triton_tiles import (
    Parts,
    add_products,
    inner,
    load_rows,
    scaled,
    softmax_step,
    zeros,
)
from longmix_kernels.tensors import PerRow, Strided
from longmix_kernels.tiles import head_rows, head_vector


@triton.jit
def program_items(lists, programs_place):
    """Return the number of this program's first item, and one past its last."""
    place = lists + programs_place + tl.program_id(0)
    return tl.load(place), tl.load(place + 1)


@triton.jit
def item_of(lists, items_place, item, row_tiles):
    """Return an item's row of keys, its tile of query rows, key head, first tile of keys, and one past the last."""
    place = lists + items_place + 4 * item
    row = tl.load(place)
    return row // row_tiles, row % row_tiles, tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def query_places(query, batch, tile, key_head, rows, queries, group, ROWS: tl.constexpr):
    """Return pointers [ROWS] to the query rows of a tile, their rows of the batch, and which of them exist.

    Row r is head r % G of token r // G. Where rows of the batch share keys, tokens are counted on from row to row.

    Args:
        query: a `Strided`.
        batch: the row of the keys, or of an index into them.
        tile: the number of the tile.
        key_head: the key head.
        rows, queries, group: as those of `decode_kernel`.
        ROWS: rows of a tile.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = tl.where(inside, row, 0)
    token = row // group
    head = key_head * group + row % group
    own = batch * (rows // (queries * group)) + token // queries
    places = query.pointer + own * query.stride_batch + (token % queries) * query.stride_row
    return places + head * query.stride_head, own, inside


@triton.jit
def bounds_of_rows(count, first, own, head, slots, inside):
    """Return the first slot [rows] that each query row reads, and one past the last."""
    begin, end = tl.zeros_like(inside.to(tl.int32)), tl.where(inside, slots, 0)
    if count is not None:
        end = tl.minimum(end, tl.load(head_vector(count, own, head, 1), mask=inside, other=0))
    if first is not None:
        begin = tl.maximum(begin, tl.load(head_vector(first, own, head, 1), mask=inside, other=0))
    return begin, end


@triton.jit
def read_range(row_begin, row_end, begin, end):
    """Return the part of the slots from `begin` up to `end` that some row reads, from `bounds_of_rows`."""
    reads = row_begin < row_end
    begin = tl.maximum(begin, tl.min(tl.where(reads, row_begin, end), 0))
    return begin, tl.minimum(end, tl.max(tl.where(reads, row_end, 0), 0))


@triton.jit
def slots_of_step(numbers, row_begin, row_end, start, end, KEYS: tl.constexpr, BOUNDS: tl.constexpr):
    """Return the slots of the places from `start` up to `end`, which [rows, KEYS] are read, and which [KEYS] by any.

    `numbers` points to the slots of a row and head; with None, each place is its own slot. `BOUNDS` says whether rows
    have bounds of their own, `row_begin` and `row_end`.
    """
    slot = start + tl.arange(0, KEYS)
    there = slot < end
    if numbers is not None:
        slot = tl.load(numbers + slot, mask=there, other=-1)
        there = slot >= 0
    visible = there[None, :]
    if BOUNDS:
        visible = visible & (slot[None, :] >= row_begin[:, None]) & (slot[None, :] < row_end[:, None])
        # What no row reads may be anything, so that it is not loaded.
        there = tl.max(visible.to(tl.int32), 0) > 0
    return slot, visible, there


@triton.jit
def load_slots(rows, start, slot, there, end, COLUMNS: tl.constexpr, GATHER: tl.constexpr):
    """Load the rows of slots as `Parts`, zero where they are not there: those from `start` up to `end`, or `GATHER`."""
    if GATHER:
        return load_placed(rows.pointer + slot.to(tl.int64) * rows.stride, there, COLUMNS)
    else:
        return load_rows(rows, start, slot, end, COLUMNS, True, False)


@triton.jit
def store_part(
    partial, partial_logsumexp, part, sums, highest, total, inside, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr
):
    """Write the output and the base-2 logsumexp of a tile of rows, the first of which has the number `part`."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)[:, None]
    rest = sums.rest
    if VALUE_DIM.REST > 0:
        rest = rest / divisor
    place = part + tl.arange(0, ROWS)
    store_placed(partial + place * VALUE_DIM.SIZE, Parts(sums.main / divisor, rest), inside, VALUE_DIM)
    logsumexp = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(partial_logsumexp + place, logsumexp, mask=inside)


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
        "key_repeats",
        "queries",
        "group",
    ]
)
def decode_kernel(
    query: Strided,  # [B, T, Hq, DIM.SIZE]
    key: Strided,  # [R, S, Hk, DIM.SIZE]
    value: Strided,  # [R, S, Hk, VALUE_DIM.SIZE]
    count: PerRow,  # int32 [B or 1, Hk or 1, 1], or None
    first: PerRow,  # int32 [B or 1, 1, 1], or None
    index: PerRow,  # int32 [B, Hk, slots], or None: the slots that are read, or -1
    lists,  # int32 [Layout.size]
    partial,  # float32 [Layout.part_rows, VALUE_DIM.SIZE]
    partial_logsumexp,  # float32 [Layout.part_rows], in base 2
    scale_log2,  # scale * log2(e)
    items_place,
    programs_place,
    parts_place,
    slots,  # S, or the length of `index`
    rows,
    row_tiles,
    height,
    tile_keys,
    key_repeats,  # B / R with `index`, and else 1, since then rows that share keys are one group
    queries,
    group,  # Hq / Hk
    NEGATIVE_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the partial output and base-2 logsumexp of each item of this program as the item's part."""
    BOUNDS: tl.constexpr = count is not None or first is not None
    GATHER: tl.constexpr = BOUNDS or index is not None
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
        key_row = batch // key_repeats
        key_rows, value_rows = head_rows(key, key_row, key_head), head_rows(value, key_row, key_head)
        numbers = index if index is None else head_vector(index, batch, key_head, slots)
        q = load_placed(places, inside, DIM)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = zeros(ROWS, VALUE_DIM)
        for start in range(begin, end, KEYS):
            # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
            slot, visible, there = slots_of_step(numbers, row_begin, row_end, start, end, KEYS, BOUNDS)
            k = load_slots(key_rows, start, slot, there, end, DIM, GATHER)
            scores = inner(q, k, None, DIM, UPCAST)
            if NEGATIVE_SCALE:
                # The maximum is taken before the scale is multiplied in, so the scale must be positive.
                scores = -scores
            scores = tl.where(visible, scores, float("-inf"))
            weights, shrink, highest, total = softmax_step(scores, highest, total, scale_log2, GATHER)
            v = load_slots(value_rows, start, slot, there, end, VALUE_DIM, GATHER)
            sums = scaled(sums, shrink[:, None], VALUE_DIM)
            sums = add_products(weights.to(v.main.dtype), v, sums, VALUE_DIM, UPCAST)
        part = parts_place + tl.cast(item, tl.int64) * height
        store_part(partial, partial_logsumexp, part, sums, highest, total, inside, VALUE_DIM, ROWS)
