"""Operations of the attention kernels on a tile: loads, stores, starts of products, and ALiBi's bias.

A head dimension is two powers of two, `*_MAIN` columns and then `*_REST`, as `columns.split_dim` splits it. Loads and
stores mask only columns past the true dimension.

Rows may be taken in an order of their own, which the kernels read as they go. Query, key, value, their gradients,
output and logsumexp keep each row in its own place; everything else about rows is in the order in which they are taken.
"""

import triton
import triton.language as tl


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
def tile_places(matrix, start, numbers, stride_row, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr):
    """Return pointers [rows, COLUMNS] to the rows from `start` on, or with `GATHER` to the rows of these numbers.

    Offsets within a tile fit int32 for row strides below 2 ** 23. The offset of a row itself needs int64 beyond
    T = 65536.
    """
    column = COLUMN + tl.arange(0, COLUMNS)
    if GATHER:
        return matrix + tl.cast(numbers, tl.int64)[:, None] * stride_row + column[None, :]
    else:
        row = tl.arange(0, numbers.shape[0])
        return matrix + tl.cast(start, tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :])


@triton.jit
def load_tile(
    matrix,
    start,
    numbers,
    end,
    stride_row,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Load [rows, COLUMNS] of a matrix [.., WIDTH] from `tile_places`, from column `COLUMN` on.

    Columns past `WIDTH` are zero. If `MASKED`, rows from `end` on are zero too; otherwise all rows must exist.
    """
    places = tile_places(matrix, start, numbers, stride_row, COLUMN, COLUMNS, GATHER)
    row = tl.arange(0, numbers.shape[0])
    if COLUMN + COLUMNS > WIDTH:
        there = (COLUMN + tl.arange(0, COLUMNS))[None, :] < WIDTH
        if MASKED:
            there = there & (start + row < end)[:, None]
        return tl.load(places, mask=there, other=0.0)
    elif MASKED:
        return tl.load(places, mask=(start + row < end)[:, None], other=0.0)
    else:
        return tl.load(places)


@triton.jit
def load_step(descriptor, batch, start, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load [ROWS, COLUMNS] of a matrix [B, T, H, COLUMNS] by its descriptor, from row `start` on; all must exist."""
    return descriptor.load([tl.cast(batch, tl.int32), start, tl.cast(head, tl.int32), 0]).reshape(ROWS, COLUMNS)


@triton.jit
def store_tile(
    matrix,
    tile,
    start,
    numbers,
    end,
    stride_row,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Store [rows, COLUMNS] where `load_tile` would load it from, in the matrix's dtype, up to row `end`."""
    there = (start + tl.arange(0, numbers.shape[0]) < end)[:, None]
    if COLUMN + COLUMNS > WIDTH:
        there = there & ((COLUMN + tl.arange(0, COLUMNS))[None, :] < WIDTH)
    places = tile_places(matrix, start, numbers, stride_row, COLUMN, COLUMNS, GATHER)
    tl.store(places, tile.to(matrix.dtype.element_ty), mask=there)


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
