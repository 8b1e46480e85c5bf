"""What the pairs of tokens of a chunk give queries, keys, low-rank reads and writes, and decays, for any decays.

Weights are found again as in `triton_exact_pairs`. The gradient of a log decay is the sum of all weights that it is in,
times their gradients: of pairs of a later row and an earlier column. Every sum here holds just such pairs.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_pairs import far_sums, load_any, load_kept, same_block
from longmix_kernels.delta.triton_tiles import masked_sum, neighbour, rows_at
from longmix_kernels.tiles import product


@triton.jit
def of_rows(near, row):
    """Return the weights [columns, 1] that row `row` of each column's sub-chunk has in near ones [columns, 16]."""
    return tl.sum(tl.where((tl.arange(0, 16) == row)[None, :], near, 0.0), 1)[:, None]


@triton.jit
def row_sums(x, row):
    """Return the sums of x [CHUNK, BLOCK] over each sub-chunk, put into its row `row`; zero in others."""
    BLOCKS: tl.constexpr = x.shape[0] // 16
    sums = tl.sum(tl.reshape(x, [BLOCKS, 16, x.shape[1]]), 1)
    sums = tl.reshape(tl.broadcast_to(sums[:, None, :], [BLOCKS, 16, x.shape[1]]), [x.shape[0], x.shape[1]])
    return tl.where((tl.arange(0, x.shape[0]) % 16 == row)[:, None], sums, 0.0)


