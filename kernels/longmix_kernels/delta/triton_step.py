"""The delta rule of few tokens on a GPU, one after the other: what generation calls for each token.

One program owns all rows and some columns of one head's state. It loads them once, takes each token as `reference`
does, and stores them once, so that a call moves the state through memory once each way and is one launch. Columns of a
state never meet, low-rank reads included. Nothing is differentiated.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.launch import Call, Tokens
from longmix_kernels.delta.step import entering
from longmix_kernels.tensors import contiguous
from longmix_kernels.tiles import head_rows, load_block, program_head, store_block


@triton.jit
def row_of(matrix, place, columns, there):
    """Return one row of `tiles.Rows` in float32, zero where it is not `there`."""
    return tl.load(matrix.pointer + place * matrix.stride + columns, mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "heads"])
def step_kernel(
    tokens: Tokens,
    state,  # float32 [B, H, DIM, VALUE_DIM], contiguous, before the first token, or None for zeros
    output,  # [B, T, H, VALUE_DIM], contiguous
    final,  # float32 [B, H, DIM, VALUE_DIM], contiguous
    length,
    heads,
    DECAY: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COVER: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Take `VALUE_BLOCK` columns of one head's state through all tokens."""
    LOW_RANK: tl.constexpr = tokens.low_rank_read is not None
    block, batch, head = program_head((VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK, heads)
    column = block * VALUE_BLOCK
    sequence = batch * heads + head
    rows, columns = tl.arange(0, COVER), column + tl.arange(0, VALUE_BLOCK)
    row_there, column_there = rows < DIM, columns < VALUE_DIM
    queries, keys = head_rows(tokens.query, batch, head), head_rows(tokens.key, batch, head)
    values, decays = head_rows(tokens.value, batch, head), head_rows(tokens.log_decay, batch, head)
    if LOW_RANK:
        reads, writes = head_rows(tokens.low_rank_read, batch, head), head_rows(tokens.low_rank_write, batch, head)
    output += (batch * length * heads + head) * VALUE_DIM

    # [COVER, VALUE_BLOCK] in float32, zero past the ends.
    total = tl.zeros([COVER, VALUE_BLOCK], tl.float32)
    if state is not None:
        total += load_block(state + sequence * (DIM * VALUE_DIM), 0, COVER, DIM, column, VALUE_BLOCK, VALUE_DIM)
    for t in range(length):
        place = tl.zeros([], tl.int64) + t
        k, v = row_of(keys, place, rows, row_there), row_of(values, place, columns, column_there)
        q = row_of(queries, place, rows, row_there) * tokens.scale
        if LOW_RANK:
            removed = tl.sum(row_of(reads, place, rows, row_there)[:, None] * total, 0)
        if DECAY == "head":
            total *= tl.exp(tl.maximum(tl.load(decays.pointer + place * decays.stride), tokens.floor))
        else:
            of_channel = decays.pointer + place * decays.stride + rows * tokens.stride_decay_column
            decay = tl.load(of_channel, mask=row_there, other=0.0)
            total *= tl.exp(tl.maximum(decay, tokens.floor))[:, None]
        total += k[:, None] * v[None, :]
        if LOW_RANK:
            total += row_of(writes, place, rows, row_there)[:, None] * removed[None, :]
        result = tl.sum(q[:, None] * total, 0).to(output.dtype.element_ty)
        tl.store(output + place * heads * VALUE_DIM + columns, result, mask=column_there)
    store_block(final + sequence * (DIM * VALUE_DIM), total, 0, DIM, column, VALUE_DIM)


def triton_step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute few tokens, without gradients; no float64, head dimensions up to 256.

    Returns:
        The output [B, T, H, V] and the state after the last token, float32 [B, H, K, V].
    """
    call = Call(inputs)
    output = call.query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    final = call.query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
    (state,) = contiguous(entering(inputs))
    call.launch("step", step_kernel, call.tokens(), state, output, final, call.length, call.heads)
    return output, final
