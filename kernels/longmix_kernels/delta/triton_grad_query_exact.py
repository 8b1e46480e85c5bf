"""The delta rule on a GPU, backward in queries and low-rank reads, for any decays of channels: one program per chunk.

`triton_grad_key_bounded` has the equations. Here no sum is a difference, which would lose what small decays have beside
large ones: every sum for a decay holds just the rows, columns and pairs that it is in (`triton_exact_grads`). This
kernel adds those of rows to the gradient of the decays; `triton_grad_key_exact` adds those of columns. Both in one
would need more registers than there are.
"""

import triton
import triton.language as tl

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import chunk_of, ends_of, load_columns, load_decay, store_columns
from longmix_kernels.delta.triton_exact_grads import far_row_grads, near_row_grads
from longmix_kernels.delta.triton_exact_pairs import Four, near_of
from longmix_kernels.delta.triton_grad_parts import own_grads, read_grad, weight_grads
from longmix_kernels.delta.triton_tiles import Sizes, decay_sums, masked_sum, neighbour, pair_mask, rows_at


@triton.jit(do_not_specialize=["length", "heads"])
def grad_query_exact_kernel(
    tokens: Tokens,
    ends: Ends,
    grad_query,  # [B, T, H, DIM], contiguous, as all that are written
    grad_log_decay,  # float32, what rows have
    grad_read,
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
    scale, own = tokens.scale, end.own

    # Gradients of weights, [columns, rows] first, then [rows, columns].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    grad = weight_grads(end, chunk, mask, scale, LOW_RANK, True, SIZES, tl.float32)
    near = Four(near_of(grad.qk, CHUNK), near_of(grad.qb, CHUNK), near_of(grad.ak, CHUNK), near_of(grad.ab, CHUNK))
    far = near
    if CHUNK > 16:
        mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
        far = weight_grads(end, chunk, mask, scale, LOW_RANK, False, SIZES, LOW)
    own_key, own_write = own_grads(end, chunk, scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; what pairs give, then what is due to states.
        k = load_columns(chunk.key, chunk, column, SIZES).to(tl.float32)
        a, b = k, k
        if LOW_RANK:
            b = load_columns(chunk.write, chunk, column, SIZES).to(tl.float32)
        pair_dq, pair_da, dg = near_row_grads(chunk, k, b, near, column, LOW_RANK, SIZES)
        q = load_columns(chunk.query, chunk, column, SIZES).to(tl.float32)
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES).to(tl.float32)
        decay = load_decay(chunk, column, BLOCK, DIM)
        if CHUNK > 16:
            pair_dq, pair_da, dg = far_row_grads(q, a, k, b, decay, far, pair_dq, pair_da, dg, LOW_RANK, SIZES)
        sums = decay_sums(decay, own, "exact", DOCUMENTS, PRECISION)

        dq = read_grad(end.dy, end, chunk, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(sums.prefix) * scale
        terms = q * dq
        dq += pair_dq
        dq += own_key[:, None] * k
        if LOW_RANK:
            dq += own_write[:, None] * b
        store_columns(grad_query, dq, chunk, heads, column, SIZES)
        if LOW_RANK:
            da = read_grad(end.dx, end, chunk, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(sums.before)
            # A row's own decay is not in its low-rank read: what the next one has counts from here on.
            terms += rows_at(a * da, neighbour(own, 1, CHUNK), CHUNK)
            da += pair_da
            store_columns(grad_read, da, chunk, heads, column, SIZES)
        dg += masked_sum(pair_mask(own, CHUNK, False, True, DOCUMENTS), terms, PRECISION)
        store_columns(grad_log_decay, dg, chunk, heads, column, SIZES)
