"""The weights between the tokens of a chunk where each head has one decay.

Then the decays between a column and a row are one number for all channels, and a weight is that times a product of row
and column: A_ij = exp2(d_{j+1} + .. + d_i) q_i k_j. The sum goes over just these decays, and is at most 0. It is no
difference of longer sums, so any decay will do, in chunks of any length.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_chunk import load_columns, load_decay
from longmix_kernels.tiles import product


@triton.jit
def between(decay, STRICT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the share of each column that decays [CHUNK, 1] leave at each row, [rows, columns] or `TRANSPOSED`.

    Queries keep what the decays after the column up to the row leave, and reads (`STRICT`) up to the row before. The
    result is 1 where no decay lies between, also for rows before their columns.
    """
    CHUNK: tl.constexpr = decay.shape[0]
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    # Decay t counts if column < t <= row: a running sum over the rows of those after the column.
    if STRICT:
        decay = tl.sum(tl.where(other == one - 1, tl.trans(decay), 0.0), 1)[:, None]
    LAST: tl.constexpr = 1 if STRICT else 0
    if TRANSPOSED:
        return tl.exp2(tl.cumsum(tl.where(other - LAST > one, tl.trans(decay), 0.0), 1))
    else:
        return tl.exp2(tl.cumsum(tl.where(one - LAST > other, decay, 0.0), 0))


@triton.jit
def plain_pairs(rows, columns, chunk, TRANSPOSED: tl.constexpr, SIZES: tl.constexpr):
    """Return products of rows and columns of a chunk without decays, [rows, columns] or `TRANSPOSED`, in float32."""
    CHUNK: tl.constexpr = chunk.there.shape[0]
    total = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column in range(0, SIZES.DIM, SIZES.BLOCK):
        x = load_columns(rows, chunk, column, SIZES)
        y = load_columns(columns, chunk, column, SIZES)
        if TRANSPOSED:
            total = product(y, tl.trans(x), total, SIZES.UPCAST)
        else:
            total = product(x, tl.trans(y), total, SIZES.UPCAST)
    return total


@triton.jit
def head_pairs(rows, columns, chunk, STRICT: tl.constexpr, TRANSPOSED: tl.constexpr, SIZES: tl.constexpr):
    """Return the weights of one kind of columns in one kind of rows, low-rank reads if `STRICT`; unmasked."""
    left = between(load_decay(chunk, 0, 1, 1), STRICT, TRANSPOSED)
    return plain_pairs(rows, columns, chunk, TRANSPOSED, SIZES) * left
