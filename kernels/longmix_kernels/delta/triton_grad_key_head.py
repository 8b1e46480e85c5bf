"""The delta rule on a GPU, backward in keys and low-rank writes, where each head has one decay.

It also completes the gradient of the decays, which `triton_grad_query_head` began.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_grad_parts import (
    chunk_documents,
    kept_grad,
    own_grads,
    program_chunk,
    state_grad,
    weight_grad,
)
from longmix_kernels.delta.triton_head_pairs import between
from longmix_kernels.delta.triton_tiles import (
    Decays,
    Rows,
    Sizes,
    decay_sums,
    load_columns,
    load_decay,
    pair_mask,
    row_terms,
)
from longmix_kernels.tiles import load_tile, product, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_head_kernel(
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
    grad_key,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32 [B, T, H]; holds what rows and pairs have
    grad_write,
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
    LOW: tl.constexpr = key.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk, batch, head, start, there = program_chunk(length, heads, CHUNK)
    sequence = batch * heads + head
    place = (sequence * tl.cdiv(length, CHUNK) + chunk) * (DIM * VALUE_DIM)
    states += place
    grad_states += place
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
        grad_write += written
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, _carried, held, _later, restart = chunk_documents(document_ids, start, there, length, CHUNK)

    decay = load_decay(decays, start, there, 0, 1, 1)

    # Gradients of weights, times what lies between row and column, [columns, rows].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    factor = between(decay, False, True) * scale
    qk = weight_grad(v, dy, start, there, mask, factor, SIZES, LOW)
    if LOW_RANK:
        qb = weight_grad(u, dy, start, there, mask, factor, SIZES, LOW)
        factor = between(decay, True, True)
        ak = weight_grad(v, dx, start, there, mask, factor, SIZES, LOW)
        ab = weight_grad(u, dx, start, there, mask, factor, SIZES, LOW)
    own_key, own_write = own_grads(dy, v, u, start, there, scale, LOW_RANK, SIZES)

    left = tl.exp2(decay_sums(decay, own, "head", DOCUMENTS, PRECISION).suffix)
    # What writing states gives decays, by column, and how much of the state is kept.
    by_column, passed = tl.zeros([CHUNK], tl.float32), tl.zeros([], tl.float32)
    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        q, k = load_columns(queries, start, there, column, SIZES), load_columns(keys, start, there, column, SIZES)
        dk = tl.zeros([CHUNK, BLOCK], tl.float32)
        dk = state_grad(v, grad_states, dk, start, held, column, SIZES)
        dk *= left
        by_column += tl.sum(k * dk, 1)
        dk = product(qk, q, dk, UPCAST)
        if LOW_RANK:
            a = load_columns(reads, start, there, column, SIZES)
            dk = product(ak, a, dk, UPCAST)
        dk += own_key[:, None] * q
        store_tile(grad_key + written, dk, start, there, heads * DIM, column, BLOCK, DIM)
        if LOW_RANK:
            b = load_columns(writes, start, there, column, SIZES)
            db = tl.zeros([CHUNK, BLOCK], tl.float32)
            db = state_grad(u, grad_states, db, start, held, column, SIZES)
            db *= left
            by_column += tl.sum(b * db, 1)
            db = product(qb, q, db, UPCAST)
            db = product(ab, a, db, UPCAST)
            db += own_write[:, None] * q
            store_tile(grad_write, db, start, there, heads * DIM, column, BLOCK, DIM)
        passed += tl.sum(kept_grad(states, initial, grad_states, restart, column, DOCUMENTS, SIZES), 0)

    passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0)))
    grad_log_decay += batch * length * heads + head
    dg = tl.reshape(load_tile(grad_log_decay, start, there, heads, 0, 1, 1), [CHUNK])
    dg += row_terms(pair_mask(own, CHUNK, True, False, DOCUMENTS), by_column)
    dg += tl.where(held, passed, 0.0)
    # Every warp must have loaded what the rows have before one stores the sum in its place.
    tl.debug_barrier()
    store_tile(grad_log_decay, dg[:, None], start, there, heads, 0, 1, 1)
