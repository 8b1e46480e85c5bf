"""The delta rule on a GPU, backward in keys and low-rank writes, for any decays of channels: one program per chunk.

It also completes the gradient of the decays, which `triton_grad_query_exact` began.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_grads import far_column_grads, near_column_grads
from longmix_kernels.delta.triton_exact_pairs import Four, near_of
from longmix_kernels.delta.triton_grad_parts import (
    chunk_documents,
    kept_grad,
    own_grads,
    program_chunk,
    state_grad,
    weight_grad,
)
from longmix_kernels.delta.triton_tiles import (
    Decays,
    Rows,
    Sizes,
    decay_sums,
    load_columns,
    load_decay,
    masked_sum,
    pair_mask,
)
from longmix_kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_exact_kernel(
    query,  # [B, T, H, DIM]
    key,  # [B, T, H, DIM]
    value,  # [B, T, H, VALUE_DIM]
    log_decay,  # float32 [B, T, H, DIM]
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
    grad_log_decay,  # float32; holds what rows have
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

    # Gradients of weights, [columns, rows].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    qk = weight_grad(v, dy, start, there, mask, scale, SIZES, tl.float32)
    qb, ak, ab = qk, qk, qk
    if LOW_RANK:
        qb = weight_grad(u, dy, start, there, mask, scale, SIZES, tl.float32)
        ak = weight_grad(v, dx, start, there, mask, 1.0, SIZES, tl.float32)
        ab = weight_grad(u, dx, start, there, mask, 1.0, SIZES, tl.float32)
    near = Four(near_of(qk, CHUNK), near_of(qb, CHUNK), near_of(ak, CHUNK), near_of(ab, CHUNK))
    far = Four(qk.to(LOW), qb.to(LOW), ak.to(LOW), ab.to(LOW))
    own_key, own_write = own_grads(dy, v, u, start, there, scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; what pairs give, then what is due to states.
        k = load_columns(keys, start, there, column, SIZES).to(tl.float32)
        q = load_columns(queries, start, there, column, SIZES).to(tl.float32)
        a, b = k, k
        if LOW_RANK:
            a = load_columns(reads, start, there, column, SIZES).to(tl.float32)
            b = load_columns(writes, start, there, column, SIZES).to(tl.float32)
        pair_dk, pair_db = near_column_grads(
            queries, reads, decays, near, start, length, column, CHUNK, LOW_RANK, SIZES
        )
        dg = load_tile(grad_log_decay + written, start, there, heads * DIM, column, BLOCK, DIM)
        decay = load_decay(decays, start, there, column, BLOCK, DIM)
        if CHUNK > 16:
            pair_dk, pair_db, dg = far_column_grads(q, a, k, b, decay, far, pair_dk, pair_db, dg, LOW_RANK, SIZES)
        left = tl.exp2(decay_sums(decay, own, "exact", DOCUMENTS, PRECISION).suffix)

        dk = tl.zeros([CHUNK, BLOCK], tl.float32)
        dk = state_grad(v, grad_states, dk, start, held, column, SIZES)
        dk *= left
        terms = k * dk
        dk += pair_dk
        dk += own_key[:, None] * q
        store_tile(grad_key + written, dk, start, there, heads * DIM, column, BLOCK, DIM)
        if LOW_RANK:
            db = tl.zeros([CHUNK, BLOCK], tl.float32)
            db = state_grad(u, grad_states, db, start, held, column, SIZES)
            db *= left
            terms += b * db
            db += pair_db
            db += own_write[:, None] * q
            store_tile(grad_write, db, start, there, heads * DIM, column, BLOCK, DIM)
        dg += masked_sum(pair_mask(own, CHUNK, True, False, DOCUMENTS), terms, PRECISION)
        passed = kept_grad(states, initial, grad_states, restart, column, DOCUMENTS, SIZES)
        passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0), 0))
        dg += tl.where(held[:, None], passed[None, :], 0.0)
        # Every warp must have loaded what the rows have before one stores the sum in its place.
        tl.debug_barrier()
        store_tile(grad_log_decay + written, dg, start, there, heads * DIM, column, BLOCK, DIM)
