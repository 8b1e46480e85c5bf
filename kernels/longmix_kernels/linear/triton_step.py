"""Scalar-gated linear attention of few tokens on a GPU, one after the other: what generation calls for each token.

One program owns all rows and some columns of one head's state. It loads them once, takes each token as `reference`
does, and stores them once, so that a call moves the state through memory once each way; the chunked kernels move it
four times, in up to four launches. Nothing is differentiated.
"""

import torch
import triton
import triton.language as tl

from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.launch import Call
from longmix_kernels.linear.step import entering
from longmix_kernels.tensors import Strided, contiguous, given, strided
from longmix_kernels.tiles import head_rows, load_block, program_head, store_block


@triton.jit(do_not_specialize=["length", "heads"])
def step_kernel(
    query: Strided,  # [B, T, H, DIM]
    key: Strided,  # [B, T, H, DIM]
    value: Strided,  # [B, T, H, VALUE_DIM]
    log_decay: Strided,  # float32 [B, T, H]
    log_input: Strided,  # float32 [B, T, H], or None for zeros
    memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, before the first token, or None for zeros
    normalizer,  # float32 [B, H, DIM], contiguous, or None
    log_scale,  # float32 [B, H], contiguous, or None
    output,  # [B, T, H, VALUE_DIM], contiguous
    final_memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous
    final_normalizer,  # float32 [B, H, DIM], contiguous, or None
    final_log_scale,  # float32 [B, H], contiguous, or None
    scale,
    length,
    heads,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COVER: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Take `VALUE_BLOCK` columns of one head's state through all tokens."""
    block, batch, head = program_head((VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK, heads)
    column = block * VALUE_BLOCK
    sequence = batch * heads + head
    rows, columns = tl.arange(0, COVER), column + tl.arange(0, VALUE_BLOCK)
    row_there, column_there = rows < DIM, columns < VALUE_DIM
    queries, keys, values = head_rows(query, batch, head), head_rows(key, batch, head), head_rows(value, batch, head)
    decays = head_rows(log_decay, batch, head)
    if log_input is not None:
        inputs = head_rows(log_input, batch, head)
    output += (batch * length * heads + head) * VALUE_DIM

    # [COVER, VALUE_BLOCK] in float32, zero past the ends; one program in each head has no use for its normaliser.
    total = tl.zeros([COVER, VALUE_BLOCK], tl.float32)
    row_total = tl.zeros([COVER], tl.float32)
    whole = tl.zeros([], tl.float32)
    if memory is not None:
        total += load_block(memory + sequence * (DIM * VALUE_DIM), 0, COVER, DIM, column, VALUE_BLOCK, VALUE_DIM)
    if normalizer is not None:
        row_total += tl.load(normalizer + sequence * DIM + rows, mask=row_there, other=0.0)
    if log_scale is not None:
        whole += tl.load(log_scale + sequence)
    for t in range(length):
        place = tl.zeros([], tl.int64) + t
        decay = tl.load(decays.pointer + place * decays.stride)
        gate = tl.zeros([], tl.float32)
        if log_input is not None:
            gate += tl.load(inputs.pointer + place * inputs.stride)
        if NORMALIZE:
            decay += whole
            whole = tl.maximum(decay, gate)
            decay -= whole
            gate -= whole
        kept, taken = tl.exp(decay), tl.exp(gate)
        k = tl.load(keys.pointer + place * keys.stride + rows, mask=row_there, other=0.0).to(tl.float32) * taken
        v = tl.load(values.pointer + place * values.stride + columns, mask=column_there, other=0.0).to(tl.float32)
        q = tl.load(queries.pointer + place * queries.stride + rows, mask=row_there, other=0.0).to(tl.float32) * scale
        total = total * kept + k[:, None] * v[None, :]
        read = tl.sum(q[:, None] * total, 0)
        if NORMALIZE:
            row_total = row_total * kept + k
            # At least exp(-87), so that a row of zeros is not divided by 0.
            read /= tl.maximum(tl.abs(tl.sum(q * row_total, 0)), tl.exp(-tl.minimum(whole, 87.0)))
        result = read.to(output.dtype.element_ty)
        tl.store(output + place * heads * VALUE_DIM + columns, result, mask=column_there)
    store_block(final_memory + sequence * (DIM * VALUE_DIM), total, 0, DIM, column, VALUE_DIM)
    if NORMALIZE:
        # The first of the programs of a head writes what all of them have.
        tl.store(final_normalizer + sequence * DIM + rows, row_total, mask=rows < tl.where(column == 0, DIM, 0))
        tl.store(final_log_scale + sequence, whole, mask=column == 0)


def triton_step(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute few tokens, without gradients; no float64, head dimensions up to 512.

    Returns:
        The output [B, T, H, Dv], and memory, normaliser and log scale after the last token, float32; the last two are
        empty without `normalize`.
    """
    call = Call(inputs)
    output = call.query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    memory = call.query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
    normalizer = log_scale = None
    if call.normalize:
        normalizer, log_scale = memory.new_empty(memory.shape[:3]), memory.new_empty(memory.shape[:2])
    call.launch(
        "step",
        step_kernel,
        *strided(call.query, call.key, call.value),
        *call.gates(),
        *contiguous(*entering(inputs)),
        output,
        memory,
        normalizer,
        log_scale,
        call.scale,
        call.length,
        call.heads,
    )
    return output, *given(memory, memory, normalizer, log_scale)
