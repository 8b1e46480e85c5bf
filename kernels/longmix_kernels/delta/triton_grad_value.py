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

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import chunk_of, ends_of, load_columns, load_decay, load_values, store_values
from longmix_kernels.delta.triton_exact_pairs import exact_pairs
from longmix_kernels.delta.triton_head_pairs import head_pairs
from longmix_kernels.delta.triton_tiles import (
    Sizes,
    column_sums,
    head_sums,
    load_square,
    middle_of,
    pair_mask,
    wide_product,
)
from longmix_kernels.tiles import load_block, load_tile, product, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_value_kernel(
    tokens: Tokens,
    ends: Ends,
    inverses,  # [B, H, T, CHUNK], or None
    grad_value,  # [B, T, H, VALUE_DIM], contiguous
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
    """Write the gradient of the values of one chunk of one head, and to `ends` what goes with removal."""
    DOCUMENTS: tl.constexpr = tokens.document_ids is not None
    LOW_RANK: tl.constexpr = tokens.low_rank_read is not None
    WITH_INITIAL: tl.constexpr = DOCUMENTS and ends.initial is not None
    LOW: tl.constexpr = tokens.key.pointer.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk = chunk_of(tokens, length, heads, CHUNK)
    end = ends_of(tokens, ends, chunk, SIZES)
    of_head = head_sums(chunk, end.own, DECAY, DOCUMENTS, PRECISION)

    # [columns, rows] weights, and `ak` as [rows, columns].
    turned_qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    turned_qb, turned_ak, ak = turned_qk, turned_qk, turned_qk
    if DECAY == "head":
        turned_qk = head_pairs(chunk.query, chunk.key, chunk, False, True, SIZES)
        if LOW_RANK:
            turned_qb = head_pairs(chunk.query, chunk.write, chunk, False, True, SIZES)
            turned_ak = head_pairs(chunk.read, chunk.key, chunk, True, True, SIZES)
            ak = head_pairs(chunk.read, chunk.key, chunk, True, False, SIZES)
    elif DECAY == "bounded":
        for column in range(0, DIM, BLOCK):
            k = load_columns(chunk.key, chunk, column, SIZES).to(tl.float32)
            b = k
            if LOW_RANK:
                b = load_columns(chunk.write, chunk, column, SIZES).to(tl.float32)
            decay = load_decay(chunk, column, BLOCK, DIM)
            total = tl.cumsum(decay, 0)
            total -= middle_of(total, CHUNK)
            inward = tl.exp2(-total)
            q = load_columns(chunk.query, chunk, column, SIZES)
            q = tl.trans(q * tl.exp2(total))
            k = k * inward
            turned_qk = wide_product(k, q, turned_qk, LOW, UPCAST)
            if LOW_RANK:
                a = load_columns(chunk.read, chunk, column, SIZES)
                a = a * tl.exp2(total - decay)
                turned_qb = wide_product(b * inward, q, turned_qb, LOW, UPCAST)
                turned_ak = wide_product(k, tl.trans(a), turned_ak, LOW, UPCAST)
                ak = wide_product(a, tl.trans(k), ak, LOW, UPCAST)
    else:
        pairs = exact_pairs(chunk, CHUNK, LOW_RANK, True, SIZES)
        turned_qk, turned_qb, turned_ak = pairs.qk, pairs.qb, pairs.ak
        if LOW_RANK:
            ak = exact_pairs(chunk, CHUNK, LOW_RANK, False, SIZES).ak
    seen = pair_mask(end.own, CHUNK, False, True, DOCUMENTS)
    turned_qk = (tl.where(seen, turned_qk, 0.0) * tokens.scale).to(LOW)
    if LOW_RANK:
        earlier = pair_mask(end.own, CHUNK, True, True, DOCUMENTS)
        turned_qb = (tl.where(seen, turned_qb, 0.0) * tokens.scale).to(LOW)
        turned_ak = tl.where(earlier, turned_ak, 0.0).to(LOW)
        ak = tl.where(pair_mask(end.own, CHUNK, True, False, DOCUMENTS), ak, 0.0).to(LOW)

    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        # [CHUNK, VALUE_BLOCK].
        dy = load_values(end.dy, chunk, value_column, SIZES).to(LOW)
        dv = product(turned_qk, dy, None, UPCAST)
        x = dv
        du = dv
        if LOW_RANK:
            v = load_values(chunk.value, chunk, value_column, SIZES)
            x = product(ak, v, None, UPCAST)
            du = product(turned_qb, dy, None, UPCAST)
        for column in range(0, DIM, BLOCK):
            sums = column_sums(of_head, chunk, end.own, column, DECAY, DOCUMENTS, SIZES)
            left = tl.where(end.held[:, None], tl.exp2(sums.suffix), 0.0)
            grad_state = load_block(end.grad_state, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
            k = load_columns(chunk.key, chunk, column, SIZES)
            dv = product((k * left).to(LOW), grad_state, dv, UPCAST)
            if LOW_RANK:
                b = load_columns(chunk.write, chunk, column, SIZES)
                du = product((b * left).to(LOW), grad_state, du, UPCAST)
                state = load_block(end.state, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                before = tl.exp2(sums.before)
                a = load_tile(chunk.read.pointer, chunk.start, end.carried, chunk.read.stride, column, BLOCK, DIM)
                x = product((a * before).to(LOW), state, x, UPCAST)
                if WITH_INITIAL:
                    state = load_block(end.initial, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
                    a = load_tile(chunk.read.pointer, chunk.start, end.later, chunk.read.stride, column, BLOCK, DIM)
                    x = product((a * before).to(LOW), state, x, UPCAST)
        if LOW_RANK:
            u = product(load_square(inverses, chunk, CHUNK, False), x.to(LOW), None, UPCAST)
            store_tile(end.u.pointer, u, chunk.start, chunk.there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            dx = product(load_square(inverses, chunk, CHUNK, True), du.to(LOW), None, UPCAST).to(LOW)
            store_tile(end.dx.pointer, dx, chunk.start, chunk.there, VALUE_DIM, value_column, VALUE_BLOCK, VALUE_DIM)
            dv = product(turned_ak, dx, dv, UPCAST)
        store_values(grad_value, dv, chunk, heads, value_column, SIZES)
