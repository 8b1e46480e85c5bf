"""The parts of the gradients of a chunk that kernels share: of weights between its tokens, and of states."""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_chunk import load_values
from longmix_kernels.delta.triton_exact_pairs import Four
from longmix_kernels.tiles import load_block, load_block_transposed, load_tile, product


@triton.jit
def weight_grad(rows, columns, chunk, mask, factor, SIZES: tl.constexpr, dtype: tl.constexpr):
    """Return the gradients [rows, columns] of weights: products of both, where the mask says.

    One at a time, so that few are held in float32; what is loaded again is near.
    """
    total = tl.zeros([chunk.there.shape[0], chunk.there.shape[0]], tl.float32)
    for column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        x = load_values(rows, chunk, column, SIZES).to(SIZES.LOW)
        y = load_values(columns, chunk, column, SIZES).to(SIZES.LOW)
        total = product(x, tl.trans(y), total, SIZES.UPCAST)
    return (tl.where(mask, total, 0.0) * factor).to(dtype)


@triton.jit
def weight_grads(
    ends,
    chunk,
    mask,
    scale,
    LOW_RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIZES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return the gradients of all weights of a chunk, a `Four` of [rows, columns] or `TRANSPOSED`."""
    v, u, dy, dx = chunk.value, ends.u, ends.dy, ends.dx
    if TRANSPOSED:
        qk = weight_grad(v, dy, chunk, mask, scale, SIZES, dtype)
    else:
        qk = weight_grad(dy, v, chunk, mask, scale, SIZES, dtype)
    qb, ak, ab = qk, qk, qk
    if LOW_RANK:
        if TRANSPOSED:
            qb = weight_grad(u, dy, chunk, mask, scale, SIZES, dtype)
            ak = weight_grad(v, dx, chunk, mask, 1.0, SIZES, dtype)
            ab = weight_grad(u, dx, chunk, mask, 1.0, SIZES, dtype)
        else:
            qb = weight_grad(dy, u, chunk, mask, scale, SIZES, dtype)
            ak = weight_grad(dx, v, chunk, mask, 1.0, SIZES, dtype)
            ab = weight_grad(dx, u, chunk, mask, 1.0, SIZES, dtype)
    return Four(qk, qb, ak, ab)


@triton.jit
def own_grads(ends, chunk, scale, LOW_RANK: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [CHUNK] of the weights of a query's own key and of its own low-rank write.

    No decay is in these weights.
    """
    own_key = tl.zeros([chunk.there.shape[0]], tl.float32)
    own_write = own_key
    for column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        grad = load_values(ends.dy, chunk, column, SIZES).to(tl.float32) * scale
        own_key += tl.sum(grad * load_values(chunk.value, chunk, column, SIZES), 1)
        if LOW_RANK:
            own_write += tl.sum(grad * load_values(ends.u, chunk, column, SIZES), 1)
    return own_key, own_write


@triton.jit
def state_grad(rows, state, total, chunk, mask, column, SIZES: tl.constexpr):
    """Return total [CHUNK, BLOCK] plus the products of rows in the mask with rows of a state, from `column` on."""
    for value_column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        x = load_tile(rows.pointer, chunk.start, mask, rows.stride, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM)
        y = load_block_transposed(
            state, column, SIZES.BLOCK, SIZES.DIM, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM
        )
        total = product(x.to(SIZES.LOW), y.to(SIZES.LOW), total, SIZES.UPCAST)
    return total


@triton.jit
def read_grad(rows, ends, chunk, column, WITH_INITIAL: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [CHUNK, BLOCK] of rows that read the entering state, or later ones the initial state."""
    total = tl.zeros([chunk.there.shape[0], SIZES.BLOCK], tl.float32)
    total = state_grad(rows, ends.state, total, chunk, ends.carried, column, SIZES)
    if WITH_INITIAL:
        total = state_grad(rows, ends.initial, total, chunk, ends.later, column, SIZES)
    return total


@triton.jit
def write_grad(rows, ends, chunk, column, SIZES: tl.constexpr):
    """Return the gradients [CHUNK, BLOCK] of rows that are written to the leaving state."""
    total = tl.zeros([chunk.there.shape[0], SIZES.BLOCK], tl.float32)
    return state_grad(rows, ends.grad_state, total, chunk, ends.held, column, SIZES)


@triton.jit
def kept_grad(ends, chunk, column, DOCUMENTS: tl.constexpr, WITH_INITIAL: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [BLOCK] of how much is kept of the state that enters.

    It is the initial state where a document begins within the chunk.
    """
    BLOCK: tl.constexpr = SIZES.BLOCK
    VALUE_BLOCK: tl.constexpr = SIZES.VALUE_BLOCK
    total = tl.zeros([BLOCK], tl.float32)
    for value_column in range(0, SIZES.VALUE_DIM, VALUE_BLOCK):
        state = load_block(ends.state, column, BLOCK, SIZES.DIM, value_column, VALUE_BLOCK, SIZES.VALUE_DIM)
        if DOCUMENTS:
            other = 0.0
            if WITH_INITIAL:
                other = load_block(ends.initial, column, BLOCK, SIZES.DIM, value_column, VALUE_BLOCK, SIZES.VALUE_DIM)
            state = tl.where(ends.restart, other, state)
        grad = load_block(ends.grad_state, column, BLOCK, SIZES.DIM, value_column, VALUE_BLOCK, SIZES.VALUE_DIM)
        total += tl.sum(state * grad, 1)
    return total
