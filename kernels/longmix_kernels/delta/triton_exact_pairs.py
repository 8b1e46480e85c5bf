"""The weights between the tokens of a chunk for any decays: all factors are at most 1, and no sum is a difference.

Row i meets column j < i by the decays d after j up to i. A chunk is cut in sub-chunks of 16 tokens. Those of two halves
of 2 s tokens, s = 16 or 32, meet at the boundary m between them, which splits the decays:

    exp2(d_{j+1} + .. + d_i) = exp2(d_m + .. + d_i) exp2(d_{j+1} + .. + d_{m-1})        j < m <= i,  d <= 0

so both exponents are at most 0, and the weights are products of matrices. Within a sub-chunk weights are products of
decays, row after row, of all sub-chunks at once. A difference of sums would lose small decays beside large ones.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_tiles import masked_sum
from longmix_kernels.tiles import product


@triton.jit
def load_rows(matrix, rows, inside, stride_row, stride_column, column, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Load [rows, BLOCK] of any rows of a head's matrix, in float32, zero where they are not `inside`."""
    columns = column + tl.arange(0, BLOCK)
    places = matrix + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(places, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_kept(
    log_decay, rows, inside, stride_row, stride_column, column, floor, BLOCK: tl.constexpr, DIM: tl.constexpr
):
    """Load what rows keep of a state, [rows, BLOCK], 1 where they are not `inside`."""
    decay = load_rows(log_decay, rows, inside, stride_row, stride_column, column, BLOCK, DIM)
    return tl.exp2(tl.maximum(decay, floor) * 1.4426950408889634)


@triton.jit
def near_zeros(CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """No weights within sub-chunks: [columns, 16] for the rows of each column's sub-chunk, or [16, columns]."""
    return tl.zeros([CHUNK, 16] if TRANSPOSED else [16, CHUNK], tl.float32)


@triton.jit
def near_pairs(
    query,
    low_rank_read,
    log_decay,
    k,  # [CHUNK, BLOCK]
    b,
    qk,  # as `near_zeros`, weights, added to: of keys in queries
    qb,  # of low-rank writes in queries
    ak,  # of keys in low-rank reads
    ab,
    start,
    length,
    stride_query_row,
    stride_read_row,
    stride_decay_row,
    stride_decay_column,
    column,
    floor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Add the weights within sub-chunks that `BLOCK` columns give; 0 for columns after a row."""
    place = tl.arange(0, CHUNK)
    own = place % 16
    weight = tl.zeros([CHUNK, BLOCK], tl.float32)
    for row in range(0, 16):
        tokens = start + place - own + row
        inside = tokens < length
        here = (tl.arange(0, 16) == row)[None, :] if TRANSPOSED else (tl.arange(0, 16) == row)[:, None]
        if low_rank_read is not None:
            read = weight * load_rows(low_rank_read, tokens, inside, stride_read_row, 1, column, BLOCK, DIM)
            of_key, of_write = tl.sum(read * k, 1), tl.sum(read * b, 1)
            if TRANSPOSED:
                ak += tl.where(here, of_key[:, None], 0.0)
                ab += tl.where(here, of_write[:, None], 0.0)
            else:
                ak += tl.where(here, of_key[None, :], 0.0)
                ab += tl.where(here, of_write[None, :], 0.0)
        kept = load_kept(log_decay, tokens, inside, stride_decay_row, stride_decay_column, column, floor, BLOCK, DIM)
        weight = tl.where((own == row)[:, None], 1.0, weight * kept)
        asked = weight * load_rows(query, tokens, inside, stride_query_row, 1, column, BLOCK, DIM)
        of_key = tl.sum(asked * k, 1)
        if TRANSPOSED:
            qk += tl.where(here, of_key[:, None], 0.0)
        else:
            qk += tl.where(here, of_key[None, :], 0.0)
        if low_rank_read is not None:
            of_write = tl.sum(asked * b, 1)
            if TRANSPOSED:
                qb += tl.where(here, of_write[:, None], 0.0)
            else:
                qb += tl.where(here, of_write[None, :], 0.0)
    return qk, qb, ak, ab


@triton.jit
def spread(near, far, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """All weights of a chunk, [CHUNK, CHUNK]: those within sub-chunks, and `far` ones added."""
    BLOCKS: tl.constexpr = CHUNK // 16
    if TRANSPOSED:
        whole = tl.reshape(tl.broadcast_to(near[:, None, :], [CHUNK, BLOCKS, 16]), [CHUNK, CHUNK])
    else:
        whole = tl.reshape(tl.broadcast_to(near[None, :, :], [BLOCKS, 16, CHUNK]), [CHUNK, CHUNK])
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return far + tl.where(row // 16 == column // 16, whole, 0.0)


@triton.jit
def near_of(whole, CHUNK: tl.constexpr):
    """Of [columns, rows] what lies within sub-chunks, [columns, 16]."""
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    own = tl.where(row // 16 == column // 16, whole, 0.0)
    return tl.sum(tl.reshape(own, [CHUNK, CHUNK // 16, 16]), 1)


@triton.jit
def same_block(level, CHUNK: tl.constexpr):
    """Which tokens are of the same block of 2 ** level tokens, [CHUNK, CHUNK]."""
    return tl.arange(0, CHUNK)[:, None] >> level == tl.arange(0, CHUNK)[None, :] >> level


@triton.jit
def far_sums(decay, level, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of decays within blocks of 2 ** level tokens, [CHUNK, BLOCK]: up to each token, before it, and after it."""
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    same = same_block(level, CHUNK)
    prefix = masked_sum(same & (other <= one), decay, PRECISION)
    before = masked_sum(same & (other < one), decay, PRECISION)
    return prefix, before, masked_sum(same & (other > one), decay, PRECISION)


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
    qk,  # [CHUNK, CHUNK] weights, added to
    qb,
    ak,
    ab,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LOW_RANK: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the weights between sub-chunks that `BLOCK` columns give."""
    for level in range(4, 4 + CHUNK // 32):
        prefix, before, suffix = far_sums(decay, level, CHUNK, PRECISION)
        later = (tl.arange(0, CHUNK) >> level & 1 == 1)[:, None]
        row = tl.where(later, q * tl.exp2(prefix), 0.0).to(LOW)
        key = tl.where(later, 0.0, k * tl.exp2(suffix)).to(LOW)
        qk = far_pair(row, key, qk, level, CHUNK, TRANSPOSED, UPCAST)
        if LOW_RANK:
            write = tl.where(later, 0.0, b * tl.exp2(suffix)).to(LOW)
            qb = far_pair(row, write, qb, level, CHUNK, TRANSPOSED, UPCAST)
            row = tl.where(later, a * tl.exp2(before), 0.0).to(LOW)
            ak = far_pair(row, key, ak, level, CHUNK, TRANSPOSED, UPCAST)
            ab = far_pair(row, write, ab, level, CHUNK, TRANSPOSED, UPCAST)
    return qk, qb, ak, ab


@triton.jit
def exact_pairs(
    query,
    low_rank_read,
    low_rank_write,
    key,
    log_decay,
    start,
    length,
    stride_query_row,
    stride_key_row,
    stride_decay_row,
    stride_decay_column,
    stride_read_row,
    stride_write_row,
    floor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The weights of keys and low-rank writes in queries, and in low-rank reads, [rows, columns] or `TRANSPOSED`.

    Unmasked, but that a row has nothing of a later column.
    """
    LOW_RANK: tl.constexpr = low_rank_read is not None
    LOW: tl.constexpr = key.dtype.element_ty
    rows = start + tl.arange(0, CHUNK)
    there = rows < length
    near_qk = near_zeros(CHUNK, TRANSPOSED)
    near_qb, near_ak, near_ab = near_qk, near_qk, near_qk
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    qb, ak, ab = qk, qk, qk
    for column in range(0, DIM, BLOCK):
        k = load_rows(key, rows, there, stride_key_row, 1, column, BLOCK, DIM)
        a, b = k, k
        if LOW_RANK:
            b = load_rows(low_rank_write, rows, there, stride_write_row, 1, column, BLOCK, DIM)
        near_qk, near_qb, near_ak, near_ab = near_pairs(
            query,
            low_rank_read,
            log_decay,
            k,
            b,
            near_qk,
            near_qb,
            near_ak,
            near_ab,
            start,
            length,
            stride_query_row,
            stride_read_row,
            stride_decay_row,
            stride_decay_column,
            column,
            floor,
            BLOCK,
            DIM,
            CHUNK,
            TRANSPOSED,
        )
        if CHUNK > 16:
            q = load_rows(query, rows, there, stride_query_row, 1, column, BLOCK, DIM)
            if LOW_RANK:
                a = load_rows(low_rank_read, rows, there, stride_read_row, 1, column, BLOCK, DIM)
            decay = load_rows(log_decay, rows, there, stride_decay_row, stride_decay_column, column, BLOCK, DIM)
            decay = tl.maximum(decay, floor) * 1.4426950408889634
            qk, qb, ak, ab = far_pairs(
                q, a, k, b, decay, qk, qb, ak, ab, CHUNK, TRANSPOSED, LOW_RANK, LOW, PRECISION, UPCAST
            )
    qk = spread(near_qk, qk, CHUNK, TRANSPOSED)
    if LOW_RANK:
        qb = spread(near_qb, qb, CHUNK, TRANSPOSED)
        ak = spread(near_ak, ak, CHUNK, TRANSPOSED)
        ab = spread(near_ab, ab, CHUNK, TRANSPOSED)
    return qk, qb, ak, ab
