"""The delta rule on a GPU, backward in keys and low-rank writes, where each head has one decay.

It also completes the gradient of the decays, which `triton_grad_query_head` began.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import chunk_of, ends_of, load_columns, load_decay, store_columns
from longmix_kernels.delta.triton_grad_parts import kept_grad, own_grads, weight_grad, write_grad
from longmix_kernels.delta.triton_head_pairs import between
from longmix_kernels.delta.triton_tiles import Sizes, decay_sums, pair_mask, row_terms
from longmix_kernels.tiles import load_tile, product, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_head_kernel(
    tokens: Tokens,
    ends: Ends,
    grad_key,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32 [B, T, H]; holds what rows and pairs have
    grad_write,
    length,
    heads,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the gradients of one chunk of one head."""
    DOCUMENTS: tl.constexpr = tokens.document_ids is not None
    LOW_RANK: tl.constexpr = tokens.low_rank_read is not None
    WITH_INITIAL: tl.constexpr = DOCUMENTS and ends.initial is not None
    LOW: tl.constexpr = tokens.key.pointer.dtype.element_ty
    SIZES: tl.constexpr = Sizes(DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, LOW, PRECISION, UPCAST)
    chunk = chunk_of(tokens, length, heads, CHUNK)
    end = ends_of(tokens, ends, chunk, SIZES)
    own, held, decay, v, u = end.own, end.held, load_decay(chunk, 0, 1, 1), chunk.value, end.u

    # Gradients of weights, times what lies between row and column, [columns, rows].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    factor = between(decay, False, True) * tokens.scale
    qk = weight_grad(v, end.dy, chunk, mask, factor, SIZES, LOW)
    if LOW_RANK:
        qb = weight_grad(u, end.dy, chunk, mask, factor, SIZES, LOW)
        factor = between(decay, True, True)
        ak = weight_grad(v, end.dx, chunk, mask, factor, SIZES, LOW)
        ab = weight_grad(u, end.dx, chunk, mask, factor, SIZES, LOW)
    own_key, own_write = own_grads(end, chunk, tokens.scale, LOW_RANK, SIZES)

    left = tl.exp2(decay_sums(decay, own, "head", DOCUMENTS, PRECISION).suffix)
    # What writing states gives decays, by column, and how much of the state is kept.
    by_column, passed = tl.zeros([CHUNK], tl.float32), tl.zeros([], tl.float32)
    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        q = load_columns(chunk.query, chunk, column, SIZES)
        k = load_columns(chunk.key, chunk, column, SIZES)
        dk = write_grad(v, end, chunk, column, SIZES) * left
        by_column += tl.sum(k * dk, 1)
        dk = product(qk, q, dk, UPCAST)
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES)
            dk = product(ak, a, dk, UPCAST)
        dk += own_key[:, None] * q
        store_columns(grad_key, dk, chunk, heads, column, SIZES)
        if LOW_RANK:
            b = load_columns(chunk.write, chunk, column, SIZES)
            db = write_grad(u, end, chunk, column, SIZES) * left
            by_column += tl.sum(b * db, 1)
            db = product(qb, q, db, UPCAST)
            db = product(ab, a, db, UPCAST)
            db += own_write[:, None] * q
            store_columns(grad_write, db, chunk, heads, column, SIZES)
        passed += tl.sum(kept_grad(end, chunk, column, DOCUMENTS, WITH_INITIAL, SIZES), 0)

    passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0)))
    grad_log_decay += chunk.first
    dg = tl.reshape(load_tile(grad_log_decay, chunk.start, chunk.there, heads, 0, 1, 1), [CHUNK])
    dg += row_terms(pair_mask(own, CHUNK, True, False, DOCUMENTS), by_column)
    dg += tl.where(held, passed, 0.0)
    # Every warp must have loaded what the rows have before one stores the sum in its place.
    tl.debug_barrier()
    store_tile(grad_log_decay, dg[:, None], chunk.start, chunk.there, heads, 0, 1, 1)
