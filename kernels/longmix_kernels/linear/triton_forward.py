"""Scalar-gated linear attention on a GPU, forward: two levels of tiles (TFLA, Beck et al. 2025, arXiv 2503.14376).

Chunk after chunk, one kernel carries the state and stores what enters each chunk. Then all rows at once read it, and
walk through the tokens of their own chunk in tiles, as FlashAttention does:

    Y_t = s (read_t C_in^T q_t + sum_j weight_tj (q_t . k_j) v_j) / max(|n_t . s q_t|, exp(-m_t))

Unlike the published kernels, which find the largest weight of a row as they go and rescale, the log scales m come from
the gates alone beforehand (`triton_gates`), so the normalised form costs two row sums more than the plain one and no
second pass. A program owns all columns of its rows' output, so that no product of queries and keys is computed twice.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.launch import Call
from longmix_kernels.linear.triton_gates import gates_kernel, scales_kernel
from longmix_kernels.linear.triton_states import states_kernel
from longmix_kernels.linear.triton_weights import pair_weights
from longmix_kernels.tensors import Strided, given, strided, vectors
from longmix_kernels.tiles import head_rows, load_block, load_tile, product, program_head, store_tile


@triton.jit(do_not_specialize=["length", "heads"])
def output_kernel(
    query: Strided,  # [B, T, H, DIM]
    key: Strided,  # [B, T, H, DIM]
    value: Strided,  # [B, T, H, VALUE_DIM]
    document_ids,  # int32 [B, T], contiguous, or None
    memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, DIM], contiguous, or None
    states,  # [B, H, chunks, DIM, VALUE_DIM], what enters each chunk
    normalizers,  # float32 [B, H, chunks, DIM], or None
    row_whole,  # float32 [B, H, T], from `gates_kernel`
    row_rest,
    column_whole,
    column_rest,
    read,
    row_log_scale,  # float32 [B, T, H], contiguous, in base 2, or None
    output,  # [B, T, H, VALUE_DIM], contiguous
    denominator,  # float32 [B, T, H], contiguous, or None: n_t . s q_t where that divides, else exp2(-m_t)
    scale,
    length,
    heads,
    NORMALIZE: tl.constexpr,
    INITIAL: tl.constexpr,
    CARRIED: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr,
    DIM_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `ROWS` rows of the output of one head."""
    tile, batch, head = program_head(tl.cdiv(length, ROWS), heads)
    start = tile * ROWS
    chunk = start // CHUNK
    first = chunk * CHUNK
    rows = start + tl.arange(0, ROWS)
    there = rows < length
    sequence = batch * heads + head
    queries = head_rows(query, batch, head)
    keys = head_rows(key, batch, head)
    values = head_rows(value, batch, head)
    # Rows past the end have weights of 0.
    own_whole = tl.load(row_whole + sequence * length + rows, mask=there, other=float("-inf"))
    own_rest = tl.load(row_rest + sequence * length + rows, mask=there, other=0.0)
    own_read = tl.load(read + sequence * length + rows, mask=there, other=0.0)
    column_whole += sequence * length
    column_rest += sequence * length
    if document_ids is not None:
        document_ids += batch * length
        own_id = tl.load(document_ids + rows, mask=there, other=0)
        first_id = tl.load(document_ids + first)

    sum_main = tl.zeros([ROWS, VALUE_MAIN], tl.float32)
    if VALUE_REST > 0:
        sum_rest = tl.zeros([ROWS, VALUE_REST], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    # From the state that enters the chunk, and for documents that begin within it from the initial state.
    for SOURCE in tl.static_range(2 if INITIAL and document_ids is not None else 1):
        of_source = there
        width = DIM
        if SOURCE == 0:
            place = sequence * tl.cdiv(length, CHUNK) + chunk
            state = states + place * (DIM * VALUE_DIM)
            if NORMALIZE:
                row_state = normalizers + place * DIM
            if INITIAL and document_ids is not None:
                of_source = there & (own_id == first_id)
            if not (INITIAL or CARRIED):
                # Nothing has been seen before the first chunk.
                width = tl.where(first > 0, DIM, 0)
        else:
            state = memory + sequence * (DIM * VALUE_DIM)
            if NORMALIZE:
                row_state = normalizer + sequence * DIM
            of_source = there & (own_id != first_id)
            width = tl.where(tl.max(of_source.to(tl.int32), 0) > 0, DIM, 0)
        for column in range(0, width, BLOCK):
            # [ROWS, BLOCK] times [BLOCK, VALUE_MAIN].
            q = load_tile(queries.pointer, start, of_source, queries.stride, column, BLOCK, DIM)
            c = load_block(state, column, BLOCK, DIM, 0, VALUE_MAIN, VALUE_DIM)
            sum_main = product(q, c.to(q.dtype), sum_main, UPCAST)
            if VALUE_REST > 0:
                c = load_block(state, column, BLOCK, DIM, VALUE_MAIN, VALUE_REST, VALUE_DIM)
                sum_rest = product(q, c.to(q.dtype), sum_rest, UPCAST)
            if NORMALIZE:
                columns = column + tl.arange(0, BLOCK)
                n = tl.load(row_state + columns, mask=columns < DIM, other=0.0)
                along += tl.sum(q.to(tl.float32) * n[None, :], 1)
    sum_main *= own_read[:, None]
    if VALUE_REST > 0:
        sum_rest *= own_read[:, None]
    along *= own_read

    q_main = load_tile(queries.pointer, start, there, queries.stride, 0, DIM_MAIN, DIM)
    if DIM_REST > 0:
        q_rest = load_tile(queries.pointer, start, there, queries.stride, DIM_MAIN, DIM_REST, DIM)
    for begin in range(first, tl.minimum(start + ROWS, length), KEYS):
        # [ROWS, KEYS] scores from [ROWS, DIM] and [KEYS, DIM].
        columns = begin + tl.arange(0, KEYS)
        inside = columns < length
        k = load_tile(keys.pointer, begin, inside, keys.stride, 0, DIM_MAIN, DIM)
        scores = product(q_main, tl.trans(k), None, UPCAST)
        if DIM_REST > 0:
            k = load_tile(keys.pointer, begin, inside, keys.stride, DIM_MAIN, DIM_REST, DIM)
            scores = product(q_rest, tl.trans(k), scores, UPCAST)
        whole = tl.load(column_whole + columns, mask=inside, other=0.0)
        rest = tl.load(column_rest + columns, mask=inside, other=0.0)
        visible = rows[:, None] >= columns[None, :]
        if document_ids is not None:
            ids = tl.load(document_ids + columns, mask=inside, other=0)
            visible = visible & (own_id[:, None] == ids[None, :])
        scores *= pair_weights(own_whole[:, None], own_rest[:, None], whole[None, :], rest[None, :], visible)
        if NORMALIZE:
            along += tl.sum(scores, 1)
        v = load_tile(values.pointer, begin, inside, values.stride, 0, VALUE_MAIN, VALUE_DIM)
        low_scores = scores.to(v.dtype)
        sum_main = product(low_scores, v, sum_main, UPCAST)
        if VALUE_REST > 0:
            v = load_tile(values.pointer, begin, inside, values.stride, VALUE_MAIN, VALUE_REST, VALUE_DIM)
            sum_rest = product(low_scores, v, sum_rest, UPCAST)

    factor = tl.zeros([ROWS], tl.float32) + scale
    place = batch * length * heads + head + rows.to(tl.int64) * heads
    if NORMALIZE:
        along *= scale
        # At least 2 ** -126, so that a row of zeros is not divided by 0.
        least = tl.exp2(-tl.minimum(tl.load(row_log_scale + place, mask=there, other=0.0), 126.0))
        divides = tl.abs(along) > least
        tl.store(denominator + place, tl.where(divides, along, least), mask=there)
        factor /= tl.where(divides, tl.abs(along), least)
    output += (batch * length * heads + head) * VALUE_DIM
    result = sum_main * factor[:, None]
    store_tile(output, result, start, there, heads * VALUE_DIM, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_REST > 0:
        result = sum_rest * factor[:, None]
        store_tile(output, result, start, there, heads * VALUE_DIM, VALUE_MAIN, VALUE_REST, VALUE_DIM)


def compute_gates(call: Call, row_log_scale: torch.Tensor | None) -> list[torch.Tensor]:
    """Return what gates contribute to weights, six float32 vectors [B, H, T]; see `gates_kernel`."""
    gates = vectors(call.query, 6, call.batch, call.heads, call.length)
    call.launch(
        "gates",
        gates_kernel,
        *call.gates(),
        call.document_ids,
        row_log_scale,
        call.log_scale,
        call.carried_log_scale,
        *gates,
        call.length,
        call.heads,
    )
    return gates


def compute_states(
    call: Call, gates: Sequence[torch.Tensor], with_final: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the states that enter each chunk and their normalisers, and those after the last token if wanted.

    Returns:
        states [B, H, chunks, Dk, Dv], float32 or as `launch.stored_states` says; float32 normalisers [B, H, chunks,
        Dk], or None; final float32 memory [B, H, Dk, Dv] and normaliser [B, H, Dk], or None.
    """
    states, normalizers = call.new_states()
    final_memory = final_normalizer = None
    if with_final:
        final_memory = call.query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
        if call.normalize:
            final_normalizer = final_memory.new_empty(call.batch, call.heads, call.dim)
    call.launch(
        "states",
        states_kernel,
        *strided(call.key, call.value),
        call.document_ids,
        call.memory,
        call.normalizer,
        call.carried_memory,
        call.carried_normalizer,
        gates[4],
        gates[5],
        states,
        normalizers,
        final_memory,
        final_normalizer,
        call.length,
        call.heads,
    )
    return states, normalizers, final_memory, final_normalizer


def triton_forward(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute linear attention; no float64, head dimensions up to 512.

    Returns:
        The output [B, T, H, Dv]; the final memory, normaliser and log scale; and for the backward the log scale of each
        row in base 2 and its denominator, float32 [B, T, H]. Without `normalize`, all but the first two are empty.
    """
    call = Call(inputs)
    output = call.query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    row_log_scale = denominator = final_log_scale = None
    if call.normalize:
        row_log_scale = call.query.new_empty(call.batch, call.length, call.heads, dtype=torch.float32)
        denominator = call.query.new_empty(call.batch, call.length, call.heads, dtype=torch.float32)
        final_log_scale = call.query.new_empty(call.batch, call.heads, dtype=torch.float32)
        call.launch(
            "scales",
            scales_kernel,
            *call.gates(),
            call.document_ids,
            call.log_scale,
            call.carried_log_scale,
            row_log_scale,
            final_log_scale,
            call.length,
            call.heads,
        )
    gates = compute_gates(call, row_log_scale)
    states, normalizers, final_memory, final_normalizer = compute_states(call, gates, with_final=True)
    call.launch(
        "output",
        output_kernel,
        *strided(call.query, call.key, call.value),
        call.document_ids,
        call.memory,
        call.normalizer,
        states,
        normalizers,
        *gates[:5],
        row_log_scale,
        output,
        denominator,
        call.scale,
        call.length,
        call.heads,
    )
    results = final_memory, final_normalizer, final_log_scale, row_log_scale, denominator
    return output, *given(gates[0], *results)
