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

from longmix_kernels.delta.launch import Tokens
from longmix_kernels.delta.triton_chunk import (
    chunk_of,
    documents_of,
    load_columns,
    load_decay,
    load_values,
    store_values,
)
from longmix_kernels.delta.triton_exact_pairs import exact_pairs
from longmix_kernels.delta.triton_head_pairs import head_pairs
from longmix_kernels.delta.triton_tiles import (
    Sizes,
    column_sums,
    head_sums,
    inverse_of,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import product, store_block, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def prepare_kernel(
    tokens: Tokens,
    output,  # [B, T, H, VALUE_DIM], contiguous; Y is written; None where it is not asked for
    states,  # float32 [B, H, chunks, DIM, VALUE_DIM]; R is written
    transitions,  # [B, H, chunks, DIM, DIM]; E is written; None without low-rank reads
    reads,  # [B, H, T, DIM]; Q is written
    inverses,  # [B, H, T, CHUNK]; M is written; None without low-rank reads, or where it is not asked for
    kept,  # float32 [B, H, chunks, DIM], how much of a state is left
    length,
    heads,
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
    DOCUMENTS: tl.constexpr = tokens.document_ids is not None
    LOW_RANK: tl.constexpr = tokens.low_rank_read is not None
    LOW: tl.constexpr = tokens.key.pointer.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk = chunk_of(tokens, length, heads, CHUNK)
    states += chunk.place * (DIM * VALUE_DIM)
    reads += chunk.sequence * length * DIM
    kept += chunk.place * DIM
    if LOW_RANK:
        transitions += chunk.place * (DIM * DIM)
    if inverses is not None:
        inverses += chunk.sequence * length * CHUNK
    own, _carried, held, _later, _restart = documents_of(tokens, chunk)
    of_head = head_sums(chunk, own, DECAY, DOCUMENTS, PRECISION)

    # [CHUNK, CHUNK] weights of columns in rows. What is inverted comes first, to be out of the way.
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    qb, ak, ab = qk, qk, qk
    if DECAY == "exact":
        pairs = exact_pairs(chunk, CHUNK, LOW_RANK, False, SIZES)
        qk, qb, ak, ab = pairs.qk, pairs.qb, pairs.ak, pairs.ab
    earlier = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    if LOW_RANK:
        if DECAY == "head":
            ab = head_pairs(chunk.read, chunk.write, chunk, True, False, SIZES)
        elif DECAY == "bounded":
            for column in range(0, DIM, BLOCK):
                decay = load_decay(chunk, column, BLOCK, DIM)
                total = tl.cumsum(decay, 0)
                total -= middle_of(total, CHUNK)
                a = load_columns(chunk.read, chunk, column, SIZES)
                b = load_columns(chunk.write, chunk, column, SIZES)
                ab = wide_product(a * tl.exp2(total - decay), tl.trans(b * tl.exp2(-total)), ab, LOW, UPCAST)
        inverse = inverse_of(tl.where(earlier, ab, 0.0), CHUNK, PRECISION).to(LOW)
        if inverses is not None:
            store_tile(inverses, inverse, chunk.start, chunk.there, CHUNK, 0, CHUNK, CHUNK)
    if DECAY == "head":
        if output is not None:
            qk = head_pairs(chunk.query, chunk.key, chunk, False, False, SIZES)
        if LOW_RANK:
            qb = head_pairs(chunk.query, chunk.write, chunk, False, False, SIZES)
            ak = head_pairs(chunk.read, chunk.key, chunk, True, False, SIZES)
    elif DECAY == "bounded":
        for column in range(0, DIM, BLOCK):
            decay = load_decay(chunk, column, BLOCK, DIM)
            total = tl.cumsum(decay, 0)
            total -= middle_of(total, CHUNK)
            inward = tl.exp2(-total)
            q = load_columns(chunk.query, chunk, column, SIZES) * tl.exp2(total)
            k = tl.trans(load_columns(chunk.key, chunk, column, SIZES) * inward)
            if output is not None:
                qk = wide_product(q, k, qk, LOW, UPCAST)
            if LOW_RANK:
                a = load_columns(chunk.read, chunk, column, SIZES)
                ak = wide_product(a * tl.exp2(total - decay), k, ak, LOW, UPCAST)
                b = load_columns(chunk.write, chunk, column, SIZES)
                qb = wide_product(q, tl.trans(b * inward), qb, LOW, UPCAST)
    seen = pair_mask(own, CHUNK, False, False, DOCUMENTS)
    qk = (tl.where(seen, qk, 0.0) * tokens.scale).to(LOW)
    if LOW_RANK:
        qb = (tl.where(seen, qb, 0.0) * tokens.scale).to(LOW)
        ak = tl.where(earlier, ak, 0.0).to(LOW)

    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        # [CHUNK, VALUE_BLOCK].
        v = load_values(chunk.value, chunk, value_column, SIZES)
        u = v
        if LOW_RANK:
            x = product(ak, v, None, UPCAST).to(LOW)
            u = product(inverse, x, None, UPCAST).to(LOW)
        if output is not None:
            y = product(qk, v, None, UPCAST)
            if LOW_RANK:
                y = product(qb, u, y, UPCAST)
            store_values(output, y, chunk, heads, value_column, SIZES)
        for column in range(0, DIM, BLOCK):
            sums = column_sums(of_head, chunk, own, column, DECAY, DOCUMENTS, SIZES)
            left = tl.where(held[:, None], tl.exp2(sums.suffix), 0.0)
            k = load_columns(chunk.key, chunk, column, SIZES)
            written = product(tl.trans((k * left).to(LOW)), v, None, UPCAST)
            if LOW_RANK:
                b = load_columns(chunk.write, chunk, column, SIZES)
                written = product(tl.trans((b * left).to(LOW)), u, written, UPCAST)
            store_block(states, written, column, DIM, value_column, VALUE_DIM)

    for column in range(0, DIM, BLOCK):
        sums = column_sums(of_head, chunk, own, column, DECAY, DOCUMENTS, SIZES)
        columns = column + tl.arange(0, BLOCK)
        since = tl.sum(tl.where(held[:, None], sums.decay, 0.0), 0)
        tl.store(kept + columns, tl.broadcast_to(tl.exp2(since), [BLOCK]), mask=columns < DIM)
        q = load_columns(chunk.query, chunk, column, SIZES) * tl.exp2(sums.prefix) * tokens.scale
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES) * tl.exp2(sums.before)
            w = product(inverse, a.to(LOW), None, UPCAST).to(LOW)
            q = product(qb, w, q, UPCAST)
            for row in range(0, DIM, BLOCK):
                of_row = column_sums(of_head, chunk, own, row, DECAY, DOCUMENTS, SIZES)
                left = tl.where(held[:, None], tl.exp2(of_row.suffix), 0.0)
                b = load_columns(chunk.write, chunk, row, SIZES)
                store_block(transitions, product(tl.trans((b * left).to(LOW)), w, None, UPCAST), row, DIM, column, DIM)
        store_tile(reads, q, chunk.start, chunk.there, DIM, column, BLOCK, DIM)
