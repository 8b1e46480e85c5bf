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
from longmix_kernels.delta.triton_grad_parts import chunk_documents, program_chunk
from longmix_kernels.delta.triton_head_pairs import head_pairs
from longmix_kernels.delta.triton_tiles import (
    Decays,
    Rows,
    Sizes,
    column_sums,
    head_sums,
    load_columns,
    load_decay,
    load_square,
    load_values,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import load_block, product, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_value_kernel(
    query,  # [B, T, H, DIM]
    key,  # [B, T, H, DIM]
    value,  # [B, T, H, VALUE_DIM]
    log_decay,  # float32 [B, T, H, DIM], or [B, T, H]
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
    DECAY: tl.constexpr,
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
    LOW_RANK: tl.constexpr = low_rank_read is not None
    LOW: tl.constexpr = key.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk, batch, head, start, there = program_chunk(length, heads, CHUNK)
    sequence = batch * heads + head
    place = (sequence * tl.cdiv(length, CHUNK) + chunk) * (DIM * VALUE_DIM)
    queries = Rows(query + batch * stride_query_batch + head * stride_query_head, stride_query_row)
    keys = Rows(key + batch * stride_key_batch + head * stride_key_head, stride_key_row)
    values = Rows(value + batch * stride_value_batch + head * stride_value_head, stride_value_row)
    grad_output += batch * stride_grad_output_batch + head * stride_grad_output_head
    grads = Rows(grad_output, stride_grad_output_row)
    log_decay += batch * stride_decay_batch + head * stride_decay_head
    decays = Decays(log_decay, stride_decay_row, stride_decay_column, floor)
    grad_value += (batch * length * heads + head) * VALUE_DIM
    states += place
    grad_states += place
    reads, writes = keys, keys
    if LOW_RANK:
        reads = Rows(low_rank_read + batch * stride_read_batch + head * stride_read_head, stride_read_row)
        writes = Rows(low_rank_write + batch * stride_write_batch + head * stride_write_head, stride_write_row)
        inverses += sequence * length * CHUNK
        removed += sequence * length * VALUE_DIM
        grad_removed += sequence * length * VALUE_DIM
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length
    own, carried, held, later, _restart = chunk_documents(document_ids, start, there, length, CHUNK)
    of_head = head_sums(decays, own, start, there, DECAY, DOCUMENTS, PRECISION)

    # [columns, rows] weights, and `ak` as [rows, columns].
    turned_qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    turned_qb, turned_ak, ak = turned_qk, turned_qk, turned_qk
    if DECAY == "head":
        turned_qk = head_pairs(queries, keys, decays, start, there, False, True, SIZES)
        if LOW_RANK:
            turned_qb = head_pairs(queries, writes, decays, start, there, False, True, SIZES)
            turned_ak = head_pairs(reads, keys, decays, start, there, True, True, SIZES)
            ak = head_pairs(reads, keys, decays, start, there, True, False, SIZES)
    elif DECAY == "bounded":
        for column in range(0, DIM, BLOCK):
            k = load_columns(keys, start, there, column, SIZES).to(tl.float32)
            b = k
            if LOW_RANK:
                b = load_columns(writes, start, there, column, SIZES).to(tl.float32)
            decay = load_decay(decays, start, there, column, BLOCK, DIM)
            total = tl.cumsum(decay, 0)
            total -= middle_of(total, CHUNK)
            inward = tl.exp2(-total)
            q = load_columns(queries, start, there, column, SIZES)
            q = tl.trans(q * tl.exp2(total))
            k = k * inward
            turned_qk = wide_product(k, q, turned_qk, LOW, UPCAST)
            if LOW_RANK:
                a = load_columns(reads, start, there, column, SIZES)
                a = a * tl.exp2(total - decay)
                turned_qb = wide_product(b * inward, q, turned_qb, LOW, UPCAST)
                turned_ak = wide_product(k, tl.trans(a), turned_ak, LOW, UPCAST)
                ak = wide_product(a, tl.trans(k), ak, LOW, UPCAST)
    else:
        pairs = exact_pairs(queries, reads, writes, keys, decays, start, length, CHUNK, LOW_RANK, True, SIZES)
        turned_qk, turned_qb, turned_ak = pairs.qk, pairs.qb, pairs.ak
        if LOW_RANK:
            ak = exact_pairs(queries, reads, writes, keys, decays, start, length, CHUNK, LOW_RANK, False, SIZES).ak
    seen = pair_mask(own, CHUNK, False, True, DOCUMENTS)
    turned_qk = (tl.where(seen, turned_qk, 0.0) * scale).to(LOW)
    if LOW_RANK:
        earlier = pair_mask(own, CHUNK, True, True, DOCUMENTS)
        turned_qb = (tl.where(seen, turned_qb, 0.0) * scale).to(LOW)
        turned_ak = tl.where(earlier, turned_ak, 0.0).to(LOW)
        ak = tl.where(pair_mask(own, CHUNK, True, False, DOCUMENTS), ak, 0.0).to(LOW)

    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        # [CHUNK, VALUE_BLOCK].
        dy = load_values(grads, start, there, value_column, SIZES).to(LOW)
        dv = product(turned_qk, dy, None, UPCAST)
        x = dv
        du = dv
        if LOW_RANK:
            v = load_values(values, start, there, value_column, SIZES)
            x = product(ak, v, None, UPCAST)
            du = product(turned_qb, dy, None, UPCAST)
        for column in range(0, DIM, BLOCK):
            sums = column_sums(of_head, decays, own, start, there, column, DECAY, DOCUMENTS, SIZES)
            left = tl.where(held[:, None], tl.exp2(sums.suffix), 0.0)
            grad_state = load_block(grad_states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
            k = load_columns(keys, start, there, column, SIZES)
            dv = product((k * left).to(LOW), grad_state, dv, UPCAST)
            if LOW_RANK:
                b = load_columns(writes, start, there, column, SIZES)
                du = product((b * left).to(LOW), grad_state, du, UPCAST)
                state = load_block(states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                before = tl.exp2(sums.before)
                a = load_columns(reads, start, carried, column, SIZES) * before
                x = product(a.to(LOW), state, x, UPCAST)
                if DOCUMENTS and initial is not None:
                    state = load_block(initial, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                    a = load_columns(reads, start, later, column, SIZES)
                    x = product((a * before).to(LOW), state, x, UPCAST)
        if LOW_RANK:
            inverse = load_square(inverses, start, there, CHUNK, False)
            u = product(inverse, x.to(LOW), None, UPCAST)
            store_tile(removed, u, start, there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            inverse = load_square(inverses, start, there, CHUNK, True)
            dx = product(inverse, du.to(LOW), None, UPCAST).to(LOW)
            store_tile(grad_removed, dx, start, there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            dv = product(turned_ak, dx, dv, UPCAST)
        store_tile(grad_value, dv, start, there, heads * VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
