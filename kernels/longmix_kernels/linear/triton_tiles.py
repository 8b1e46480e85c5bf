"""What the linear-attention kernels do with a tile: loads, stores, exact sums of gates, and the weights between tokens.

A head dimension is taken in two powers of two, `*_MAIN` columns and then `*_REST` (see `split_dim`). Only columns past
the true dimension are masked. Rows are masked everywhere, since with chunks most tiles lie on an edge.

Logarithms are in base 2. Sums of them are whole multiples of 2 ** -32 in int64, so that they are exact: a gate is held
to +-8192, and the 1024 of a chunk add up to less than 2 ** 23. As float32 a sum is a pair of whole number and rest in
[0, 1], whose differences are as exact as the rests.
"""

import triton
import triton.language as tl


@triton.jit
def program_head(tiles, heads):
    """Which of `tiles` tiles, which batch row and which of `heads` heads a program is for; the last two in int64."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)


@triton.jit
def tile_places(matrix, start, stride_row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] into a head's matrix [T, ..], from row `start` and from `column` on.

    A row's offset needs int64. One per row costs fewer registers than offsets in int32 from the tile's first number.
    """
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return matrix + rows[:, None] * stride_row + (column + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def tile_mask(there, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Which of [rows, COLUMNS] from `column` on exist, in rows that are there and columns below `WIDTH`."""
    mask = there[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    return mask


@triton.jit
def load_tile(matrix, start, there, stride_row, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, COLUMNS] of a head's matrix [T, WIDTH], see `tile_places`; zero where `tile_mask` says."""
    places = tile_places(matrix, start, stride_row, column, there.shape[0], COLUMNS)
    return tl.load(places, mask=tile_mask(there, column, COLUMNS, WIDTH), other=0.0)


@triton.jit
def load_tile_transposed(matrix, start, there, stride_row, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the same tile as [COLUMNS, rows]."""
    places = tile_places(matrix, start, stride_row, column, there.shape[0], COLUMNS)
    return tl.load(tl.trans(places), mask=tl.trans(tile_mask(there, column, COLUMNS, WIDTH)), other=0.0)


@triton.jit
def store_tile(matrix, tile, start, there, stride_row, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Store [rows, COLUMNS] where `load_tile` would load it from, in the matrix's dtype."""
    places = tile_places(matrix, start, stride_row, column, there.shape[0], COLUMNS)
    tl.store(places, tile.to(matrix.dtype.element_ty), mask=tile_mask(there, column, COLUMNS, WIDTH))


@triton.jit
def load_block(
    matrix, row, ROWS: tl.constexpr, HEIGHT: tl.constexpr, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """Load [ROWS, COLUMNS] of a contiguous state [HEIGHT, WIDTH], zero past its ends, in the dtype it is stored in."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < HEIGHT) & (columns[None, :] < WIDTH)
    return tl.load(matrix + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_block_transposed(
    matrix, row, ROWS: tl.constexpr, HEIGHT: tl.constexpr, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """Load the same block as [COLUMNS, ROWS]."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (rows[None, :] < HEIGHT) & (columns[:, None] < WIDTH)
    return tl.load(matrix + rows[None, :] * WIDTH + columns[:, None], mask=mask, other=0.0)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """Return total + a b in float32; float32 operands are not rounded to TF32.

    `UPCAST` is for the interpreter, whose bfloat16 products are wrong without notice.
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def to_base_2(gate):
    """A natural logarithm in base 2, held to +-8192: past that every weight is 0 or without meaning."""
    return tl.minimum(tl.maximum(gate * 1.4426950408889634, -8192.0), 8192.0)


@triton.jit
def to_fixed(x):
    """float32 to multiples of 2 ** -32."""
    return (x * 4294967296.0).to(tl.int64)


@triton.jit
def to_float(fixed):
    """Multiples of 2 ** -32 to float32, rounded once."""
    return fixed.to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def whole_and_rest(fixed):
    """Multiples of 2 ** -32 as two float32: a whole number, exact below 2 ** 24, and a rest in [0, 1]."""
    whole = fixed >> 32
    return whole.to(tl.float32), to_float(fixed - (whole << 32))


@triton.jit
def pair_weights(row_whole, row_rest, column_whole, column_rest, visible):
    """Weights [rows, columns] from the vectors of both, already spread; 0 where not visible."""
    weights = tl.exp2((row_whole + column_whole) + (row_rest + column_rest))
    return tl.where(visible, weights, 0.0)
