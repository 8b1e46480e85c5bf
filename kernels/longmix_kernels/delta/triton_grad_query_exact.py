"""The delta rule on a GPU, backward in queries and low-rank reads, for any decays of channels: one program per chunk.

`triton_grad_key_bounded` has the equations. Here no sum is a difference, which would lose what small decays have beside
large ones: every sum for a decay holds just the rows, columns and pairs that it is in (`triton_exact_grads`). This
kernel adds those of rows to the gradient of the decays; `triton_grad_key_exact` adds those of columns. Both in one
would need more registers than there are.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_grads import far_row_grads, near_row_grads
from longmix_kernels.delta.triton_exact_pairs import Four, near_of
from longmix_kernels.delta.triton_grad_parts import (
    chunk_documents,
    own_grads,
    program_chunk,
    read_grad,
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
    neighbour,
    pair_mask,
    rows_at,
)
from longmix_kernels.tiles import store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_query_exact_kernel(
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
    grad_query,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32, what rows have
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

    # Gradients of weights, [columns, rows] first, then [rows, columns].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    qk = weight_grad(v, dy, start, there, mask, scale, SIZES, tl.float32)
    qb, ak, ab = qk, qk, qk
    if LOW_RANK:
        qb = weight_grad(u, dy, start, there, mask, scale, SIZES, tl.float32)
        ak = weight_grad(v, dx, start, there, mask, 1.0, SIZES, tl.float32)
        ab = weight_grad(u, dx, start, there, mask, 1.0, SIZES, tl.float32)
    near = Four(near_of(qk, CHUNK), near_of(qb, CHUNK), near_of(ak, CHUNK), near_of(ab, CHUNK))
    far = near
    if CHUNK > 16:
        mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
        qk = weight_grad(dy, v, start, there, mask, scale, SIZES, LOW)
        qb, ak, ab = qk, qk, qk
        if LOW_RANK:
            qb = weight_grad(dy, u, start, there, mask, scale, SIZES, LOW)
            ak = weight_grad(dx, v, start, there, mask, 1.0, SIZES, LOW)
            ab = weight_grad(dx, u, start, there, mask, 1.0, SIZES, LOW)
        far = Four(qk, qb, ak, ab)
    own_key, own_write = own_grads(dy, v, u, start, there, scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; what pairs give, then what is due to states.
        k = load_columns(keys, start, there, column, SIZES).to(tl.float32)
        a, b = k, k
        if LOW_RANK:
            b = load_columns(writes, start, there, column, SIZES).to(tl.float32)
        pair_dq, pair_da, dg = near_row_grads(
            queries, reads, decays, k, b, near, start, length, column, LOW_RANK, SIZES
        )
        q = load_columns(queries, start, there, column, SIZES).to(tl.float32)
        if LOW_RANK:
            a = load_columns(reads, start, there, column, SIZES).to(tl.float32)
        decay = load_decay(decays, start, there, column, BLOCK, DIM)
        if CHUNK > 16:
            pair_dq, pair_da, dg = far_row_grads(q, a, k, b, decay, far, pair_dq, pair_da, dg, LOW_RANK, SIZES)
        sums = decay_sums(decay, own, "exact", DOCUMENTS, PRECISION)

        dq = read_grad(dy, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(sums.prefix) * scale
        terms = q * dq
        dq += pair_dq
        dq += own_key[:, None] * k
        if LOW_RANK:
            dq += own_write[:, None] * b
        store_tile(grad_query + written, dq, start, there, heads * DIM, column, BLOCK, DIM)
        if LOW_RANK:
            da = read_grad(dx, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(sums.before)
            # A row's own decay is not in its low-rank read: what the next one has counts from here on.
            terms += rows_at(a * da, neighbour(own, 1, CHUNK), CHUNK)
            da += pair_da
            store_tile(grad_read, da, start, there, heads * DIM, column, BLOCK, DIM)
        dg += masked_sum(pair_mask(own, CHUNK, False, True, DOCUMENTS), terms, PRECISION)
        store_tile(grad_log_decay + written, dg, start, there, heads * DIM, column, BLOCK, DIM)
