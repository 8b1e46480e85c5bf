"""The delta rule on a GPU, backward in queries and low-rank reads, where each head has one decay.

`triton_grad_key_bounded` has the equations. A weight is one number times a product of row and column, see
`triton_head_pairs`, so a row's gradient is a sum of columns, weighted by gradients of weights times that number. The
gradient of a decay is the sum of the weights that it is in, times their gradients: of pairs of a later row and an
earlier column. Every sum here holds just such pairs, and none is a difference, so any decay will do. One program per
chunk adds what rows and pairs give decays; `triton_grad_key_head` adds what columns give.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_grad_parts import (
    chunk_documents,
    own_grads,
    program_chunk,
    read_grad,
    weight_grad,
)
from longmix_kernels.delta.triton_head_pairs import between, plain_pairs
from longmix_kernels.delta.triton_tiles import (
    Decays,
    Rows,
    Sizes,
    decay_sums,
    load_columns,
    load_decay,
    masked_sum,
    pair_mask,
    row_terms,
)
from longmix_kernels.tiles import product, store_tile


@triton.jit
def pair_terms(rows, columns, grads, values, start, there, mask, factor, SIZES: tl.constexpr):
    """Return the weights of columns in rows times their gradients, [rows, columns]."""
    grad = weight_grad(grads, values, start, there, mask, factor, SIZES, tl.float32)
    return grad * plain_pairs(rows, columns, start, there, False, SIZES)


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
    query,  # [B, T, H, DIM]
    key,  # [B, T, H, DIM]
    value,  # [B, T, H, VALUE_DIM]
    log_decay,  # float32 [B, T, H]
    low_rank_read,  # [B, T, H, DIM], or None
    low_rank_write,  # [B, T, H, DIM], or None
    document_ids,  # int32 [B, T], contiguous, or None
    initial,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    grad_output,  # [B, T, H, VALUE_DIM]
    states,  # float32 [B, H, chunks, DIM, VALUE_DIM], what enters each chunk
    grad_states,  # float32 [B, H, chunks, DIM, VALUE_DIM], of what leaves each chunk
    removed,  # [B, H, T, VALUE_DIM], u, or None
    grad_removed,  # [B, H, T, VALUE_DIM], dx, or None
    grad_query,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32 [B, T, H], what rows and pairs have
    grad_read,
    scale,
    floor,
    length,
    heads,
    stride_query_batch,
    stride_query_row,
    stride_query_head,
    stride_key_batch,
    stride_key_row,
    stride_key_head,
    stride_value_batch,
    stride_value_row,
    stride_value_head,
    stride_decay_batch,
    stride_decay_row,
    stride_decay_head,
    stride_decay_column,
    stride_read_batch,
    stride_read_row,
    stride_read_head,
    stride_write_batch,
    stride_write_row,
    stride_write_head,
    stride_grad_output_batch,
    stride_grad_output_row,
    stride_grad_output_head,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradients of one chunk of one head."""
    DOCUMENTS: tl.constexpr = document_ids is not None
    LOW_RANK: tl.constexpr = low_rank_read is not None
    WITH_INITIAL: tl.constexpr = DOCUMENTS and initial is not None
    LOW: tl.constexpr = key.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk, batch, head, start, there = program_chunk(length, heads, CHUNK)
    sequence = batch * heads + head
    place = (sequence * tl.cdiv(length, CHUNK) + chunk) * (DIM * VALUE_DIM)
    states += place
    written = (batch * length * heads + head) * DIM
    log_decay += batch * stride_decay_batch + head * stride_decay_head
    decays = Decays(log_decay, stride_decay_row, stride_decay_column, floor)
    queries = Rows(query + batch * stride_query_batch + head * stride_query_head, stride_query_row)
    keys = Rows(key + batch * stride_key_batch + head * stride_key_head, stride_key_row)
    v = Rows(value + batch * stride_value_batch + head * stride_value_head, stride_value_row)
    dy = Rows(grad_output + batch * stride_grad_output_batch + head * stride_grad_output_head, stride_grad_output_row)
    reads, writes, u, dx = keys, keys, v, dy
    if LOW_RANK:
        reads = Rows(low_rank_read + batch * stride_read_batch + head * stride_read_head, stride_read_row)
        writes = Rows(low_rank_write + batch * stride_write_batch + head * stride_write_head, stride_write_row)
        u = Rows(removed + sequence * length * VALUE_DIM, VALUE_DIM)
        dx = Rows(grad_removed + sequence * length * VALUE_DIM, VALUE_DIM)
        grad_read += written
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, carried, _held, later, _restart = chunk_documents(document_ids, start, there, length, CHUNK)

    decay = load_decay(decays, start, there, 0, 1, 1)

    # Gradients of weights, times what lies between row and column, [rows, columns]; and what they give decays.
    mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    factor = between(decay, False, False) * scale
    terms = pair_terms(queries, keys, dy, v, start, there, mask, factor, SIZES)
    if LOW_RANK:
        terms += pair_terms(queries, writes, dy, u, start, there, mask, factor, SIZES)
    dg = decay_terms(terms, False, PRECISION)
    qk = weight_grad(dy, v, start, there, mask, factor, SIZES, LOW)
    if LOW_RANK:
        qb = weight_grad(dy, u, start, there, mask, factor, SIZES, LOW)
        factor = between(decay, True, False)
        terms = pair_terms(reads, keys, dx, v, start, there, mask, factor, SIZES)
        terms += pair_terms(reads, writes, dx, u, start, there, mask, factor, SIZES)
        dg += decay_terms(terms, True, PRECISION)
        ak = weight_grad(dx, v, start, there, mask, factor, SIZES, LOW)
        ab = weight_grad(dx, u, start, there, mask, factor, SIZES, LOW)
    own_key, own_write = own_grads(dy, v, u, start, there, scale, LOW_RANK, SIZES)

    # What reading states gives decays, by row.
    sums = decay_sums(decay, own, "head", DOCUMENTS, PRECISION)
    by_query = tl.zeros([CHUNK], tl.float32)
    by_read = by_query
    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        k, q = load_columns(keys, start, there, column, SIZES), load_columns(queries, start, there, column, SIZES)
        dq = read_grad(dy, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(sums.prefix) * scale
        by_query += tl.sum(q * dq, 1)
        dq = product(qk, k, dq, UPCAST)
        dq += own_key[:, None] * k
        if LOW_RANK:
            b = load_columns(writes, start, there, column, SIZES)
            dq = product(qb, b, dq, UPCAST)
            dq += own_write[:, None] * b
        store_tile(grad_query + written, dq, start, there, heads * DIM, column, BLOCK, DIM)
        if LOW_RANK:
            a = load_columns(reads, start, there, column, SIZES)
            da = read_grad(dx, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(sums.before)
            by_read += tl.sum(a * da, 1)
            da = product(ak, k, da, UPCAST)
            da = product(ab, b, da, UPCAST)
            store_tile(grad_read, da, start, there, heads * DIM, column, BLOCK, DIM)

    dg += row_terms(pair_mask(own, CHUNK, False, True, DOCUMENTS), by_query)
    if LOW_RANK:
        dg += row_terms(pair_mask(own, CHUNK, True, True, DOCUMENTS), by_read)
    grad_log_decay += batch * length * heads + head
    store_tile(grad_log_decay, dg[:, None], start, there, heads, 0, 1, 1)
