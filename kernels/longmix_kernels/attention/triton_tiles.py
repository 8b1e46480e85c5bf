"""Operations of the attention kernels on a tile: loads, stores, products, the online softmax, and ALiBi's bias.

The columns of a head dimension, `columns.Columns`, are two powers of two, so tiles of rows come in two `Parts`. Loads
and stores mask only columns past the true dimension.

Rows may be taken in an order of their own, which the kernels read as they go. Query, key, value, their gradients,
output and logsumexp keep each row in its own place; everything else about rows is in the order in which they are taken.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.tiles import product


class Parts(NamedTuple):
    """The columns of a tile of rows: [rows, COLUMNS.MAIN], and [rows, COLUMNS.REST] or 0 if there is no rest."""

    main: tl.tensor
    rest: tl.tensor


@triton.jit
def row_numbers(order, start, end, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Return the numbers int32 [ROWS] of the rows that are taken from place `start` on; 0 from `end` on if `MASKED`.

    `order` points to the number of the head's first row; with None, each row has its place as its number.
    """
    row = start + tl.arange(0, ROWS)
    if order is None:
        return row
    elif MASKED:
        return tl.load(order + row, mask=row < end, other=0)
    else:
        return tl.load(order + row)


@triton.jit
def tile_places(rows, start, numbers, COLUMN: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr):
    """Return pointers [rows, WIDTH] to the rows from `start` on, or with `GATHER` to the rows of these numbers.

    Offsets within a tile fit int32 for row strides below 2 ** 23. The offset of a row itself needs int64 beyond
    T = 65536.
    """
    column = COLUMN + tl.arange(0, WIDTH)
    if GATHER:
        return rows.pointer + tl.cast(numbers, tl.int64)[:, None] * rows.stride + column[None, :]
    else:
        row = tl.arange(0, numbers.shape[0])
        return rows.pointer + tl.cast(start, tl.int64) * rows.stride + (row[:, None] * rows.stride + column[None, :])


