"""The states between chunks on a GPU, and their gradients: chunk after chunk, one program per block of value columns.

With what the chunks do (`triton_prepare`), and dY the gradient of the output,

    S' = diag(kept) S + E S + R            y = Y + Q S
    dS = diag(kept) dS' + E^T dS' + Q^T dY

where a document that begins puts the initial state in the place of S, and takes its gradient away from dS. The first
one of a row goes on from the carried state instead, if there is one. A program keeps its block of S in float32, in one
or two pieces of `PIECE` rows, and rounds it only for products. What the scan overwrites is loaded by all warps before
one of them stores. Loads that are ahead of their use are waited for by all; without them, `STAGES` 1, there is a
barrier, over which Triton loads nothing ahead.
"""

import triton
import triton.language as tl

from longmix_kernels.tensors import Strided
from longmix_kernels.tiles import (
    head_rows,
    load_block,
    load_block_transposed,
    load_tile,
    load_tile_transposed,
    product,
    program_head,
    store_block,
    store_tile,
)


@triton.jit
def kept_of(kept, row, PIECE: tl.constexpr, DIM: tl.constexpr):
    """Return how much is left of `PIECE` rows of a state, [PIECE, 1]."""
    rows = row + tl.arange(0, PIECE)
    return tl.load(kept + rows, mask=rows < DIM, other=0.0)[:, None]


