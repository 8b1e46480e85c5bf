"""Operations of the Triton kernels of all engines on tiles: which tile a program takes, loads, stores and products.

A tile is some rows of one head's matrix [T, WIDTH]; a block is a part of a contiguous matrix, such as a state. Loads
and stores mask rows everywhere, since with chunks most tiles lie on an edge. They mask columns only where a tile
reaches past the true dimension. This module imports Triton, so only modules named `triton_*` import it.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """The rows of one head: where the first one begins, and how far apart they are."""

    pointer: tl.tensor
    stride: tl.tensor


@triton.jit
def program_head(tiles, heads):
    """Return the tile (of `tiles`), the batch row and the head (of `heads`) of this program; the last two in int64."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)


@triton.jit
def head_rows(matrix, batch, head):
    """Return the rows of one head of `tensors.Strided`."""
    return Rows(matrix.pointer + batch * matrix.stride_batch + head * matrix.stride_head, matrix.stride_row)


@triton.jit
def packed_rows(matrix, batch, length, head, heads, WIDTH: tl.constexpr):
    """Return the rows of one head of a contiguous tensor [B, length, heads, WIDTH]."""
    stride = heads * WIDTH
    return Rows(matrix + batch * length * stride + head * WIDTH, stride)


@triton.jit
def head_vector(vectors, batch, head, length):
    """Return the first of the `length` numbers of one head of `tensors.PerRow`, a pointer."""
    return vectors.pointer + ((batch * vectors.stride_batch + head * vectors.stride_head) >> 4) * length


@triton.jit
def tile_places(matrix, start, stride_row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers [ROWS, COLUMNS] into a head's matrix [T, ..], from row `start` and from `column` on.

    The offset of a row needs int64. One such offset per row costs fewer registers than int32 offsets of all numbers
    from the tile's first one.
    """
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    return matrix + rows[:, None] * stride_row + (column + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def tile_mask(there, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Return which numbers of a tile [rows, COLUMNS] exist: in rows that are `there` and in columns below `WIDTH`."""
    mask = there[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    return mask


@triton.jit
def load_tile(matrix, start, there, stride_row, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, COLUMNS] of a head's matrix [T, WIDTH] from `tile_places`, and zero where `tile_mask` is false."""
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
def store_block(matrix, block, row, HEIGHT: tl.constexpr, column, WIDTH: tl.constexpr):
    """Store a block of a contiguous matrix [HEIGHT, WIDTH], in its dtype."""
    rows, columns = row + tl.arange(0, block.shape[0]), column + tl.arange(0, block.shape[1])
    mask = (rows[:, None] < HEIGHT) & (columns[None, :] < WIDTH)
    tl.store(matrix + rows[:, None] * WIDTH + columns[None, :], block.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """Return total + a b in float32; float32 operands are not rounded to TF32.

    `UPCAST` is for the interpreter, whose bfloat16 products are wrong without notice.
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