@triton.jit
def load_part(
    rows,
    start,
    numbers,
    end,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Load [rows, WIDTH] of rows of `SIZE` columns from `tile_places`, from column `COLUMN` on.

    Columns past `SIZE` are zero. If `MASKED`, rows from `end` on are zero too; otherwise all rows must exist.
    """
    places = tile_places(rows, start, numbers, COLUMN, WIDTH, GATHER)
    row = tl.arange(0, numbers.shape[0])
    if COLUMN + WIDTH > SIZE:
        there = (COLUMN + tl.arange(0, WIDTH))[None, :] < SIZE
        if MASKED:
            there = there & (start + row < end)[:, None]
        return tl.load(places, mask=there, other=0.0)
    elif MASKED:
        return tl.load(places, mask=(start + row < end)[:, None], other=0.0)
    else:
        return tl.load(places)


@triton.jit
def load_rows(rows, start, numbers, end, COLUMNS: tl.constexpr, MASKED: tl.constexpr, GATHER: tl.constexpr):
    """Load the rows from `start` on, or with `GATHER` those of these numbers, as `Parts`; `load_part` says more."""
    rest = 0
    main = load_part(rows, start, numbers, end, 0, COLUMNS.MAIN, COLUMNS.SIZE, MASKED, GATHER)
    if COLUMNS.REST > 0:
        rest = load_part(rows, start, numbers, end, COLUMNS.MAIN, COLUMNS.REST, COLUMNS.SIZE, MASKED, GATHER)
    return Parts(main, rest)


@triton.jit
def load_step(descriptor, batch, start, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load rows of a tensor [B, T, H, COLUMNS.MAIN] by its descriptor, from row `start` on; all must exist."""
    tile = descriptor.load([tl.cast(batch, tl.int32), start, tl.cast(head, tl.int32), 0])
    MAIN: tl.constexpr = COLUMNS.MAIN  # Triton 3.6 takes sizes only as constants with a name of their own
    return Parts(tile.reshape(ROWS, MAIN), 0)


@triton.jit
def store_part(
    rows, tile, start, numbers, end, COLUMN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, GATHER: tl.constexpr
):
    """Store [rows, WIDTH] where `load_part` would load it from, in the dtype of the rows, up to row `end`."""
    there = (start + tl.arange(0, numbers.shape[0]) < end)[:, None]
    if COLUMN + WIDTH > SIZE:
        there = there & ((COLUMN + tl.arange(0, WIDTH))[None, :] < SIZE)
    places = tile_places(rows, start, numbers, COLUMN, WIDTH, GATHER)
    tl.store(places, tile.to(rows.pointer.dtype.element_ty), mask=there)


@triton.jit
def store_rows(rows, parts, start, numbers, end, COLUMNS: tl.constexpr, GATHER: tl.constexpr):
    """Store parts where `load_rows` would load them from, in the dtype of the rows, up to row `end`."""
    store_part(rows, parts.main, start, numbers, end, 0, COLUMNS.MAIN, COLUMNS.SIZE, GATHER)
    if COLUMNS.REST > 0:
        store_part(rows, parts.rest, start, numbers, end, COLUMNS.MAIN, COLUMNS.REST, COLUMNS.SIZE, GATHER)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return `Parts` of zeros in float32."""
    MAIN: tl.constexpr = COLUMNS.MAIN  # Triton 3.6 takes sizes only as constants with a name of their own
    REST: tl.constexpr = COLUMNS.REST
    rest = 0
    if REST > 0:
        rest = tl.zeros([ROWS, REST], tl.float32)
    return Parts(tl.zeros([ROWS, MAIN], tl.float32), rest)


@triton.jit
def scaled(parts, factor, COLUMNS: tl.constexpr):
    """Return parts times a factor."""
    rest = parts.rest
    if COLUMNS.REST > 0:
        rest = rest * factor
    return Parts(parts.main * factor, rest)


@triton.jit
def inner(a, b, total, COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + a b^T, the products of the rows of two `Parts`; `total` may be None."""
    total = product(a.main, tl.trans(b.main), total, UPCAST)
    if COLUMNS.REST > 0:
        total = product(a.rest, tl.trans(b.rest), total, UPCAST)
    return total


@triton.jit
def add_products(weights, rows, sums, COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    """Return sums + weights rows, where rows and sums are `Parts`."""
    rest = sums.rest
    main = product(weights, rows.main, sums.main, UPCAST)
    if COLUMNS.REST > 0:
        rest = product(weights, rows.rest, rest, UPCAST)
    return Parts(main, rest)


@triton.jit
def softmax_step(scores, highest, total, scale_log2, HIDDEN: tl.constexpr):
    """Return the weights of scores, what shrinks earlier sums, and the new maximum and total, all in base 2.

    `HIDDEN` says whether scores may be -inf.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    subtrahend = new_highest
    if HIDDEN:
        # -inf - -inf is NaN, so a row that has seen nothing yet subtracts 0 and keeps weights of 0.
        subtrahend = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores * scale_log2 - subtrahend[:, None])
    shrink = tl.exp2(highest - subtrahend)
    return weights, shrink, new_highest, total * shrink + tl.sum(weights, 1)


@triton.jit
def load_slope(alibi_slopes, head, scale_log2):
    """Return ALiBi's slope for scores that are not scaled yet: it is divided by the scale."""
    return tl.load(alibi_slopes + head) * 1.4426950408889634 / scale_log2


@triton.jit
def with_alibi(scores, slope, key_position, row_position):
    """Return scores + slope * (key position - row position).

    float32 represents positions below 2 ** 24, and their differences, exactly.
    """
    return scores + slope * (key_position.to(tl.float32) - row_position.to(tl.float32))


@triton.jit
def spread(row, KEYS: tl.constexpr, FOLD: tl.constexpr):
    """Return what a product [KEYS, ROWS] starts from: 0, or with `FOLD` the row vector that has to be added anyway."""
    start = tl.zeros([KEYS, row.shape[0]], tl.float32)
    if FOLD:
        start += row[None, :]
    return start


@triton.jit
def unfolded(total, row, FOLD: tl.constexpr):
    """Return the product with the row vector added; with `FOLD` it is in it already."""
    if not FOLD:
        total += row[None, :]
    return total
