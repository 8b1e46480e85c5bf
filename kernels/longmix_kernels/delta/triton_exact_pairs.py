"""The weights between the tokens of a chunk for any decays: all factors are at most 1, and no sum is a difference.

Row i meets column j < i by the decays d after j up to i. A chunk is cut in sub-chunks of 16 tokens. Those of two halves
of 2 s tokens, s = 16 or 32, meet at the boundary m between them, which splits the decays:

    exp2(d_{j+1} + .. + d_i) = exp2(d_m + .. + d_i) exp2(d_{j+1} + .. + d_{m-1})        j < m <= i,  d <= 0

so both exponents are at most 0, and the weights are products of matrices. Within a sub-chunk weights are products of
decays, row after row, of all sub-chunks at once. A difference of sums would lose small decays beside large ones.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.delta.triton_chunk import load_decay
from longmix_kernels.delta.triton_tiles import masked_sum, neighbour, rows_at
from longmix_kernels.tiles import product


class Four(NamedTuple):
    """One thing for each kind of pair: keys and low-rank writes in queries, and in low-rank reads."""

    qk: tl.tensor
    qb: tl.tensor
    ak: tl.tensor
    ab: tl.tensor


@triton.jit
def load_any(rows, tokens, inside, column, SIZES: tl.constexpr):
    """Load [tokens, BLOCK] of any rows of a head's matrix, in float32, zero where they are not `inside`."""
    columns = column + tl.arange(0, SIZES.BLOCK)
    places = rows.pointer + tokens.to(tl.int64)[:, None] * rows.stride + columns[None, :]
    return tl.load(places, mask=inside[:, None] & (columns < SIZES.DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_kept(decays, tokens, inside, column, SIZES: tl.constexpr):
    """Load what rows keep of a state, [tokens, BLOCK], 1 where they are not `inside`."""
    columns = column + tl.arange(0, SIZES.BLOCK)
    places = decays.pointer + tokens.to(tl.int64)[:, None] * decays.stride + columns[None, :] * decays.stride_column
    decay = tl.load(places, mask=inside[:, None] & (columns < SIZES.DIM)[None, :], other=0.0)
    return tl.exp2(tl.maximum(decay, decays.floor) * 1.4426950408889634)


@triton.jit
def put(near, row, sums, TRANSPOSED: tl.constexpr):
    """Add the weights [CHUNK] of row `row` of each column's sub-chunk to near ones, as `near_pairs` has them."""
    if TRANSPOSED:
        return near + tl.where((tl.arange(0, 16) == row)[None, :], sums[:, None], 0.0)
    else:
        return near + tl.where((tl.arange(0, 16) == row)[:, None], sums[None, :], 0.0)


@triton.jit
def near_pairs(
    chunk,
    k,  # [CHUNK, BLOCK]
    b,
    near,  # `Four` of weights, [16, columns] for the rows of each column's sub-chunk, or [columns, 16]; added to
    column,
    LOW_RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add the weights within sub-chunks that `BLOCK` columns give; 0 for columns after a row."""
    place = tl.arange(0, k.shape[0])
    own = place % 16
    weight = tl.zeros([k.shape[0], SIZES.BLOCK], tl.float32)
    qk, qb, ak, ab = near.qk, near.qb, near.ak, near.ab
    for row in range(0, 16):
        tokens = chunk.start + place - own + row
        inside = tokens < chunk.length
        if LOW_RANK:
            read = weight * load_any(chunk.read, tokens, inside, column, SIZES)
            ak = put(ak, row, tl.sum(read * k, 1), TRANSPOSED)
            ab = put(ab, row, tl.sum(read * b, 1), TRANSPOSED)
        kept = load_kept(chunk.decays, tokens, inside, column, SIZES)
        weight = tl.where((own == row)[:, None], 1.0, weight * kept)
        asked = weight * load_any(chunk.query, tokens, inside, column, SIZES)
        qk = put(qk, row, tl.sum(asked * k, 1), TRANSPOSED)
        if LOW_RANK:
            qb = put(qb, row, tl.sum(asked * b, 1), TRANSPOSED)
    return Four(qk, qb, ak, ab)


@triton.jit
def spread(near, far, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return all weights of a chunk, [CHUNK, CHUNK]: those within sub-chunks, and `far` ones added."""
    BLOCKS: tl.constexpr = CHUNK // 16
    if TRANSPOSED:
        whole = tl.reshape(tl.broadcast_to(near[:, None, :], [CHUNK, BLOCKS, 16]), [CHUNK, CHUNK])
    else:
        whole = tl.reshape(tl.broadcast_to(near[None, :, :], [BLOCKS, 16, CHUNK]), [CHUNK, CHUNK])
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return far + tl.where(row // 16 == column // 16, whole, 0.0)


@triton.jit
def near_of(whole, CHUNK: tl.constexpr):
    """Return the part of weights [columns, rows] that lies within sub-chunks, as [columns, 16]."""
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    own = tl.where(row // 16 == column // 16, whole, 0.0)
    return tl.sum(tl.reshape(own, [CHUNK, CHUNK // 16, 16]), 1)


@triton.jit
def same_block(level, CHUNK: tl.constexpr):
    """Return which tokens are of the same block of 2 ** level tokens, [CHUNK, CHUNK]."""
    return tl.arange(0, CHUNK)[:, None] >> level == tl.arange(0, CHUNK)[None, :] >> level


@triton.jit
def far_sums(decay, level, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Return sums of decays within blocks of 2 ** level tokens, [CHUNK, BLOCK]: up to, before and after each token."""
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    same = same_block(level, CHUNK)
    block = tl.arange(0, CHUNK) >> level
    prefix = masked_sum(same & (other <= one), decay, PRECISION)
    before = rows_at(prefix, neighbour(block, -1, CHUNK), CHUNK)
    after = masked_sum(same & (other >= one), decay, PRECISION)
    return prefix, before, rows_at(after, neighbour(block, 1, CHUNK), CHUNK)


@triton.jit
def far_pair(row, column, total, level, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr):
    """Return total plus the weights of columns in rows, of halves of one block of 2 ** (level + 1) tokens."""
    left, right = (column, row) if TRANSPOSED else (row, column)
    found = product(left, tl.trans(right), None, UPCAST)
    return total + tl.where(same_block(level + 1, CHUNK), found, 0.0)


@triton.jit
def far_pairs(
    q,  # [CHUNK, BLOCK]
    a,
    k,
    b,
    decay,
    far,  # `Four` of [CHUNK, CHUNK] weights, added to
    LOW_RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add the weights between sub-chunks that `BLOCK` columns give."""
    CHUNK: tl.constexpr = k.shape[0]
    LOW: tl.constexpr = SIZES.LOW
    qk, qb, ak, ab = far.qk, far.qb, far.ak, far.ab
    for level in range(4, 4 + CHUNK // 32):
        prefix, before, suffix = far_sums(decay, level, CHUNK, SIZES.PRECISION)
        later = (tl.arange(0, CHUNK) >> level & 1 == 1)[:, None]
        row = tl.where(later, q * tl.exp2(prefix), 0.0).to(LOW)
        key = tl.where(later, 0.0, k * tl.exp2(suffix)).to(LOW)
        qk = far_pair(row, key, qk, level, CHUNK, TRANSPOSED, SIZES.UPCAST)
        if LOW_RANK:
            write = tl.where(later, 0.0, b * tl.exp2(suffix)).to(LOW)
            qb = far_pair(row, write, qb, level, CHUNK, TRANSPOSED, SIZES.UPCAST)
            row = tl.where(later, a * tl.exp2(before), 0.0).to(LOW)
            ak = far_pair(row, key, ak, level, CHUNK, TRANSPOSED, SIZES.UPCAST)
            ab = far_pair(row, write, ab, level, CHUNK, TRANSPOSED, SIZES.UPCAST)
    return Four(qk, qb, ak, ab)


@triton.jit
def exact_pairs(chunk, CHUNK: tl.constexpr, LOW_RANK: tl.constexpr, TRANSPOSED: tl.constexpr, SIZES: tl.constexpr):
    """Return the weights of keys and low-rank writes in queries and in low-rank reads, a `Four`.

    They are [rows, columns] or `TRANSPOSED`, and unmasked, but that a row has nothing of a later column.
    """
    rows = chunk.start + tl.arange(0, CHUNK)
    none = tl.zeros([CHUNK, 16] if TRANSPOSED else [16, CHUNK], tl.float32)
    near = Four(none, none, none, none)
    none = tl.zeros([CHUNK, CHUNK], tl.float32)
    far = Four(none, none, none, none)
    for column in range(0, SIZES.DIM, SIZES.BLOCK):
        k = load_any(chunk.key, rows, chunk.there, column, SIZES)
        a, b = k, k
        if LOW_RANK:
            b = load_any(chunk.write, rows, chunk.there, column, SIZES)
        near = near_pairs(chunk, k, b, near, column, LOW_RANK, TRANSPOSED, SIZES)
        if CHUNK > 16:
            q = load_any(chunk.query, rows, chunk.there, column, SIZES)
            if LOW_RANK:
                a = load_any(chunk.read, rows, chunk.there, column, SIZES)
            decay = load_decay(chunk, column, SIZES.BLOCK, SIZES.DIM)
            far = far_pairs(q, a, k, b, decay, far, LOW_RANK, TRANSPOSED, SIZES)
    qk = spread(near.qk, far.qk, CHUNK, TRANSPOSED)
    qb, ak, ab = qk, qk, qk
    if LOW_RANK:
        qb = spread(near.qb, far.qb, CHUNK, TRANSPOSED)
        ak = spread(near.ak, far.ak, CHUNK, TRANSPOSED)
        ab = spread(near.ab, far.ab, CHUNK, TRANSPOSED)
    return Four(qk, qb, ak, ab)
