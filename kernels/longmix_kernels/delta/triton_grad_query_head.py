"""The delta rule on a GPU, backward in queries and low-rank reads, where each head has one decay.

`triton_grad_key_bounded` has the equations. A weight is one number times a product of row and column, see
`triton_head_pairs`, so a row's gradient is a sum of columns, weighted by gradients of weights times that number. The
gradient of a decay is the sum of the weights that it is in, times their gradients: of pairs of a later row and an
earlier column. Every sum here holds just such pairs, and none is a difference, so any decay will do. One program per
chunk adds what rows and pairs give decays; `triton_grad_key_head` adds what columns give.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import chunk_of, ends_of, load_columns, load_decay, store_columns
from longmix_kernels.delta.triton_grad_parts import own_grads, read_grad, weight_grad
from longmix_kernels.delta.triton_head_pairs import between, plain_pairs
from longmix_kernels.delta.triton_tiles import Sizes, decay_sums, masked_sum, pair_mask, row_terms
from longmix_kernels.tiles import product, store_tile


@triton.jit
def pair_terms(rows, columns, grads, values, chunk, mask, factor, SIZES: tl.constexpr):
    """Return the weights of columns in rows times their gradients, [rows, columns]."""
    grad = weight_grad(grads, values, chunk, mask, factor, SIZES, tl.float32)
    return grad * plain_pairs(rows, columns, chunk, False, SIZES)


@triton.jit
def decay_terms(terms, STRICT: tl.constexpr, PRECISION: tl.constexpr):
    """Return for each decay the sum [CHUNK] of the terms [rows, columns] of pairs that it lies between.

    It lies between a column before its token and a row from its token on, or after it (`STRICT`).
    """
    CHUNK: tl.constexpr = terms.shape[0]
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    of_rows = masked_sum(other > one if STRICT else other >= one, terms, PRECISION)
    return tl.sum(tl.where(other < one, of_rows, 0.0), 1)


@triton.jit(do_not_specialize=["length", "heads"])
def grad_query_head_kernel(
    tokens: Tokens,
    ends: Ends,
    grad_query,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32 [B, T, H], what rows and pairs have
    grad_read,
    length,
    heads,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradients of one chunk of one head."""
    DOCUMENTS: tl.constexpr = tokens.document_ids is not None
    LOW_RANK: tl.constexpr = tokens.low_rank_read is not None
    WITH_INITIAL: tl.constexpr = DOCUMENTS and ends.initial is not None
    LOW: tl.constexpr = tokens.key.pointer.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk = chunk_of(tokens, length, heads, CHUNK)
    end = ends_of(tokens, ends, chunk, SIZES)
    own, decay, v, u = end.own, load_decay(chunk, 0, 1, 1), chunk.value, end.u

    # Gradients of weights, times what lies between row and column, [rows, columns]; and what they give decays.
    mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    factor = between(decay, False, False) * tokens.scale
    terms = pair_terms(chunk.query, chunk.key, end.dy, v, chunk, mask, factor, SIZES)
    if LOW_RANK:
        terms += pair_terms(chunk.query, chunk.write, end.dy, u, chunk, mask, factor, SIZES)
    dg = decay_terms(terms, False, PRECISION)
    qk = weight_grad(end.dy, v, chunk, mask, factor, SIZES, LOW)
    if LOW_RANK:
        qb = weight_grad(end.dy, u, chunk, mask, factor, SIZES, LOW)
        factor = between(decay, True, False)
        terms = pair_terms(chunk.read, chunk.key, end.dx, v, chunk, mask, factor, SIZES)
        terms += pair_terms(chunk.read, chunk.write, end.dx, u, chunk, mask, factor, SIZES)
        dg += decay_terms(terms, True, PRECISION)
        ak = weight_grad(end.dx, v, chunk, mask, factor, SIZES, LOW)
        ab = weight_grad(end.dx, u, chunk, mask, factor, SIZES, LOW)
    own_key, own_write = own_grads(end, chunk, tokens.scale, LOW_RANK, SIZES)

    # What reading states gives decays, by row.
    sums = decay_sums(decay, own, "head", DOCUMENTS, PRECISION)
    by_query = tl.zeros([CHUNK], tl.float32)
    by_read = by_query
    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        k = load_columns(chunk.key, chunk, column, SIZES)
        q = load_columns(chunk.query, chunk, column, SIZES)
        dq = read_grad(end.dy, end, chunk, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(sums.prefix) * tokens.scale
        by_query += tl.sum(q * dq, 1)
        dq = product(qk, k, dq, UPCAST)
        dq += own_key[:, None] * k
        if LOW_RANK:
            b = load_columns(chunk.write, chunk, column, SIZES)
            dq = product(qb, b, dq, UPCAST)
            dq += own_write[:, None] * b
        store_columns(grad_query, dq, chunk, heads, column, SIZES)
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES)
            da = read_grad(end.dx, end, chunk, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(sums.before)
            by_read += tl.sum(a * da, 1)
            da = product(ak, k, da, UPCAST)
            da = product(ab, b, da, UPCAST)
            store_columns(grad_read, da, chunk, heads, column, SIZES)

    dg += row_terms(pair_mask(own, CHUNK, False, True, DOCUMENTS), by_query)
    if LOW_RANK:
        dg += row_terms(pair_mask(own, CHUNK, True, True, DOCUMENTS), by_read)
    grad_log_decay += chunk.first
    store_tile(grad_log_decay, dg[:, None], chunk.start, chunk.there, heads, 0, 1, 1)
