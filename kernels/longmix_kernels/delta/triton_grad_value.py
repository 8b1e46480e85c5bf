"""The delta rule on a GPU, backward in values and in what is removed: one program per chunk.

With S the state that enters a chunk, dS' the gradient of the one that leaves it and dY that of the output,

    u  = M (A_ak v + a^ S)                      what is read for removal
    dx = M^T (s A_qb^T dY + b^ dS')             the gradient of what it is computed from
    dv = s A_qk^T dY + A_ak^T dx + k^ dS'

(see `triton_prepare`). u and dx pass through memory, because what follows needs each as it is and transposed, and no
result of a product is transposed for another. For the same reason weights are computed in the orientation that is used.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_pairs import exact_pairs
from longmix_kernels.delta.triton_tiles import (
    decay_sums,
    load_decay,
    load_ids,
    load_square,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import load_block, load_tile, product, program_head, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_value_kernel(
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
    inverses,  # [B, H, T, CHUNK], or None
    grad_value,  # [B, T, H, VALUE_DIM], contiguous
    removed,  # [B, H, T, VALUE_DIM]; u is written; None without low-rank reads
    grad_removed,  # [B, H, T, VALUE_DIM]; dx is written; likewise
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
    """Write the gradient of the values of one chunk of one head, and what goes with removal."""
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
    grad_value += (batch * length * heads + head) * VALUE_DIM
    states += place
    grad_states += place
    if low_rank_read is not None:
        low_rank_read += batch * stride_read_batch + head * stride_read_head
        low_rank_write += batch * stride_write_batch + head * stride_write_head
        inverses += sequence * length * CHUNK
        removed += sequence * length * VALUE_DIM
        grad_removed += sequence * length * VALUE_DIM
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, first_id, last_id = load_ids(document_ids, start, tl.minimum(start + CHUNK, length) - 1, there)
    carried, held = there, there
    if DOCUMENTS:
        carried, held = there & (own == first_id), there & (own == last_id)

    # [columns, rows] weights, and `ak` as [rows, columns].
    turned_qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    turned_qb, turned_ak, ak = turned_qk, turned_qk, turned_qk
    if BOUNDED:
        for column in range(0, DIM, BLOCK):
            k = load_tile(key, start, there, stride_key_row, column, BLOCK, DIM).to(tl.float32)
            b = k
            if low_rank_read is not None:
                b = load_tile(low_rank_write, start, there, stride_write_row, column, BLOCK, DIM).to(tl.float32)
            decay = load_decay(
                log_decay, start, there, stride_decay_row, stride_decay_column, column, BLOCK, DIM, floor
            )
            total = tl.cumsum(decay, 0)
            total -= middle_of(total, CHUNK)
            inward = tl.exp2(-total)
            q = load_tile(query, start, there, stride_query_row, column, BLOCK, DIM)
            q = tl.trans(q * tl.exp2(total))
            k = k * inward
            turned_qk = wide_product(k, q, turned_qk, LOW, UPCAST)
            if low_rank_read is not None:
                a = load_tile(low_rank_read, start, there, stride_read_row, column, BLOCK, DIM)
                a = a * tl.exp2(total - decay)
                turned_qb = wide_product(b * inward, q, turned_qb, LOW, UPCAST)
                turned_ak = wide_product(k, tl.trans(a), turned_ak, LOW, UPCAST)
                ak = wide_product(a, tl.trans(k), ak, LOW, UPCAST)
    else:
        turned_qk, turned_qb, turned_ak, _turned_ab = exact_pairs(
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
            BLOCK,
            DIM,
            CHUNK,
            True,
            PRECISION,
            UPCAST,
        )
        if low_rank_read is not None:
            _qk, _qb, ak, _ab = exact_pairs(
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
                BLOCK,
                DIM,
                CHUNK,
                False,
                PRECISION,
                UPCAST,
            )
    seen = pair_mask(own, CHUNK, False, True, DOCUMENTS)
    turned_qk = (tl.where(seen, turned_qk, 0.0) * scale).to(LOW)
    if low_rank_read is not None:
        earlier = pair_mask(own, CHUNK, True, True, DOCUMENTS)
        turned_qb = (tl.where(seen, turned_qb, 0.0) * scale).to(LOW)
        turned_ak = tl.where(earlier, turned_ak, 0.0).to(LOW)
        ak = tl.where(pair_mask(own, CHUNK, True, False, DOCUMENTS), ak, 0.0).to(LOW)

    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        # [CHUNK, VALUE_BLOCK].
        dy = load_tile(grad_output, start, there, stride_grad_output_row, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
        dv = product(turned_qk, dy, None, UPCAST)
        x = dv
        du = dv
        if low_rank_read is not None:
            v = load_tile(value, start, there, stride_value_row, value_column, VALUE_BLOCK, VALUE_DIM)
            x = product(ak, v, None, UPCAST)
            du = product(turned_qb, dy, None, UPCAST)
        for column in range(0, DIM, BLOCK):
            decay = load_decay(
                log_decay, start, there, stride_decay_row, stride_decay_column, column, BLOCK, DIM, floor
            )
            _total, _prefix, before, suffix = decay_sums(decay, own, CHUNK, BOUNDED, DOCUMENTS, PRECISION)
            left = tl.where(held[:, None], tl.exp2(suffix), 0.0)
            grad_state = load_block(grad_states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
            k = load_tile(key, start, there, stride_key_row, column, BLOCK, DIM)
            dv = product((k * left).to(LOW), grad_state, dv, UPCAST)
            if low_rank_read is not None:
                b = load_tile(low_rank_write, start, there, stride_write_row, column, BLOCK, DIM)
                du = product((b * left).to(LOW), grad_state, du, UPCAST)
                state = load_block(states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                a = load_tile(low_rank_read, start, carried, stride_read_row, column, BLOCK, DIM) * tl.exp2(before)
                x = product(a.to(LOW), state, x, UPCAST)
                if DOCUMENTS and initial is not None:
                    later = there & (carried == 0)
                    state = load_block(initial, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                    a = load_tile(low_rank_read, start, later, stride_read_row, column, BLOCK, DIM)
                    x = product((a * tl.exp2(before)).to(LOW), state, x, UPCAST)
        if low_rank_read is not None:
            inverse = load_square(inverses, start, there, CHUNK, False)
            u = product(inverse, x.to(LOW), None, UPCAST)
            store_tile(removed, u, start, there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            inverse = load_square(inverses, start, there, CHUNK, True)
            dx = product(inverse, du.to(LOW), None, UPCAST).to(LOW)
            store_tile(grad_removed, dx, start, there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            dv = product(turned_ak, dx, dv, UPCAST)
        store_tile(grad_value, dv, start, there, heads * VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
