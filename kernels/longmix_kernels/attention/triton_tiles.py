"""What the attention kernels share: bounds of a tile, the steps that cover them, loads, stores and products.

A tile of rows walks along the other axis of the score matrix in steps. `MODE` says where the bounds come from:

    "full"       every row sees every key                                         nothing is read
    "causal"     row i, at position p = i + keys - queries, sees keys up to p     nothing is read
    "window"     as causal, and at most `window` keys                             nothing is read
    "documents"  as causal, from the first key `lo` on (a window is in `lo`)      one int32 per row is read
    "bounds"     `lo` and `hi`                                                    two int32 per row are read

A head dimension is taken in two powers of two, `*_MAIN` columns and then `*_REST` (see `launch.split_dim`). Only
columns past the true dimension are masked.
"""

import triton
import triton.language as tl


@triton.jit
def keys_of_rows(lo, hi, rows, inside, queries, keys, window, MODE: tl.constexpr):
    """First key, and one past the last, that each of `rows` sees; none for a row that is not `inside`.

    `lo` and `hi` point to the first row of the head's bounds.
    """
    if MODE == "bounds":
        end = tl.load(hi + rows, mask=inside, other=0)
    elif MODE == "full":
        end = tl.where(inside, keys, 0)
    else:
        end = tl.where(inside, tl.maximum(rows + (keys - queries) + 1, 0), 0)
    if MODE == "bounds" or MODE == "documents":
        first = tl.load(lo + rows, mask=inside, other=0)
    elif MODE == "window":
        first = tl.maximum(end - window, 0)
    else:
        first = end * 0
    return first, end


@triton.jit
def rows_of_keys(first_row, end_row, columns, inside, queries, keys, window, MODE: tl.constexpr):
    """First row, and one past the last, that sees each of the keys `columns`; none for a key that is not `inside`.

    `first_row` and `end_row` point to the bounds of the head's first key, transposed as `key_bounds` does.
    """
    if MODE == "bounds":
        first = tl.load(first_row + columns, mask=inside, other=0)
    elif MODE == "full":
        first = tl.where(inside, columns * 0, 0)
    else:
        first = tl.where(inside, tl.maximum(columns - (keys - queries), 0), 0)
    if MODE == "bounds" or MODE == "documents":
        end = tl.load(end_row + columns, mask=inside, other=0)
    elif MODE == "window":
        end = tl.where(inside, tl.minimum(columns - (keys - queries) + window, queries), 0)
    else:
        end = tl.where(inside, queries, 0)
    return first, end


@triton.jit
def cover(begin, full_begin, full_end, end, STEP: tl.constexpr):
    """Cover [begin, end) by steps of `STEP`, of which those inside [full_begin, full_end) need no mask.

    Returns the number of steps on the leading edge, which begin at `begin`; where the full steps begin, and their
    number; where the trailing edge begins, and its number of steps.
    """
    leading = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), STEP)
    full_start = begin + leading * STEP
    full = tl.maximum(full_end - full_start, 0) // STEP
    trailing_start = full_start + full * STEP
    trailing = tl.cdiv(tl.maximum(end - trailing_start, 0), STEP)
    return leading, full_start, full, trailing_start, trailing


@triton.jit
def step_start(step, begin, leading, full_start, trailing_start, STEP: tl.constexpr, EDGE: tl.constexpr):
    """Where a step begins; edge steps are counted through the leading edge and on along the trailing one."""
    if EDGE:
        return tl.where(step < leading, begin + step * STEP, trailing_start + (step - leading) * STEP)
    return full_start + step * STEP


@triton.jit
def load_tile(
    matrix,
    start,
    end,
    stride_row,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load [ROWS, COLUMNS] of a matrix [.., WIDTH] from row `start` and column `COLUMN` on.

    Columns past `WIDTH` are zero, and so are rows from `end` on if `MASKED`; otherwise all rows must exist. Offsets
    within a tile fit int32 for row strides below 2 ** 23; `start` times the stride needs int64 beyond T = 65536.
    """
    row = tl.arange(0, ROWS)
    column = COLUMN + tl.arange(0, COLUMNS)
    tile = matrix + tl.cast(start, tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :])
    if COLUMN + COLUMNS > WIDTH:
        there = column[None, :] < WIDTH
        if MASKED:
            there = there & (start + row < end)[:, None]
        return tl.load(tile, mask=there, other=0.0)
    elif MASKED:
        return tl.load(tile, mask=(start + row < end)[:, None], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def store_tile(
    matrix,
    tile,
    start,
    end,
    stride_row,
    ROWS: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store [ROWS, COLUMNS] where `load_tile` would load it from, in the matrix's dtype, up to row `end`."""
    row = tl.arange(0, ROWS)
    column = COLUMN + tl.arange(0, COLUMNS)
    there = (start + row < end)[:, None]
    if COLUMN + COLUMNS > WIDTH:
        there = there & (column[None, :] < WIDTH)
    place = matrix + tl.cast(start, tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :])
    tl.store(place, tile.to(matrix.dtype.element_ty), mask=there)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """Return total + a b in float32; float32 operands are not rounded to TF32.

    `UPCAST` is for the interpreter, whose bfloat16 products are wrong without notice.
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def spread(row, KEYS: tl.constexpr, FOLD: tl.constexpr):
    """What a [KEYS, ROWS] product starts from: 0, or with `FOLD` the row vector that has to be added to it anyway."""
    start = tl.zeros([KEYS, row.shape[0]], tl.float32)
    if FOLD:
        start += row[None, :]
    return start


@triton.jit
def unfolded(total, row, FOLD: tl.constexpr):
    """The product plus the row vector, which is in it already with `FOLD`."""
    if not FOLD:
        total += row[None, :]
    return total
