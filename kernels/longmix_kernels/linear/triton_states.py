"""The states between chunks on a GPU, and their gradients: one program per block of a head's state, chunk after chunk.

Only the states that enter a chunk are stored, and only the gradients of those that leave one; in between, a program
keeps its block in registers. With W the weights `write`, R the weights `read` (divided by the row's denominator, in the
backward) and r that of the chunk's last row,

    C_out = r C_in + (W K)^T V      n_out = r n_in + (W K)^T 1
    dC_in = r dC_out + s (R Q)^T dY     dn_in = r dn_out + s (R Q)^T delta

where a document that begins puts the initial state in the place of C_in, and takes its gradient away from dC_in. The
first one of a row goes on from the carried state instead, if there is one.
"""

import triton
import triton.language as tl

from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import head_rows, load_tile, load_tile_transposed, product, program_head


@triton.jit(do_not_specialize=["length", "heads"])
def states_kernel(
    key: Strided,  # [B, T, H, DIM]
    value: Strided,  # [B, T, H, VALUE_DIM]
    document_ids,  # int32 [B, T], contiguous, or None
    memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    normalizer,  # float32 [B, H, DIM], contiguous, or None
    carried_memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, before the first token, or None for `memory`
    carried_normalizer,  # float32 [B, H, DIM], contiguous, or None
    read,  # float32 [B, H, T]
    write,  # float32 [B, H, T]
    states,  # [B, H, chunks, DIM, VALUE_DIM], what enters each chunk
    normalizers,  # float32 [B, H, chunks, DIM], or None
    final_memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    final_normalizer,  # float32 [B, H, DIM], contiguous, or None
    length,
    heads,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a block [BLOCK, VALUE_BLOCK] of every state of one head, from the first chunk on."""
    value_blocks = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    block, batch, head = program_head((DIM + BLOCK - 1) // BLOCK * value_blocks, heads)
    row_start, column_start = block // value_blocks * BLOCK, block % value_blocks * VALUE_BLOCK
    row, column = row_start + tl.arange(0, BLOCK), column_start + tl.arange(0, VALUE_BLOCK)
    inside = (row[:, None] < DIM) & (column[None, :] < VALUE_DIM)
    place = row[:, None] * VALUE_DIM + column[None, :]
    # The first of the blocks side by side writes the normaliser.
    row_inside = row < tl.where(column_start == 0, DIM, 0)
    sequence = batch * heads + head
    keys = head_rows(key, batch, head)
    values = head_rows(value, batch, head)
    read += sequence * length
    write += sequence * length
    states += sequence * tl.cdiv(length, CHUNK) * (DIM * VALUE_DIM)
    if NORMALIZE:
        normalizers += sequence * tl.cdiv(length, CHUNK) * DIM
    if memory is not None:
        memory += sequence * (DIM * VALUE_DIM)
    if normalizer is not None:
        normalizer += sequence * DIM
    if document_ids is not None:
        document_ids += batch * length

    total = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
    row_total = tl.zeros([BLOCK], tl.float32)
    if carried_memory is not None:
        carried_memory += sequence * (DIM * VALUE_DIM)
        total += tl.load(carried_memory + place, mask=inside, other=0.0)
    elif memory is not None:
        total += tl.load(memory + place, mask=inside, other=0.0)
    if carried_normalizer is not None:
        row_total += tl.load(carried_normalizer + sequence * DIM + row, mask=row_inside, other=0.0)
    elif normalizer is not None:
        row_total += tl.load(normalizer + row, mask=row_inside, other=0.0)
    for start in range(0, length, ROWS):
        if start % CHUNK == 0:
            last = tl.minimum(start + CHUNK, length) - 1
            kept = tl.load(read + last)
            if document_ids is not None:
                first_id = tl.load(document_ids + start)
                id_before = tl.load(document_ids + start - 1, mask=start > 0, other=0)
                fresh = (start > 0) & (id_before != first_id)
                restart = tl.load(document_ids + last) != first_id
                first = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
                if memory is not None:
                    first += tl.load(memory + place, mask=inside & (fresh | restart), other=0.0)
                total = tl.where(fresh, first, total)
            chunk = tl.zeros([], tl.int64) + start // CHUNK
            tl.store(states + chunk * (DIM * VALUE_DIM) + place, total.to(states.dtype.element_ty), mask=inside)
            if document_ids is not None:
                total = tl.where(restart, first, total)
            total *= kept
            if NORMALIZE:
                if document_ids is not None:
                    row_first = tl.zeros([BLOCK], tl.float32)
                    if normalizer is not None:
                        row_first += tl.load(normalizer + row, mask=row_inside & (fresh | restart), other=0.0)
                    row_total = tl.where(fresh, row_first, row_total)
                tl.store(normalizers + chunk * DIM + row, row_total, mask=row_inside)
                if document_ids is not None:
                    row_total = tl.where(restart, row_first, row_total)
                row_total *= kept
        rows = start + tl.arange(0, ROWS)
        there = rows < length
        # [BLOCK, ROWS] and [ROWS, VALUE_BLOCK]; weights are at most about 1.
        weight = tl.load(write + rows, mask=there, other=0.0)
        k = load_tile_transposed(keys.pointer, start, there, keys.stride, row_start, BLOCK, DIM)
        v = load_tile(values.pointer, start, there, values.stride, column_start, VALUE_BLOCK, VALUE_DIM)
        weighted = k.to(tl.float32) * weight[None, :]
        if NORMALIZE:
            row_total += tl.sum(weighted, 1)
        total = product(weighted.to(k.dtype), v, total, UPCAST)
    if final_memory is not None:
        tl.store(final_memory + sequence * (DIM * VALUE_DIM) + place, total, mask=inside)
        if NORMALIZE:
            tl.store(final_normalizer + sequence * DIM + row, row_total, mask=row_inside)


@triton.jit(do_not_specialize=["length", "heads"])
def grad_states_kernel(
    query: Strided,  # [B, T, H, DIM]
    grad_output: Strided,  # [B, T, H, VALUE_DIM]
    document_ids,  # int32 [B, T], contiguous, or None
    grad_memory,  # float32 [B, H, DIM, VALUE_DIM], contiguous, of the state after the last token, or None
    grad_normalizer,  # float32 [B, H, DIM], contiguous, or None
    read,  # float32 [B, H, T]
    grad_read,  # float32 [B, H, T], `read` divided by the denominator
    delta,  # float32 [B, H, T], or None
    grad_states,  # [B, H, chunks, DIM, VALUE_DIM], of what leaves each chunk
    grad_normalizers,  # float32 [B, H, chunks, DIM], or None
    grad_initial,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    grad_initial_normalizer,  # float32 [B, H, DIM], contiguous, or None
    grad_carried,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    grad_carried_normalizer,  # float32 [B, H, DIM], contiguous, or None
    scale,
    length,
    heads,
    NORMALIZE: tl.constexpr,
    INITIAL: tl.constexpr,
    CARRIED: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a block [BLOCK, VALUE_BLOCK] of the gradient of every state of one head, from the last chunk on."""
    value_blocks = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    block, batch, head = program_head((DIM + BLOCK - 1) // BLOCK * value_blocks, heads)
    row_start, column_start = block // value_blocks * BLOCK, block % value_blocks * VALUE_BLOCK
    row, column = row_start + tl.arange(0, BLOCK), column_start + tl.arange(0, VALUE_BLOCK)
    inside = (row[:, None] < DIM) & (column[None, :] < VALUE_DIM)
    place = row[:, None] * VALUE_DIM + column[None, :]
    row_inside = row < tl.where(column_start == 0, DIM, 0)
    sequence = batch * heads + head
    queries = head_rows(query, batch, head)
    grad_outputs = head_rows(grad_output, batch, head)
    read += sequence * length
    grad_read += sequence * length
    grad_states += sequence * tl.cdiv(length, CHUNK) * (DIM * VALUE_DIM)
    if NORMALIZE:
        delta += sequence * length
        grad_normalizers += sequence * tl.cdiv(length, CHUNK) * DIM
    if document_ids is not None:
        document_ids += batch * length

    total = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
    row_total = tl.zeros([BLOCK], tl.float32)
    if grad_memory is not None:
        total += tl.load(grad_memory + sequence * (DIM * VALUE_DIM) + place, mask=inside, other=0.0)
    if grad_normalizer is not None:
        row_total += tl.load(grad_normalizer + sequence * DIM + row, mask=row_inside, other=0.0)
    # What documents that begin after the first token take away for the initial state.
    taken = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
    row_taken = tl.zeros([BLOCK], tl.float32)
    end = tl.cdiv(length, ROWS) * ROWS
    first_id = tl.zeros([], tl.int32)
    for done in range(0, length, ROWS):
        start = end - ROWS - done
        rows = start + tl.arange(0, ROWS)
        if ((start + ROWS) % CHUNK == 0) | (done == 0):
            chunk = tl.zeros([], tl.int64) + start // CHUNK
            last = tl.minimum(start + ROWS, length) - 1
            kept = tl.load(read + last)
            if document_ids is not None:
                # Nothing leaves a chunk after which a document begins, and all of it is the initial state's.
                first_id = tl.load(document_ids + start // CHUNK * CHUNK)
                last_id = tl.load(document_ids + last)
                id_after = tl.load(document_ids + last + 1, mask=last + 1 < length, other=0)
                ends = (last + 1 < length) & (id_after != last_id)
                if INITIAL:
                    taken += tl.where(ends, total, 0.0)
                total = tl.where(ends, 0.0, total)
            tl.store(
                grad_states + chunk * (DIM * VALUE_DIM) + place, total.to(grad_states.dtype.element_ty), mask=inside
            )
            total *= kept
            if document_ids is not None:
                restart = last_id != first_id
                if INITIAL:
                    taken += tl.where(restart, total, 0.0)
                total = tl.where(restart, 0.0, total)
            if NORMALIZE:
                if document_ids is not None:
                    if INITIAL:
                        row_taken += tl.where(ends, row_total, 0.0)
                    row_total = tl.where(ends, 0.0, row_total)
                tl.store(grad_normalizers + chunk * DIM + row, row_total, mask=row_inside)
                row_total *= kept
                if document_ids is not None:
                    if INITIAL:
                        row_taken += tl.where(restart, row_total, 0.0)
                    row_total = tl.where(restart, 0.0, row_total)
        there = rows < length
        # [BLOCK, ROWS] and [ROWS, VALUE_BLOCK].
        weight = tl.load(grad_read + rows, mask=there, other=0.0) * scale
        q = load_tile_transposed(queries.pointer, start, there, queries.stride, row_start, BLOCK, DIM)
        do = load_tile(grad_outputs.pointer, start, there, grad_outputs.stride, column_start, VALUE_BLOCK, VALUE_DIM)
        weighted = q.to(tl.float32) * weight[None, :]
        if NORMALIZE:
            row_delta = tl.load(delta + rows, mask=there, other=0.0)
        if document_ids is not None:
            carried = tl.load(document_ids + rows, mask=there, other=0) == first_id
            if INITIAL:
                later = tl.where(carried[None, :], 0.0, weighted)
                taken = product(later.to(q.dtype), do, taken, UPCAST)
                if NORMALIZE:
                    row_taken += tl.sum(later * row_delta[None, :], 1)
            weighted = tl.where(carried[None, :], weighted, 0.0)
        if NORMALIZE:
            row_total += tl.sum(weighted * row_delta[None, :], 1)
        total = product(weighted.to(q.dtype), do, total, UPCAST)
    if not CARRIED:
        taken += total
        row_taken += row_total
    if INITIAL:
        tl.store(grad_initial + sequence * (DIM * VALUE_DIM) + place, taken, mask=inside)
        if NORMALIZE:
            tl.store(grad_initial_normalizer + sequence * DIM + row, row_taken, mask=row_inside)
    if CARRIED:
        tl.store(grad_carried + sequence * (DIM * VALUE_DIM) + place, total, mask=inside)
        if NORMALIZE:
            tl.store(grad_carried_normalizer + sequence * DIM + row, row_total, mask=row_inside)
