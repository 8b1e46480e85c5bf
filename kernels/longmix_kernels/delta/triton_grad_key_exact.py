"""The delta rule on a GPU, backward in keys and low-rank writes, for any decays of channels: one program per chunk.

It also completes the gradient of the decays, which `triton_grad_query_exact` began.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import (
    chunk_of,
    ends_of,
    load_columns,
    load_decay,
    load_stored_columns,
    store_columns,
)
from longmix_kernels.delta.triton_exact_grads import far_column_grads, near_column_grads
from longmix_kernels.delta.triton_exact_pairs import Four, near_of
from longmix_kernels.delta.triton_grad_parts import kept_grad, own_grads, weight_grads, write_grad
from longmix_kernels.delta.triton_tiles import Sizes, decay_sums, masked_sum, pair_mask


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_exact_kernel(
    tokens: Tokens,
    ends: Ends,
    grad_key,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32; holds what rows have
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
    own, held = end.own, end.held

    # Gradients of weights, [columns, rows].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    grad = weight_grads(end, chunk, mask, tokens.scale, LOW_RANK, True, SIZES, tl.float32)
    near = Four(near_of(grad.qk, CHUNK), near_of(grad.qb, CHUNK), near_of(grad.ak, CHUNK), near_of(grad.ab, CHUNK))
    far = Four(grad.qk.to(LOW), grad.qb.to(LOW), grad.ak.to(LOW), grad.ab.to(LOW))
    own_key, own_write = own_grads(end, chunk, tokens.scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; what pairs give, then what is due to states.
        k = load_columns(chunk.key, chunk, column, SIZES).to(tl.float32)
        q = load_columns(chunk.query, chunk, column, SIZES).to(tl.float32)
        a, b = k, k
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES).to(tl.float32)
            b = load_columns(chunk.write, chunk, column, SIZES).to(tl.float32)
        pair_dk, pair_db = near_column_grads(chunk, near, column, LOW_RANK, SIZES)
        dg = load_stored_columns(grad_log_decay, chunk, heads, column, SIZES)
        decay = load_decay(chunk, column, BLOCK, DIM)
        if CHUNK > 16:
            pair_dk, pair_db, dg = far_column_grads(q, a, k, b, decay, far, pair_dk, pair_db, dg, LOW_RANK, SIZES)
        left = tl.exp2(decay_sums(decay, own, "exact", DOCUMENTS, PRECISION).suffix)

        dk = write_grad(chunk.value, end, chunk, column, SIZES) * left
        terms = k * dk
        dk += pair_dk
        dk += own_key[:, None] * q
        store_columns(grad_key, dk, chunk, heads, column, SIZES)
        if LOW_RANK:
            db = write_grad(end.u, end, chunk, column, SIZES) * left
            terms += b * db
            db += pair_db
            db += own_write[:, None] * q
            store_columns(grad_write, db, chunk, heads, column, SIZES)
        dg += masked_sum(pair_mask(own, CHUNK, True, False, DOCUMENTS), terms, PRECISION)
        passed = kept_grad(end, chunk, column, DOCUMENTS, WITH_INITIAL, SIZES)
        passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0), 0))
        dg += tl.where(held[:, None], passed[None, :], 0.0)
        # Every warp must have loaded what the rows have before one stores the sum in its place.
        tl.debug_barrier()
        store_columns(grad_log_decay, dg, chunk, heads, column, SIZES)