@triton.jit
def moved(transitions, source, total, row, column, PIECE: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + E source for rows of E from `row` and columns from `column` on."""
    e = load_block(transitions, row, PIECE, DIM, column, PIECE, DIM)
    return product(e, source.to(e.dtype), total, UPCAST)


@triton.jit
def moved_back(transitions, grad, total, row, column, PIECE: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + E^T grad for columns of E from `row` and rows from `column` on."""
    e = load_block_transposed(transitions, column, PIECE, DIM, row, PIECE, DIM)
    return product(e, grad.to(e.dtype), total, UPCAST)


@triton.jit
def gathered(reads, grad_output, total, start, rows, row, PIECE: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + Q^T dY for columns of Q from `row` on, of rows that are given."""
    q = load_tile_transposed(reads, start, rows, DIM, row, PIECE, DIM)
    return product(q, grad_output.to(q.dtype), total, UPCAST)


@triton.jit(do_not_specialize=["length", "heads"])
def scan_kernel(
    document_ids,  # int32 [B, T], contiguous, or None
    initial,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    carried_state,  # float32 [B, H, DIM, VALUE_DIM], contiguous, before the first token, or None for `initial`
    output,  # [B, T, H, VALUE_DIM], contiguous; holds Y, and then y; None where states are asked for
    states,  # float32 [B, H, chunks, DIM, VALUE_DIM]; holds R, and without outputs then what enters each chunk
    transitions,  # [B, H, chunks, DIM, DIM], or None
    reads,  # [B, H, T, DIM]
    kept,  # float32 [B, H, chunks, DIM]
    final,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    length,
    heads,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `VALUE_BLOCK` columns of every state and of the output of one head, from the first chunk on."""
    DOCUMENTS: tl.constexpr = document_ids is not None
    block, batch, head = program_head((VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK, heads)
    column = block * VALUE_BLOCK
    sequence = batch * heads + head
    chunks = tl.cdiv(length, CHUNK)
    if output is not None:
        output += (batch * length * heads + head) * VALUE_DIM
    states += sequence * chunks * (DIM * VALUE_DIM)
    reads += sequence * length * DIM
    kept += sequence * chunks * DIM
    if final is not None:
        final += sequence * (DIM * VALUE_DIM)
    if transitions is not None:
        transitions += sequence * chunks * (DIM * DIM)
    if initial is not None:
        initial += sequence * (DIM * VALUE_DIM)
    if DOCUMENTS:
        document_ids += batch * length

    one = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
    if carried_state is not None:
        carried_state += sequence * (DIM * VALUE_DIM)
        one += load_block(carried_state, 0, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
    elif initial is not None:
        one += load_block(initial, 0, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
    if DIM > PIECE:
        two = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
        if carried_state is not None:
            two += load_block(carried_state, PIECE, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
        elif initial is not None:
            two += load_block(initial, PIECE, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
    for start in range(0, length, CHUNK):
        last = tl.minimum(start + CHUNK, length) - 1
        there = start + tl.arange(0, CHUNK) < length
        carried = there
        if DOCUMENTS:
            first_id = tl.load(document_ids + start)
            id_before = tl.load(document_ids + start - 1, mask=start > 0, other=0)
            fresh = (start > 0) & (id_before != first_id)
            restart = tl.load(document_ids + last) != first_id
            carried = there & (tl.load(document_ids + start + tl.arange(0, CHUNK), mask=there, other=0) == first_id)
            if initial is not None:
                first_one = load_block(initial, 0, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
            else:
                first_one = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
            one = tl.where(fresh, first_one, one)
        if DIM > PIECE and DOCUMENTS:
            if initial is not None:
                first_two = load_block(initial, PIECE, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
            else:
                first_two = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
            two = tl.where(fresh, first_two, two)
        if output is not None:
            y = load_tile(output, start, there, heads * VALUE_DIM, column, VALUE_BLOCK, VALUE_DIM).to(tl.float32)
            q = load_tile(reads, start, carried, DIM, 0, PIECE, DIM)
            y = product(q, one.to(q.dtype), y, UPCAST)
            if DIM > PIECE:
                q = load_tile(reads, start, carried, DIM, PIECE, PIECE, DIM)
                y = product(q, two.to(q.dtype), y, UPCAST)
            if DOCUMENTS and initial is not None:
                # Rows of documents that begin within the chunk.
                later = there & (carried == 0)
                q = load_tile(reads, start, later, DIM, 0, PIECE, DIM)
                y = product(q, first_one.to(q.dtype), y, UPCAST)
                if DIM > PIECE:
                    q = load_tile(reads, start, later, DIM, PIECE, PIECE, DIM)
                    y = product(q, first_two.to(q.dtype), y, UPCAST)
            if STAGES == 1:
                tl.debug_barrier()
            store_tile(output, y, start, there, heads * VALUE_DIM, column, VALUE_BLOCK, VALUE_DIM)
        next_one = load_block(states, 0, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
        if DIM > PIECE:
            next_two = load_block(states, PIECE, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
        if output is None:
            # What enters a chunk is stored where R was, which every warp must have loaded before.
            tl.debug_barrier()
            store_block(states, one, 0, DIM, column, VALUE_DIM)
            if DIM > PIECE:
                store_block(states, two, PIECE, DIM, column, VALUE_DIM)
        if DOCUMENTS:
            one = tl.where(restart, first_one, one)
            if DIM > PIECE:
                two = tl.where(restart, first_two, two)
        next_one += one * kept_of(kept, 0, PIECE, DIM)
        if DIM > PIECE:
            next_two += two * kept_of(kept, PIECE, PIECE, DIM)
        if transitions is not None:
            next_one = moved(transitions, one, next_one, 0, 0, PIECE, DIM, UPCAST)
        if DIM > PIECE:
            if transitions is not None:
                next_one = moved(transitions, two, next_one, 0, PIECE, PIECE, DIM, UPCAST)
                next_two = moved(transitions, one, next_two, PIECE, 0, PIECE, DIM, UPCAST)
                next_two = moved(transitions, two, next_two, PIECE, PIECE, PIECE, DIM, UPCAST)
            two = next_two
        one = next_one
        states += DIM * VALUE_DIM
        kept += DIM
        if transitions is not None:
            transitions += DIM * DIM
    if final is not None:
        store_block(final, one, 0, DIM, column, VALUE_DIM)
        if DIM > PIECE:
            store_block(final, two, PIECE, DIM, column, VALUE_DIM)


@triton.jit(do_not_specialize=["length", "heads"])
def grad_scan_kernel(
    document_ids,  # int32 [B, T], contiguous, or None
    grad_output: Strided,  # [B, T, H, VALUE_DIM]
    grad_final,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    transitions,  # [B, H, chunks, DIM, DIM], or None
    reads,  # [B, H, T, DIM]
    kept,  # float32 [B, H, chunks, DIM]
    grad_states,  # float32 [B, H, chunks, DIM, VALUE_DIM], of what leaves each chunk
    grad_initial,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    grad_carried,  # float32 [B, H, DIM, VALUE_DIM], contiguous, or None
    length,
    heads,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write `VALUE_BLOCK` columns of the gradient of every state of one head, from the last chunk on."""
    DOCUMENTS: tl.constexpr = document_ids is not None
    block, batch, head = program_head((VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK, heads)
    column = block * VALUE_BLOCK
    sequence = batch * heads + head
    chunks = tl.cdiv(length, CHUNK)
    end = sequence * chunks + chunks - 1
    dy = head_rows(grad_output, batch, head)
    grad_states += end * (DIM * VALUE_DIM)
    reads += sequence * length * DIM
    kept += end * DIM
    if transitions is not None:
        transitions += end * (DIM * DIM)
    if DOCUMENTS:
        document_ids += batch * length

    one = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
    two = one
    if grad_final is not None:
        grad_final += sequence * (DIM * VALUE_DIM)
        one += load_block(grad_final, 0, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
        if DIM > PIECE:
            two += load_block(grad_final, PIECE, PIECE, DIM, column, VALUE_BLOCK, VALUE_DIM)
    # What documents that begin after the first token take away for the initial state.
    taken_one = tl.zeros([PIECE, VALUE_BLOCK], tl.float32)
    taken_two = taken_one
    for done in range(0, length, CHUNK):
        start = (chunks - 1) * CHUNK - done
        there = start + tl.arange(0, CHUNK) < length
        carried = there
        if DOCUMENTS:
            # Nothing leaves a chunk after which a document begins, and all of it is the initial state's.
            last = tl.minimum(start + CHUNK, length) - 1
            first_id, last_id = tl.load(document_ids + start), tl.load(document_ids + last)
            id_after = tl.load(document_ids + last + 1, mask=last + 1 < length, other=0)
            ends = (last + 1 < length) & (id_after != last_id)
            restart = last_id != first_id
            carried = there & (tl.load(document_ids + start + tl.arange(0, CHUNK), mask=there, other=0) == first_id)
            if grad_initial is not None:
                taken_one += tl.where(ends, one, 0.0)
                taken_two += tl.where(ends, two, 0.0)
            one = tl.where(ends, 0.0, one)
            two = tl.where(ends, 0.0, two)
        store_block(grad_states, one, 0, DIM, column, VALUE_DIM)
        next_one = one * kept_of(kept, 0, PIECE, DIM)
        if transitions is not None:
            next_one = moved_back(transitions, one, next_one, 0, 0, PIECE, DIM, UPCAST)
        if DIM > PIECE:
            store_block(grad_states, two, PIECE, DIM, column, VALUE_DIM)
            next_two = two * kept_of(kept, PIECE, PIECE, DIM)
            if transitions is not None:
                next_one = moved_back(transitions, two, next_one, 0, PIECE, PIECE, DIM, UPCAST)
                next_two = moved_back(transitions, one, next_two, PIECE, 0, PIECE, DIM, UPCAST)
                next_two = moved_back(transitions, two, next_two, PIECE, PIECE, PIECE, DIM, UPCAST)
            two = next_two
        one = next_one
        grad = load_tile(dy.pointer, start, there, dy.stride, column, VALUE_BLOCK, VALUE_DIM)
        if DOCUMENTS:
            later = there & (carried == 0)
            if grad_initial is not None:
                taken_one += tl.where(restart, one, 0.0)
                taken_one = gathered(reads, grad, taken_one, start, later, 0, PIECE, DIM, UPCAST)
                if DIM > PIECE:
                    taken_two += tl.where(restart, two, 0.0)
                    taken_two = gathered(reads, grad, taken_two, start, later, PIECE, PIECE, DIM, UPCAST)
            one = tl.where(restart, 0.0, one)
            two = tl.where(restart, 0.0, two)
        one = gathered(reads, grad, one, start, carried, 0, PIECE, DIM, UPCAST)
        if DIM > PIECE:
            two = gathered(reads, grad, two, start, carried, PIECE, PIECE, DIM, UPCAST)
        grad_states -= DIM * VALUE_DIM
        kept -= DIM
        if transitions is not None:
            transitions -= DIM * DIM
    if grad_carried is not None:
        grad_carried += sequence * (DIM * VALUE_DIM)
        store_block(grad_carried, one, 0, DIM, column, VALUE_DIM)
        if DIM > PIECE:
            store_block(grad_carried, two, PIECE, DIM, column, VALUE_DIM)
    else:
        taken_one += one
        if DIM > PIECE:
            taken_two += two
    if grad_initial is not None:
        grad_initial += sequence * (DIM * VALUE_DIM)
        store_block(grad_initial, taken_one, 0, DIM, column, VALUE_DIM)
        if DIM > PIECE:
            store_block(grad_initial, taken_two, PIECE, DIM, column, VALUE_DIM)