@triton.jit
def sums_before(x):
    """Return the sums of x [CHUNK, BLOCK] over the rows of its sub-chunk before each row."""
    CHUNK: tl.constexpr = x.shape[0]
    place = tl.arange(0, CHUNK)
    shifted = tl.where((place % 16 > 0)[:, None], rows_at(x, place - 1, CHUNK), 0.0)
    return tl.reshape(tl.cumsum(tl.reshape(shifted, [CHUNK // 16, 16, x.shape[1]]), 1), [CHUNK, x.shape[1]])


@triton.jit
def near_row_grads(
    chunk,
    k,  # [CHUNK, BLOCK]
    b,
    grad,  # `Four` of [columns, 16], gradients of weights, 0 where a row does not see an earlier column
    column,
    LOW_RANK: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Return what pairs within sub-chunks give queries, low-rank reads and decays, [CHUNK, BLOCK]."""
    place = tl.arange(0, k.shape[0])
    own = place % 16
    weight = tl.zeros([k.shape[0], SIZES.BLOCK], tl.float32)
    dq, da, dg = weight, weight, weight
    for row in range(0, 16):
        tokens = chunk.start + place - own + row
        inside = tokens < chunk.length
        terms = tl.zeros([k.shape[0], SIZES.BLOCK], tl.float32)
        if LOW_RANK:
            found = weight * (of_rows(grad.ak, row) * k + of_rows(grad.ab, row) * b)
            terms += found * load_any(chunk.read, tokens, inside, column, SIZES)
            da += row_sums(found, row)
        kept = load_kept(chunk.decays, tokens, inside, column, SIZES)
        weight = tl.where((own == row)[:, None], 1.0, weight * kept)
        found = of_rows(grad.qk, row) * k
        if LOW_RANK:
            found += of_rows(grad.qb, row) * b
        found *= weight
        dq += row_sums(found, row)
        # The row's own decay is in pairs with its query, and in none with its low-rank read.
        found *= load_any(chunk.query, tokens, inside, column, SIZES)
        dg += row_sums(found, row)
        dg += tl.where((own < row)[:, None], sums_before(terms + found), 0.0)
    return dq, da, dg


@triton.jit
def near_column_grads(chunk, grad, column, LOW_RANK: tl.constexpr, SIZES: tl.constexpr):
    """Return what pairs within sub-chunks give keys and low-rank writes, [CHUNK, BLOCK]; `grad` as in the rows'."""
    CHUNK: tl.constexpr = chunk.there.shape[0]
    place = tl.arange(0, CHUNK)
    own = place % 16
    weight = tl.zeros([CHUNK, SIZES.BLOCK], tl.float32)
    dk, db = weight, weight
    for row in range(0, 16):
        tokens = chunk.start + place - own + row
        inside = tokens < chunk.length
        if LOW_RANK:
            a = weight * load_any(chunk.read, tokens, inside, column, SIZES)
            dk += of_rows(grad.ak, row) * a
            db += of_rows(grad.ab, row) * a
        kept = load_kept(chunk.decays, tokens, inside, column, SIZES)
        weight = tl.where((own == row)[:, None], 1.0, weight * kept)
        q = weight * load_any(chunk.query, tokens, inside, column, SIZES)
        dk += of_rows(grad.qk, row) * q
        if LOW_RANK:
            db += of_rows(grad.qb, row) * q
    return dk, db


@triton.jit
def meeting(grad, level):
    """Return gradients of weights [CHUNK, CHUNK] where both tokens are of one block of 2 ** (level + 1), else zero."""
    CHUNK: tl.constexpr = grad.shape[0]
    if CHUNK > 32:
        grad = tl.where(same_block(level + 1, CHUNK), grad, 0.0).to(grad.dtype)
    return grad


@triton.jit
def far_row_grads(
    q,  # [CHUNK, BLOCK]
    a,
    k,
    b,
    decay,
    grad,  # `Four` of [rows, columns], gradients of weights, in the dtype of products
    dq,  # [CHUNK, BLOCK], added to
    da,
    dg,
    LOW_RANK: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add what pairs of tokens of different sub-chunks give queries, low-rank reads, and decays from the boundary on.

    A decay is in a pair of two sub-chunks from the boundary between them up to the row, which is added here, or after
    the column up to the boundary, which `far_column_grads` adds.
    """
    CHUNK: tl.constexpr = k.shape[0]
    UPCAST: tl.constexpr = SIZES.UPCAST
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for level in range(4, 4 + CHUNK // 32):
        prefix, before, suffix = far_sums(decay, level, CHUNK, SIZES.PRECISION)
        later = (tl.arange(0, CHUNK) >> level & 1 == 1)[:, None]
        inward = tl.where(later, 0.0, tl.exp2(suffix))
        key = (k * inward).to(SIZES.LOW)
        found = product(meeting(grad.qk, level), key, None, UPCAST)
        if LOW_RANK:
            write = (b * inward).to(SIZES.LOW)
            found = product(meeting(grad.qb, level), write, found, UPCAST)
        found *= tl.where(later, tl.exp2(prefix), 0.0)
        dq += found
        terms = q * found
        if LOW_RANK:
            found = product(meeting(grad.ak, level), key, None, UPCAST)
            found = product(meeting(grad.ab, level), write, found, UPCAST)
            found *= tl.where(later, tl.exp2(before), 0.0)
            da += found
            # A row's own decay is in no pair with its low-rank read: what the next one has counts from here on.
            terms += rows_at(a * found, neighbour(tl.arange(0, CHUNK) >> level, 1, CHUNK), CHUNK)
        dg += masked_sum(same_block(level, CHUNK) & (other >= one), terms, SIZES.PRECISION)
    return dq, da, dg


@triton.jit
def far_column_grads(
    q,  # [CHUNK, BLOCK]
    a,
    k,
    b,
    decay,
    turned,  # `Four` of [columns, rows], gradients of weights, in the dtype of products
    dk,  # [CHUNK, BLOCK], added to
    db,
    dg,
    LOW_RANK: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Add what pairs of tokens of different sub-chunks give keys, low-rank writes and decays up to the boundary."""
    CHUNK: tl.constexpr = k.shape[0]
    UPCAST: tl.constexpr = SIZES.UPCAST
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    for level in range(4, 4 + CHUNK // 32):
        prefix, before, suffix = far_sums(decay, level, CHUNK, SIZES.PRECISION)
        later = (tl.arange(0, CHUNK) >> level & 1 == 1)[:, None]
        query = (q * tl.where(later, tl.exp2(prefix), 0.0)).to(SIZES.LOW)
        inward = tl.where(later, 0.0, tl.exp2(suffix))
        found = product(meeting(turned.qk, level), query, None, UPCAST)
        if LOW_RANK:
            read = (a * tl.where(later, tl.exp2(before), 0.0)).to(SIZES.LOW)
            found = product(meeting(turned.ak, level), read, found, UPCAST)
        found *= inward
        dk += found
        terms = k * found
        if LOW_RANK:
            found = product(meeting(turned.qb, level), query, None, UPCAST)
            found = product(meeting(turned.ab, level), read, found, UPCAST) * inward
            db += found
            terms += b * found
        dg += masked_sum(same_block(level, CHUNK) & (other < one), terms, SIZES.PRECISION)
    return dk, db, dg
