"""The delta rule on a GPU, backward in queries, keys, low-rank reads and writes and decays: one program per chunk.

With u, dx from `triton_grad_value`, the gradients of weights between the tokens of the chunk are

    dA_qk = s dY v^T        dA_qb = s dY u^T        dA_ak = dx v^T        dA_ab = dx u^T

where rows see columns, and those of weighted rows and columns follow from them and from the states at both ends:

    dq^ = s dY S^T          da^ = dx S^T            dk^ = v dS'^T         db^ = u dS'^T

The gradient of a log decay is the sum of all weights that it is in, times their gradients. Here decays are bounded, so
that it is the difference of what rows and what columns have from it on; pairs of a query and its own token, in which
there is no decay, are kept out of both. `triton_grad_key_exact` does without a bound.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_grad_parts import (
    chunk_documents,
    kept_grad,
    own_grads,
    program_chunk,
    read_grad,
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
    middle_of,
    pair_mask,
    rows_at,
    wide_product,
)
from longmix_kernels.tiles import store_tile


@triton.jit
def later_sum(x, own, CHUNK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return the sums of x [CHUNK, BLOCK] over each row and those after it in its document."""
    total = tl.cumsum(x, 0, reverse=True)
    if DOCUMENTS:
        total -= rows_at(total, tl.sum((own[None, :] <= own[:, None]).to(tl.int32), 1), CHUNK)
    return total


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_bounded_kernel(
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
    grad_key,
    grad_log_decay,  # float32
    grad_read,
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
    WITH_INITIAL: tl.constexpr = DOCUMENTS and initial is not None
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
        grad_read += written
        grad_write += written
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, carried, held, later, restart = chunk_documents(document_ids, start, there, length, CHUNK)

    # Gradients of weights, [columns, rows] first, then [rows, columns].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    turned_qk = weight_grad(v, dy, start, there, mask, scale, SIZES, LOW)
    if LOW_RANK:
        turned_qb = weight_grad(u, dy, start, there, mask, scale, SIZES, LOW)
        turned_ak = weight_grad(v, dx, start, there, mask, 1.0, SIZES, LOW)
        turned_ab = weight_grad(u, dx, start, there, mask, 1.0, SIZES, LOW)
    mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    qk = weight_grad(dy, v, start, there, mask, scale, SIZES, LOW)
    if LOW_RANK:
        qb = weight_grad(dy, u, start, there, mask, scale, SIZES, LOW)
        ak = weight_grad(dx, v, start, there, mask, 1.0, SIZES, LOW)
        ab = weight_grad(dx, u, start, there, mask, 1.0, SIZES, LOW)
    own_key, own_write = own_grads(dy, v, u, start, there, scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        decay = load_decay(decays, start, there, column, BLOCK, DIM)
        sums = decay_sums(decay, own, "bounded", DOCUMENTS, PRECISION)
        prefix, before, suffix = sums.prefix, sums.before, sums.suffix
        total = sums.total - middle_of(sums.total, CHUNK)
        outward, inward, read = tl.exp2(total), tl.exp2(-total), tl.exp2(total - decay)
        left = tl.exp2(suffix)
        k = load_columns(keys, start, there, column, SIZES).to(tl.float32)
        q = load_columns(queries, start, there, column, SIZES).to(tl.float32)
        if LOW_RANK:
            a = load_columns(reads, start, there, column, SIZES).to(tl.float32)
            b = load_columns(writes, start, there, column, SIZES).to(tl.float32)

        dq = read_grad(dy, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(prefix) * scale
        found = wide_product(qk, k * inward, None, LOW, UPCAST)
        if LOW_RANK:
            found = wide_product(qb, b * inward, found, LOW, UPCAST)
        dq += found * outward
        dg = q * dq
        dq += own_key[:, None] * k
        if LOW_RANK:
            dq += own_write[:, None] * b
        store_tile(grad_query + written, dq, start, there, heads * DIM, column, BLOCK, DIM)

        if LOW_RANK:
            da = read_grad(dx, states, initial, start, carried, later, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(before)
            found = wide_product(ak, k * inward, None, LOW, UPCAST)
            da += wide_product(ab, b * inward, found, LOW, UPCAST) * read
            # Its own decay is not in a row's low-rank read; it is taken off below.
            of_own = a * da
            dg += of_own
            store_tile(grad_read, da, start, there, heads * DIM, column, BLOCK, DIM)

        passed = kept_grad(states, initial, grad_states, restart, column, DOCUMENTS, SIZES)
        passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0), 0))
        dk = tl.zeros([CHUNK, BLOCK], tl.float32)
        dk = state_grad(v, grad_states, dk, start, held, column, SIZES)
        dk *= left
        passed += tl.sum(k * dk, 0)
        found = wide_product(turned_qk, q * outward, None, LOW, UPCAST)
        if LOW_RANK:
            found = wide_product(turned_ak, a * read, found, LOW, UPCAST)
        dk += found * inward
        dg -= k * dk
        dk += own_key[:, None] * q
        store_tile(grad_key + written, dk, start, there, heads * DIM, column, BLOCK, DIM)

        if LOW_RANK:
            db = tl.zeros([CHUNK, BLOCK], tl.float32)
            db = state_grad(u, grad_states, db, start, held, column, SIZES)
            db *= left
            passed += tl.sum(b * db, 0)
            found = wide_product(turned_qb, q * outward, None, LOW, UPCAST)
            db += wide_product(turned_ab, a * read, found, LOW, UPCAST) * inward
            dg -= b * db
            db += own_write[:, None] * q
            store_tile(grad_write, db, start, there, heads * DIM, column, BLOCK, DIM)

        dg = later_sum(dg, own, CHUNK, DOCUMENTS)
        if LOW_RANK:
            dg -= of_own
        dg += tl.where(held[:, None], passed[None, :], 0.0)
        store_tile(grad_log_decay + written, dg, start, there, heads * DIM, column, BLOCK, DIM)
