"""What the pairs of tokens of a chunk give queries, keys, low-rank reads and writes and decays, for any decays.

Weights are found again as in `triton_exact_pairs`. The gradient of a log decay is the sum of all weights that it is in,
times their gradients: of pairs of a later row and an earlier column. Every sum here holds just such pairs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_pairs import far_sums, load_kept, load_rows, same_block
from longmix_kernels.delta.triton_tiles import masked_sum, rows_at
from longmix_kernels.tiles import product


class Four(NamedTuple):
    """One thing for each kind of pair: keys and low-rank writes in queries, and in low-rank reads."""

    qk: tl.tensor
    qb: tl.tensor
    ak: tl.tensor
    ab: tl.tensor


@triton.jit
def of_rows(near, row):
    """What row `row` of each column's sub-chunk has of near weights [columns, 16], as [columns, 1]."""
    return tl.sum(tl.where((tl.arange(0, 16) == row)[None, :], near, 0.0), 1)[:, None]


@triton.jit
def row_sums(x, row):
    """Sums of x [CHUNK, BLOCK] over each sub-chunk, put into its row `row`; zero in others."""
    BLOCKS: tl.constexpr = x.shape[0] // 16
    sums = tl.sum(tl.reshape(x, [BLOCKS, 16, x.shape[1]]), 1)
    sums = tl.reshape(tl.broadcast_to(sums[:, None, :], [BLOCKS, 16, x.shape[1]]), [x.shape[0], x.shape[1]])
    return tl.where((tl.arange(0, x.shape[0]) % 16 == row)[:, None], sums, 0.0)


@triton.jit
def sums_before(x):
    """Sums of x [CHUNK, BLOCK] over the rows of its sub-chunk before each row."""
    CHUNK: tl.constexpr = x.shape[0]
    place = tl.arange(0, CHUNK)
    shifted = tl.where((place % 16 > 0)[:, None], rows_at(x, place - 1, CHUNK), 0.0)
    return tl.reshape(tl.cumsum(tl.reshape(shifted, [CHUNK // 16, 16, x.shape[1]]), 1), [CHUNK, x.shape[1]])


@triton.jit
def near_pair_grads(
    queries,
    reads,
    log_decay,
    k,  # [CHUNK, BLOCK]
    b,
    grad,  # `Four` of [columns, 16], gradients of weights, 0 where a row does not see an earlier column
    start,
    length,
    stride_decay_row,
    stride_decay_column,
    column,
    floor,
    LOW_RANK: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Return what pairs within sub-chunks give queries, keys, decays, low-rank reads and writes, [CHUNK, BLOCK]."""
    BLOCK: tl.constexpr = SIZES.BLOCK
    DIM: tl.constexpr = SIZES.DIM
    place = tl.arange(0, k.shape[0])
    own = place % 16
    weight = tl.zeros([k.shape[0], BLOCK], tl.float32)
    dq, dk, dg, da, db = weight, weight, weight, weight, weight
    for row in range(0, 16):
        tokens = start + place - own + row
        inside = tokens < length
        terms = tl.zeros([k.shape[0], BLOCK], tl.float32)
        if LOW_RANK:
            a = load_rows(reads.pointer, tokens, inside, reads.stride, 1, column, BLOCK, DIM)
            of_key, of_write = of_rows(grad.ak, row), of_rows(grad.ab, row)
            found = weight * (of_key * k + of_write * b)
            terms += found * a
            da += row_sums(found, row)
            dk += weight * of_key * a
            db += weight * of_write * a
        kept = load_kept(log_decay, tokens, inside, stride_decay_row, stride_decay_column, column, floor, BLOCK, DIM)
        weight = tl.where((own == row)[:, None], 1.0, weight * kept)
        q = load_rows(queries.pointer, tokens, inside, queries.stride, 1, column, BLOCK, DIM)
        of_key = of_rows(grad.qk, row)
        found = weight * (of_key * k)
        dk += weight * of_key * q
        if LOW_RANK:
            of_write = of_rows(grad.qb, row)
            found += weight * (of_write * b)
            db += weight * of_write * q
        dq += row_sums(found, row)
        # The row's own decay is in pairs with its query, and in none with its low-rank read.
        dg += row_sums(found * q, row)
        terms += found * q
        dg += tl.where((own < row)[:, None], sums_before(terms), 0.0)
    return dq, dk, dg, da, db


@triton.jit
def meeting(grad, level):
    """Gradients of weights [CHUNK, CHUNK] between tokens of one block of 2 ** (level + 1), zero elsewhere."""
    CHUNK: tl.constexpr = grad.shape[0]
    if CHUNK > 32:
        grad = tl.where(same_block(level + 1, CHUNK), grad, 0.0).to(grad.dtype)
    return grad


@triton.jit
def far_pair_grads(
    q,  # [CHUNK, BLOCK]
    a,
    k,
    b,
    decay,
    grad,  # `Four` of [rows, columns], gradients of weights, in the dtype of products
    turned,  # the same as [columns, rows]
    dq,  # [CHUNK, BLOCK], added to
    dk,
    dg,
    da,
    db,
    LOW_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add what pairs of tokens of different sub-chunks give."""
    CHUNK: tl.constexpr = k.shape[0]
    LOW: tl.constexpr = SIZES.LOW
    UPCAST: tl.constexpr = SIZES.UPCAST
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for level in range(4, 4 + CHUNK // 32):
        prefix, before, suffix = far_sums(decay, level, CHUNK, PRECISION)
        later = (tl.arange(0, CHUNK) >> level & 1 == 1)[:, None]
        outward, inward = tl.where(later, tl.exp2(prefix), 0.0), tl.where(later, 0.0, tl.exp2(suffix))
        half = same_block(level, CHUNK)
        key, query = (k * inward).to(LOW), (q * outward).to(LOW)
        found = product(meeting(grad.qk, level), key, None, UPCAST)
        if LOW_RANK:
            write = (b * inward).to(LOW)
            found = product(meeting(grad.qb, level), write, found, UPCAST)
        found *= outward
        dq += found
        dg += masked_sum(half & (other >= one), q * found, PRECISION)
        found = product(meeting(turned.qk, level), query, None, UPCAST)
        if LOW_RANK:
            read = tl.where(later, tl.exp2(before), 0.0)
            of_read = product(meeting(grad.ak, level), key, None, UPCAST)
            of_read = product(meeting(grad.ab, level), write, of_read, UPCAST) * read
            da += of_read
            dg += masked_sum(half & (other > one), a * of_read, PRECISION)
            read = (a * read).to(LOW)
            found = product(meeting(turned.ak, level), read, found, UPCAST)
            of_write = product(meeting(turned.qb, level), query, None, UPCAST)
            of_write = product(meeting(turned.ab, level), read, of_write, UPCAST) * inward
            db += of_write
        found *= inward
        dk += found
        terms = k * found
        if LOW_RANK:
            terms += b * of_write
        dg += masked_sum(half & (other < one), terms, PRECISION)
    return dq, dk, dg, da, db
