"""What a chunk does to a state, for all chunks at once: the first kernel of the delta rule on a GPU.

With q^, a^ rows weighted by the decays up to them, k^, b^ columns weighted by those after them, A the weights between
tokens and M = (1 - A_ab)^-1,

    S' = diag(kept) S + E S + R       E = b^^T M a^                       R = k^^T v + b^^T U       U = M A_ak v
    y  = Y + Q S                      Q = s (q^ + A_qb M a^)              Y = s (A_qk v + A_qb U)

(the affine form of the UT transform, Yang et al. 2024, arXiv 2406.06484). Where a document begins within the chunk,
rows of later documents mean the initial state by S; then so does all that is left in S'. The diagonal stays out of E:
it is nearly 1, and would be rounded.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_exact_pairs import exact_pairs
from longmix_kernels.delta.triton_head_pairs import head_pairs
from longmix_kernels.delta.triton_tiles import (
    Decays,
    Rows,
    Sizes,
    column_sums,
    head_sums,
    inverse_of,
    load_columns,
    load_decay,
    load_ids,
    load_values,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import product, program_head, store_block, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def prepare_kernel(
    query,  # [B, T, H, DIM]
    key,  # [B, T, H, DIM]
    value,  # [B, T, H, VALUE_DIM]
    log_decay,  # float32 [B, T, H, DIM], or [B, T, H]
    low_rank_read,  # [B, T, H, DIM], or None
    low_rank_write,  # [B, T, H, DIM], or None
    document_ids,  # int32 [B, T], contiguous, or None
    output,  # [B, T, H, VALUE_DIM], contiguous; Y is written; None where it is not asked for
    states,  # float32 [B, H, chunks, DIM, VALUE_DIM]; R is written
    transitions,  # [B, H, chunks, DIM, DIM]; E is written; None without low-rank reads
    reads,  # [B, H, T, DIM]; Q is written
    inverses,  # [B, H, T, CHUNK]; M is written; None without low-rank reads, or where it is not asked for
    kept,  # float32 [B, H, chunks, DIM], how much of a state is left
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
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write what one chunk of one head does."""
    DOCUMENTS: tl.constexpr = document_ids is not None
    LOW_RANK: tl.constexpr = low_rank_read is not None
    LOW: tl.constexpr = key.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk, batch, head = program_head(tl.cdiv(length, CHUNK), heads)
    start = chunk * CHUNK
    there = start + tl.arange(0, CHUNK) < length
    sequence = batch * heads + head
    place = sequence * tl.cdiv(length, CHUNK) + chunk
    queries = Rows(query + batch * stride_query_batch + head * stride_query_head, stride_query_row)
    keys = Rows(key + batch * stride_key_batch + head * stride_key_head, stride_key_row)
    values = Rows(value + batch * stride_value_batch + head * stride_value_head, stride_value_row)
    log_decay += batch * stride_decay_batch + head * stride_decay_head
    decays = Decays(log_decay, stride_decay_row, stride_decay_column, floor)
    if output is not None:
        output += (batch * length * heads + head) * VALUE_DIM
    states += place * (DIM * VALUE_DIM)
    reads += sequence * length * DIM
    kept += place * DIM
    removers, writers = keys, keys
    if LOW_RANK:
        removers = Rows(low_rank_read + batch * stride_read_batch + head * stride_read_head, stride_read_row)
        writers = Rows(low_rank_write + batch * stride_write_batch + head * stride_write_head, stride_write_row)
        transitions += place * (DIM * DIM)
    if inverses is not None:
        inverses += sequence * length * CHUNK
    if DOCUMENTS:
        document_ids += batch * length
    own, _first_id, last_id = load_ids(document_ids, start, tl.minimum(start + CHUNK, length) - 1, there)
    # Columns that the leaving state holds.
    held = there
    if DOCUMENTS:
        held = there & (own == last_id)
    of_head = head_sums(decays, own, start, there, DECAY, DOCUMENTS, PRECISION)

    # [CHUNK, CHUNK] weights of columns in rows. What is inverted comes first, to be out of the way.
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    qb, ak, ab = qk, qk, qk
    if DECAY == "exact":
        pairs = exact_pairs(queries, removers, writers, keys, decays, start, length, CHUNK, LOW_RANK, False, SIZES)
        qk, qb, ak, ab = pairs.qk, pairs.qb, pairs.ak, pairs.ab
    earlier = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    if LOW_RANK:
        if DECAY == "head":
            ab = head_pairs(removers, writers, decays, start, there, True, False, SIZES)
        elif DECAY == "bounded":
            for column in range(0, DIM, BLOCK):
                decay = load_decay(decays, start, there, column, BLOCK, DIM)
                total = tl.cumsum(decay, 0)
                total -= middle_of(total, CHUNK)
                a = load_columns(removers, start, there, column, SIZES)
                b = load_columns(writers, start, there, column, SIZES)
                ab = wide_product(a * tl.exp2(total - decay), tl.trans(b * tl.exp2(-total)), ab, LOW, UPCAST)
        inverse = inverse_of(tl.where(earlier, ab, 0.0), CHUNK, PRECISION).to(LOW)
        if inverses is not None:
            store_tile(inverses, inverse, start, there, CHUNK, 0, CHUNK, CHUNK)
    if DECAY == "head":
        if output is not None:
            qk = head_pairs(queries, keys, decays, start, there, False, False, SIZES)
        if LOW_RANK:
            qb = head_pairs(queries, writers, decays, start, there, False, False, SIZES)
            ak = head_pairs(removers, keys, decays, start, there, True, False, SIZES)
    elif DECAY == "bounded":
        for column in range(0, DIM, BLOCK):
            decay = load_decay(decays, start, there, column, BLOCK, DIM)
            total = tl.cumsum(decay, 0)
            total -= middle_of(total, CHUNK)
            inward = tl.exp2(-total)
            q = load_columns(queries, start, there, column, SIZES) * tl.exp2(total)
            k = tl.trans(load_columns(keys, start, there, column, SIZES) * inward)
            if output is not None:
                qk = wide_product(q, k, qk, LOW, UPCAST)
            if LOW_RANK:
                a = load_columns(removers, start, there, column, SIZES)
                ak = wide_product(a * tl.exp2(total - decay), k, ak, LOW, UPCAST)
                b = load_columns(writers, start, there, column, SIZES)
                qb = wide_product(q, tl.trans(b * inward), qb, LOW, UPCAST)
    seen = pair_mask(own, CHUNK, False, False, DOCUMENTS)
    qk = (tl.where(seen, qk, 0.0) * scale).to(LOW)
    if LOW_RANK:
        qb = (tl.where(seen, qb, 0.0) * scale).to(LOW)
        ak = tl.where(earlier, ak, 0.0).to(LOW)

    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        # [CHUNK, VALUE_BLOCK].
        v = load_values(values, start, there, value_column, SIZES)
        u = v
        if LOW_RANK:
            x = product(ak, v, None, UPCAST).to(LOW)
            u = product(inverse, x, None, UPCAST).to(LOW)
        if output is not None:
            y = product(qk, v, None, UPCAST)
            if LOW_RANK:
                y = product(qb, u, y, UPCAST)
            store_tile(output, y, start, there, heads * VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
        for column in range(0, DIM, BLOCK):
            sums = column_sums(of_head, decays, own, start, there, column, DECAY, DOCUMENTS, SIZES)
            left = tl.where(held[:, None], tl.exp2(sums.suffix), 0.0)
            k = load_columns(keys, start, there, column, SIZES)
            written = product(tl.trans((k * left).to(LOW)), v, None, UPCAST)
            if LOW_RANK:
                b = load_columns(writers, start, there, column, SIZES)
                written = product(tl.trans((b * left).to(LOW)), u, written, UPCAST)
            store_block(states, written, column, DIM, value_column, VALUE_DIM)

    for column in range(0, DIM, BLOCK):
        sums = column_sums(of_head, decays, own, start, there, column, DECAY, DOCUMENTS, SIZES)
        columns = column + tl.arange(0, BLOCK)
        since = tl.sum(tl.where(held[:, None], sums.decay, 0.0), 0)
        tl.store(kept + columns, tl.broadcast_to(tl.exp2(since), [BLOCK]), mask=columns < DIM)
        q = load_columns(queries, start, there, column, SIZES) * tl.exp2(sums.prefix) * scale
        if LOW_RANK:
            a = load_columns(removers, start, there, column, SIZES) * tl.exp2(sums.before)
            w = product(inverse, a.to(LOW), None, UPCAST).to(LOW)
            q = product(qb, w, q, UPCAST)
            for row in range(0, DIM, BLOCK):
                of_row = column_sums(of_head, decays, own, start, there, row, DECAY, DOCUMENTS, SIZES)
                left = tl.where(held[:, None], tl.exp2(of_row.suffix), 0.0)
                b = load_columns(writers, start, there, row, SIZES)
                store_block(transitions, product(tl.trans((b * left).to(LOW)), w, None, UPCAST), row, DIM, column, DIM)
        store_tile(reads, q, start, there, DIM, column, BLOCK, DIM)
