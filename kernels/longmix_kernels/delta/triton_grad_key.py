"""The delta rule on a GPU, backward in queries, keys, low-rank reads and writes and decays: one program per chunk.

With u, dx from `triton_grad_value`, the gradients of weights between the tokens of the chunk are

    dA_qk = s dY v^T        dA_qb = s dY u^T        dA_ak = dx v^T        dA_ab = dx u^T

where rows see columns, and those of weighted rows and columns follow from them and from the states at both ends:

    dq^ = s dY S^T          da^ = dx S^T            dk^ = v dS'^T         db^ = u dS'^T

The gradient of a log decay is the sum of all weights that it is in, times their gradients. With bounded decays it is
the difference of what rows and what columns have from it on; pairs of a query and its own token, in which there is no
decay, are kept out of both. Without a bound every sum holds just its own pairs.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_grad_parts import (
    exact_pair_grads,
    kept_grad,
    later_sum,
    read_grad,
    state_grad,
    weight_grads,
)
from longmix_kernels.delta.triton_tiles import (
    decay_sums,
    load_decay,
    load_ids,
    masked_sum,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import load_tile, program_head, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_kernel(
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
    BOUNDED: tl.constexpr,
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
    LOW: tl.constexpr = key.dtype.element_ty
    chunk, batch, head = program_head(tl.cdiv(length, CHUNK), heads)
    start = chunk * CHUNK
    there = start + tl.arange(0, CHUNK) < length
    sequence = batch * heads + head
    place = (sequence * tl.cdiv(length, CHUNK) + chunk) * (DIM * VALUE_DIM)
    query += batch * stride_query_batch + head * stride_query_head
    key += batch * stride_key_batch + head * stride_key_head
    value += batch * stride_value_batch + head * stride_value_head
    log_decay += batch * stride_decay_batch + head * stride_decay_head
    grad_output += batch * stride_grad_output_batch + head * stride_grad_output_head
    written = (batch * length * heads + head) * DIM
    grad_query += written
    grad_key += written
    grad_log_decay += written
    states += place
    grad_states += place
    if low_rank_read is not None:
        low_rank_read += batch * stride_read_batch + head * stride_read_head
        low_rank_write += batch * stride_write_batch + head * stride_write_head
        removed += sequence * length * VALUE_DIM
        grad_removed += sequence * length * VALUE_DIM
        grad_read += written
        grad_write += written
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, first_id, last_id = load_ids(document_ids, start, tl.minimum(start + CHUNK, length) - 1, there)
    carried, held = there, there
    if DOCUMENTS:
        carried, held = there & (own == first_id), there & (own == last_id)

    later = there & (carried == 0)
    WITH_INITIAL: tl.constexpr = DOCUMENTS and initial is not None

    # Gradients of weights, `turned` as [columns, rows], else as [rows, columns].
    EXACT: tl.constexpr = not BOUNDED
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    turned_qk, turned_qb, turned_ak, turned_ab = weight_grads(
        grad_output,
        stride_grad_output_row,
        grad_removed,
        value,
        stride_value_row,
        removed,
        start,
        there,
        mask,
        scale,
        LOW,
        VALUE_DIM,
        VALUE_BLOCK,
        EXACT,
        UPCAST,
        TURNED=True,
    )
    if BOUNDED:
        mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
        qk, qb, ak, ab = weight_grads(
            grad_output,
            stride_grad_output_row,
            grad_removed,
            value,
            stride_value_row,
            removed,
            start,
            there,
            mask,
            scale,
            LOW,
            VALUE_DIM,
            VALUE_BLOCK,
            EXACT,
            UPCAST,
            TURNED=False,
        )
    # Those of the weights between a query and its own token, in which there is no decay.
    own_key, own_write = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for column in range(0, VALUE_DIM, VALUE_BLOCK):
        dy = load_tile(grad_output, start, there, stride_grad_output_row, column, VALUE_BLOCK, VALUE_DIM)
        dy = dy.to(tl.float32) * scale
        v = load_tile(value, start, there, stride_value_row, column, VALUE_BLOCK, VALUE_DIM)
        own_key += tl.sum(dy * v, 1)
        if low_rank_read is not None:
            u = load_tile(removed, start, there, VALUE_DIM, column, VALUE_BLOCK, VALUE_DIM)
            own_write += tl.sum(dy * u, 1)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        decay = load_decay(log_decay, start, there, stride_decay_row, stride_decay_column, column, BLOCK, DIM, floor)
        total, prefix, before, suffix = decay_sums(decay, own, CHUNK, BOUNDED, DOCUMENTS, PRECISION)
        k = load_tile(key, start, there, stride_key_row, column, BLOCK, DIM).to(tl.float32)
        q = load_tile(query, start, there, stride_query_row, column, BLOCK, DIM).to(tl.float32)
        a, b = k, k
        if low_rank_read is not None:
            a = load_tile(low_rank_read, start, there, stride_read_row, column, BLOCK, DIM).to(tl.float32)
            b = load_tile(low_rank_write, start, there, stride_write_row, column, BLOCK, DIM).to(tl.float32)
        if BOUNDED:
            total -= middle_of(total, CHUNK)
            outward, inward, read = tl.exp2(total), tl.exp2(-total), tl.exp2(total - decay)
        else:
            of_query, of_key, dg, of_read, of_write = exact_pair_grads(
                query,
                low_rank_read,
                log_decay,
                k,
                b,
                turned_qk,
                turned_qb,
                turned_ak,
                turned_ab,
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
            )

        dq = read_grad(
            grad_output,
            stride_grad_output_row,
            states,
            initial,
            start,
            carried,
            later,
            column,
            DIM,
            VALUE_DIM,
            LOW,
            BLOCK,
            VALUE_BLOCK,
            WITH_INITIAL,
            UPCAST,
        )
        dq *= tl.exp2(prefix) * scale
        if BOUNDED:
            found = wide_product(qk, k * inward, None, LOW, UPCAST)
            if low_rank_read is not None:
                found = wide_product(qb, b * inward, found, LOW, UPCAST)
            dq += found * outward
            dg = q * dq
        else:
            dg += masked_sum(pair_mask(own, CHUNK, False, True, DOCUMENTS), q * dq, PRECISION)
            dq += of_query
        dq += own_key[:, None] * k
        if low_rank_read is not None:
            dq += own_write[:, None] * b
        store_tile(grad_query, dq, start, there, heads * DIM, column, BLOCK, DIM)

        if low_rank_read is not None:
            da = read_grad(
                grad_removed,
                VALUE_DIM,
                states,
                initial,
                start,
                carried,
                later,
                column,
                DIM,
                VALUE_DIM,
                LOW,
                BLOCK,
                VALUE_BLOCK,
                WITH_INITIAL,
                UPCAST,
            )
            da *= tl.exp2(before)
            if BOUNDED:
                found = wide_product(ak, k * inward, None, LOW, UPCAST)
                da += wide_product(ab, b * inward, found, LOW, UPCAST) * read
                # Its own decay is not in a row's low-rank read; it is taken off below.
                of_own = a * da
                dg += of_own
            else:
                dg += masked_sum(pair_mask(own, CHUNK, True, True, DOCUMENTS), a * da, PRECISION)
                da += of_read
            store_tile(grad_read, da, start, there, heads * DIM, column, BLOCK, DIM)

        passed = kept_grad(
            states, initial, grad_states, first_id != last_id, column, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, DOCUMENTS
        )
        passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0), 0))
        left = tl.exp2(suffix)
        dk = tl.zeros([CHUNK, BLOCK], tl.float32)
        dk = state_grad(
            value,
            stride_value_row,
            grad_states,
            dk,
            start,
            held,
            column,
            LOW,
            DIM,
            VALUE_DIM,
            BLOCK,
            VALUE_BLOCK,
            UPCAST,
        )
        dk *= left
        if BOUNDED:
            passed += tl.sum(k * dk, 0)
            found = wide_product(turned_qk, q * outward, None, LOW, UPCAST)
            if low_rank_read is not None:
                found = wide_product(turned_ak, a * read, found, LOW, UPCAST)
            dk += found * inward
            dg -= k * dk
        else:
            dg += masked_sum(pair_mask(own, CHUNK, True, False, DOCUMENTS), k * dk, PRECISION)
            dk += of_key
        dk += own_key[:, None] * q
        store_tile(grad_key, dk, start, there, heads * DIM, column, BLOCK, DIM)

        if low_rank_read is not None:
            db = tl.zeros([CHUNK, BLOCK], tl.float32)
            db = state_grad(
                removed,
                VALUE_DIM,
                grad_states,
                db,
                start,
                held,
                column,
                LOW,
                DIM,
                VALUE_DIM,
                BLOCK,
                VALUE_BLOCK,
                UPCAST,
            )
            db *= left
            if BOUNDED:
                passed += tl.sum(b * db, 0)
                found = wide_product(turned_qb, q * outward, None, LOW, UPCAST)
                db += wide_product(turned_ab, a * read, found, LOW, UPCAST) * inward
                dg -= b * db
            else:
                dg += masked_sum(pair_mask(own, CHUNK, True, False, DOCUMENTS), b * db, PRECISION)
                db += of_write
            db += own_write[:, None] * q
            store_tile(grad_write, db, start, there, heads * DIM, column, BLOCK, DIM)

        if BOUNDED:
            dg = later_sum(dg, own, CHUNK, DOCUMENTS)
            if low_rank_read is not None:
                dg -= of_own
        dg += tl.where(held[:, None], passed[None, :], 0.0)
        store_tile(grad_log_decay, dg, start, there, heads * DIM, column, BLOCK, DIM)
