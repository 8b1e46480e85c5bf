"""The parts of the gradients of a chunk: of weights between its tokens, of states, and of pairs without a bound."""

import triton
import triton.language as tl

from longmix_kernels.delta.triton_tiles import (
    load_row,
    rows_at,
)
from longmix_kernels.tiles import load_block, load_block_transposed, load_tile, product


@triton.jit
def later_sum(x, own, CHUNK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Sums of x [CHUNK, BLOCK] over each row and those after it in its document."""
    total = tl.cumsum(x, 0, reverse=True)
    if DOCUMENTS:
        total -= rows_at(total, tl.sum((own[None, :] <= own[:, None]).to(tl.int32), 1), CHUNK)
    return total


@triton.jit
def weight_grad(
    rows,  # [T, VALUE_DIM] of a head
    stride_rows,
    columns,
    stride_columns,
    start,
    there,
    mask,
    factor,
    LOW: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Gradients of weights as [rows, columns], or `TURNED` as [columns, rows]: products of both, where the mask says.

    One at a time, so that few are held in float32; what is loaded again is near.
    """
    if TURNED:
        rows, stride_rows, columns, stride_columns = columns, stride_columns, rows, stride_rows
    total = tl.zeros([there.shape[0], there.shape[0]], tl.float32)
    for column in range(0, VALUE_DIM, VALUE_BLOCK):
        x = load_tile(rows, start, there, stride_rows, column, VALUE_BLOCK, VALUE_DIM).to(LOW)
        y = load_tile(columns, start, there, stride_columns, column, VALUE_BLOCK, VALUE_DIM).to(LOW)
        total = product(x, tl.trans(y), total, UPCAST)
    total = tl.where(mask, total, 0.0) * factor
    if EXACT:
        return total
    else:
        return total.to(LOW)


@triton.jit
def weight_grads(
    grad_output,  # [T, VALUE_DIM] of a head, as the four
    stride_grad_output,
    grad_removed,  # contiguous, or None
    value,
    stride_value,
    removed,  # contiguous, or None
    start,
    there,
    mask,
    scale,
    LOW: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Gradients of A_qk, A_qb, A_ak and A_ab, as [rows, columns] or `TURNED`; without low rank all are the first."""
    qk = weight_grad(
        grad_output,
        stride_grad_output,
        value,
        stride_value,
        start,
        there,
        mask,
        scale,
        LOW,
        VALUE_DIM,
        VALUE_BLOCK,
        EXACT,
        UPCAST,
        TURNED,
    )
    qb, ak, ab = qk, qk, qk
    if removed is not None:
        qb = weight_grad(
            grad_output,
            stride_grad_output,
            removed,
            VALUE_DIM,
            start,
            there,
            mask,
            scale,
            LOW,
            VALUE_DIM,
            VALUE_BLOCK,
            EXACT,
            UPCAST,
            TURNED,
        )
        ak = weight_grad(
            grad_removed,
            VALUE_DIM,
            value,
            stride_value,
            start,
            there,
            mask,
            1.0,
            LOW,
            VALUE_DIM,
            VALUE_BLOCK,
            EXACT,
            UPCAST,
            TURNED,
        )
        ab = weight_grad(
            grad_removed,
            VALUE_DIM,
            removed,
            VALUE_DIM,
            start,
            there,
            mask,
            1.0,
            LOW,
            VALUE_DIM,
            VALUE_BLOCK,
            EXACT,
            UPCAST,
            TURNED,
        )
    return qk, qb, ak, ab


@triton.jit
def state_grad(
    rows,  # [T, VALUE_DIM] of a head
    stride_rows,
    state,  # [DIM, VALUE_DIM]
    total,  # [CHUNK, BLOCK]
    start,
    there,
    column,
    LOW: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return total plus the products of rows that are there with rows of a state, from `column` on."""
    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        x = load_tile(rows, start, there, stride_rows, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
        y = load_block_transposed(state, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM).to(LOW)
        total = product(x, y, total, UPCAST)
    return total


@triton.jit
def read_grad(
    rows,  # [T, VALUE_DIM] of a head, gradients of what rows read
    stride_rows,
    states,
    initial,
    start,
    carried,
    later,
    column,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    WITH_INITIAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients [CHUNK, BLOCK] of rows that read the entering state, or later ones the initial state."""
    total = tl.zeros([carried.shape[0], BLOCK], tl.float32)
    total = state_grad(
        rows, stride_rows, states, total, start, carried, column, LOW, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, UPCAST
    )
    if WITH_INITIAL:
        total = state_grad(
            rows, stride_rows, initial, total, start, later, column, LOW, DIM, VALUE_DIM, BLOCK, VALUE_BLOCK, UPCAST
        )
    return total


@triton.jit
def kept_grad(
    states,
    initial,
    grad_states,
    restart,
    column,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Gradients [BLOCK] of how much is kept of a state, the initial one where a document begins within the chunk."""
    total = tl.zeros([BLOCK], tl.float32)
    for value_column in range(0, VALUE_DIM, VALUE_BLOCK):
        state = load_block(states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM)
        if DOCUMENTS:
            if initial is not None:
                other = load_block(initial, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM)
                state = tl.where(restart, other, state)
            else:
                state = tl.where(restart, 0.0, state)
        grad_state = load_block(grad_states, column, BLOCK, DIM, value_column, VALUE_BLOCK, VALUE_DIM)
        total += tl.sum(state * grad_state, 1)
    return total


@triton.jit
def exact_pair_grads(
    query,
    low_rank_read,
    log_decay,
    k,  # [16, BLOCK]
    b,
    grad_qk,  # [columns, rows] gradients of weights, 0 where a row does not see an earlier column
    grad_qb,
    grad_ak,
    grad_ab,
    start,
    length,
    stride_query_row,
    stride_read_row,
    stride_decay_row,
    stride_decay_column,
    column,
    floor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
):
    """Return what pairs of 16 tokens give queries, keys, decays, low-rank reads and low-rank writes, [16, BLOCK]."""
    place = tl.arange(0, 16)
    weight = tl.zeros([16, BLOCK], tl.float32)
    dq, dk, dg, da, db = weight, weight, weight, weight, weight
    for row in range(0, 16):
        token = start + row
        inside = token < length
        here = place == row
        terms = tl.zeros([16, BLOCK], tl.float32)
        if low_rank_read is not None:
            a = load_row(low_rank_read, token, inside, stride_read_row, 1, column, BLOCK, DIM).to(tl.float32)[None, :]
            of_key = tl.sum(tl.where(here[None, :], grad_ak, 0.0), 1)[:, None]
            of_write = tl.sum(tl.where(here[None, :], grad_ab, 0.0), 1)[:, None]
            found = weight * (of_key * k + of_write * b)
            terms += found * a
            da += tl.where(here[:, None], tl.sum(found, 0)[None, :], 0.0)
            dk += weight * of_key * a
            db += weight * of_write * a
        decay = load_row(log_decay, token, inside, stride_decay_row, stride_decay_column, column, BLOCK, DIM)
        kept = tl.exp2(tl.maximum(decay, floor) * 1.4426950408889634)
        weight = tl.where(here[:, None], 1.0, weight * kept[None, :])
        q = load_row(query, token, inside, stride_query_row, 1, column, BLOCK, DIM).to(tl.float32)[None, :]
        of_key = tl.sum(tl.where(here[None, :], grad_qk, 0.0), 1)[:, None]
        found = weight * (of_key * k)
        dk += weight * of_key * q
        if low_rank_read is not None:
            of_write = tl.sum(tl.where(here[None, :], grad_qb, 0.0), 1)[:, None]
            found += weight * (of_write * b)
            db += weight * of_write * q
        dq += tl.where(here[:, None], tl.sum(found, 0)[None, :], 0.0)
        # The row's own decay is in pairs with its query, and in none with its low-rank read.
        dg += tl.where(here[:, None], tl.sum(found * q, 0)[None, :], 0.0)
        terms += found * q
        dg += tl.where((place < row)[:, None], tl.cumsum(rows_at(terms, place - 1, 16), 0), 0.0)
    return dq, dk, dg, da, db
