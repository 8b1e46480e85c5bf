"""The parts of the gradients of a chunk that kernels share: of weights between its tokens, and of states."""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_tiles import load_ids, load_values
from longmix_kernels.tiles import load_block, load_block_transposed, product, program_head


@triton.jit
def program_chunk(length, heads, CHUNK: tl.constexpr):
    """Return the chunk, batch row and head of a program, the chunk's first token, and which of its tokens there are."""
    chunk, batch, head = program_head(tl.cdiv(length, CHUNK), heads)
    start = chunk * CHUNK
    return chunk, batch, head, start, start + tl.arange(0, CHUNK) < length


@triton.jit
def chunk_documents(document_ids, start, there, length, CHUNK: tl.constexpr):
    """Return what documents mean for the tokens of a chunk.

    Returns:
        The document of each; which read the entering state; which the leaving state holds; which read the initial
        state; and whether a document begins within the chunk.
    """
    own, first_id, last_id = load_ids(document_ids, start, tl.minimum(start + CHUNK, length) - 1, there)
    carried, held = there, there
    if document_ids is not None:
        carried, held = there & (own == first_id), there & (own == last_id)
    return own, carried, held, there & (carried == 0), first_id != last_id


@triton.jit
def weight_grad(rows, columns, start, there, mask, factor, SIZES: tl.constexpr, dtype: tl.constexpr):
    """Return the gradients [rows, columns] of weights: products of both, where the mask says.

    One at a time, so that few are held in float32; what is loaded again is near.
    """
    total = tl.zeros([there.shape[0], there.shape[0]], tl.float32)
    for column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        x = load_values(rows, start, there, column, SIZES).to(SIZES.LOW)
        y = load_values(columns, start, there, column, SIZES).to(SIZES.LOW)
        total = product(x, tl.trans(y), total, SIZES.UPCAST)
    return (tl.where(mask, total, 0.0) * factor).to(dtype)


@triton.jit
def own_grads(dy, v, u, start, there, scale, LOW_RANK: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [CHUNK] of the weights of a query's own key and of its own low-rank write.

    No decay is in these weights.
    """
    own_key, own_write = tl.zeros([there.shape[0]], tl.float32), tl.zeros([there.shape[0]], tl.float32)
    for column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        grad = load_values(dy, start, there, column, SIZES).to(tl.float32) * scale
        own_key += tl.sum(grad * load_values(v, start, there, column, SIZES), 1)
        if LOW_RANK:
            own_write += tl.sum(grad * load_values(u, start, there, column, SIZES), 1)
    return own_key, own_write


@triton.jit
def state_grad(rows, state, total, start, there, column, SIZES: tl.constexpr):
    """Return total [CHUNK, BLOCK] plus the products of rows that are there with rows of a state, from `column` on."""
    for value_column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        x = load_values(rows, start, there, value_column, SIZES).to(SIZES.LOW)
        y = load_block_transposed(
            state, column, SIZES.BLOCK, SIZES.DIM, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM
        )
        total = product(x, y.to(SIZES.LOW), total, SIZES.UPCAST)
    return total


@triton.jit
def read_grad(rows, states, initial, start, carried, later, column, WITH_INITIAL: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [CHUNK, BLOCK] of rows that read the entering state, or `later` ones the initial state."""
    total = tl.zeros([carried.shape[0], SIZES.BLOCK], tl.float32)
    total = state_grad(rows, states, total, start, carried, column, SIZES)
    if WITH_INITIAL:
        total = state_grad(rows, initial, total, start, later, column, SIZES)
    return total


@triton.jit
def kept_grad(states, initial, grad_states, restart, column, DOCUMENTS: tl.constexpr, SIZES: tl.constexpr):
    """Return the gradients [BLOCK] of how much is kept of the state that enters.

    It is the initial state where a document begins within the chunk.
    """
    total = tl.zeros([SIZES.BLOCK], tl.float32)
    for value_column in range(0, SIZES.VALUE_DIM, SIZES.VALUE_BLOCK):
        state = load_block(states, column, SIZES.BLOCK, SIZES.DIM, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM)
        if DOCUMENTS:
            if initial is not None:
                other = load_block(
                    initial, column, SIZES.BLOCK, SIZES.DIM, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM
                )
                state = tl.where(restart, other, state)
            else:
                state = tl.where(restart, 0.0, state)
        grad_state = load_block(
            grad_states, column, SIZES.BLOCK, SIZES.DIM, value_column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM
        )
        total += tl.sum(state * grad_state, 1)
    return total
