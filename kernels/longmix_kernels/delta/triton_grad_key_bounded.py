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

from longmix_kernels.delta.launch import Ends, Tokens
from longmix_kernels.delta.triton_chunk import chunk_of, ends_of, load_columns, load_decay, store_columns
from longmix_kernels.delta.triton_grad_parts import kept_grad, own_grads, read_grad, weight_grads, write_grad
from longmix_kernels.delta.triton_tiles import Sizes, decay_sums, middle_of, pair_mask, rows_at, wide_product


@triton.jit
def later_sum(x, own, CHUNK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return the sums of x [CHUNK, BLOCK] over each row and those after it in its document."""
    total = tl.cumsum(x, 0, reverse=True)
    if DOCUMENTS:
        total -= rows_at(total, tl.sum((own[None, :] <= own[:, None]).to(tl.int32), 1), CHUNK)
    return total


@triton.jit(do_not_specialize=["length", "heads"])
def grad_key_bounded_kernel(
    tokens: Tokens,
    ends: Ends,
    grad_query,  # [B, T, H, DIM], contiguous, as all that are written
    grad_key,
    grad_log_decay,  # float32
    grad_read,
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
    scale, own, held = tokens.scale, end.own, end.held

    # Gradients of weights, [columns, rows] first, then [rows, columns].
    mask = pair_mask(own, CHUNK, True, True, DOCUMENTS)
    turned = weight_grads(end, chunk, mask, scale, LOW_RANK, True, SIZES, LOW)
    mask = pair_mask(own, CHUNK, True, False, DOCUMENTS)
    grad = weight_grads(end, chunk, mask, scale, LOW_RANK, False, SIZES, LOW)
    own_key, own_write = own_grads(end, chunk, scale, LOW_RANK, SIZES)

    for column in range(0, DIM, BLOCK):
        # All [CHUNK, BLOCK]; one gradient after the other, each first as far as it is due to states.
        decay = load_decay(chunk, column, BLOCK, DIM)
        sums = decay_sums(decay, own, "bounded", DOCUMENTS, PRECISION)
        total = sums.total - middle_of(sums.total, CHUNK)
        outward, inward, read = tl.exp2(total), tl.exp2(-total), tl.exp2(total - decay)
        left = tl.exp2(sums.suffix)
        k = load_columns(chunk.key, chunk, column, SIZES).to(tl.float32)
        q = load_columns(chunk.query, chunk, column, SIZES).to(tl.float32)
        if LOW_RANK:
            a = load_columns(chunk.read, chunk, column, SIZES).to(tl.float32)
            b = load_columns(chunk.write, chunk, column, SIZES).to(tl.float32)

        dq = read_grad(end.dy, end, chunk, column, WITH_INITIAL, SIZES)
        dq *= tl.exp2(sums.prefix) * scale
        found = wide_product(grad.qk, k * inward, None, LOW, UPCAST)
        if LOW_RANK:
            found = wide_product(grad.qb, b * inward, found, LOW, UPCAST)
        dq += found * outward
        dg = q * dq
        dq += own_key[:, None] * k
        if LOW_RANK:
            dq += own_write[:, None] * b
        store_columns(grad_query, dq, chunk, heads, column, SIZES)

        if LOW_RANK:
            da = read_grad(end.dx, end, chunk, column, WITH_INITIAL, SIZES)
            da *= tl.exp2(sums.before)
            found = wide_product(grad.ak, k * inward, None, LOW, UPCAST)
            da += wide_product(grad.ab, b * inward, found, LOW, UPCAST) * read
            # Its own decay is not in a row's low-rank read; it is taken off below.
            of_own = a * da
            dg += of_own
            store_columns(grad_read, da, chunk, heads, column, SIZES)

        passed = kept_grad(end, chunk, column, DOCUMENTS, WITH_INITIAL, SIZES)
        passed *= tl.exp2(tl.sum(tl.where(held[:, None], decay, 0.0), 0))
        dk = write_grad(chunk.value, end, chunk, column, SIZES) * left
        passed += tl.sum(k * dk, 0)
        found = wide_product(turned.qk, q * outward, None, LOW, UPCAST)
        if LOW_RANK:
            found = wide_product(turned.ak, a * read, found, LOW, UPCAST)
        dk += found * inward
        dg -= k * dk
        dk += own_key[:, None] * q
        store_columns(grad_key, dk, chunk, heads, column, SIZES)

        if LOW_RANK:
            db = write_grad(end.u, end, chunk, column, SIZES) * left
            passed += tl.sum(b * db, 0)
            found = wide_product(turned.qb, q * outward, None, LOW, UPCAST)
            db += wide_product(turned.ab, a * read, found, LOW, UPCAST) * inward
            dg -= b * db
            db += own_write[:, None] * q
            store_columns(grad_write, db, chunk, heads, column, SIZES)

        dg = later_sum(dg, own, CHUNK, DOCUMENTS)
        if LOW_RANK:
            dg -= of_own
        dg += tl.where(held[:, None], passed[None, :], 0.0)
        store_columns(grad_log_decay, dg, chunk, heads, column, SIZES)
