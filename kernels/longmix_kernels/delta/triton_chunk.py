"""What a program of the delta kernels works on: one chunk of one head, as tuples that all its functions take.

Rows past the end of a sequence have zero keys, values and decays, and belong to its last document.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.tiles import Rows, head_rows, load_tile, program_head, store_tile


class Decays(NamedTuple):
    """A head's log decays [T, DIM], or [T] with a column stride of 0; a smaller one than `floor` counts as that."""

    pointer: tl.tensor
    stride: tl.tensor
    stride_column: tl.tensor
    floor: tl.tensor


class Chunk(NamedTuple):
    """One chunk of one head.

    Attributes:
        place: its number among the chunks of all heads.
        batch, head: what it belongs to.
        sequence: the number of its head among those of all batch rows.
        first: the place of the head's first token in a contiguous [B, T, H].
        start: its first token.
        length: how many tokens the sequence has.
        there: [CHUNK], which of its tokens there are.
        query, key, value: of the head.
        read, write: low-rank reads and writes; without any, keys.
        decays: of the head.
    """

    place: tl.tensor
    batch: tl.tensor
    head: tl.tensor
    sequence: tl.tensor
    first: tl.tensor
    start: tl.tensor
    length: tl.tensor
    there: tl.tensor
    query: Rows
    key: Rows
    value: Rows
    read: Rows
    write: Rows
    decays: Decays


class ChunkEnds(NamedTuple):
    """The states at both ends of a chunk and its gradients.

    Attributes:
        initial: the head's initial state; without any, of no meaning.
        state: what enters the chunk.
        grad_state: of what leaves it.
        dy: the head's gradients of outputs.
        u, dx: what is removed, and its gradient; without low-rank reads, values and `dy`.
        own, carried, held, later, restart: what documents mean for its tokens, see `documents_of`.
    """

    initial: tl.tensor
    state: tl.tensor
    grad_state: tl.tensor
    dy: Rows
    u: Rows
    dx: Rows
    own: tl.tensor
    carried: tl.tensor
    held: tl.tensor
    later: tl.tensor
    restart: tl.tensor


@triton.jit
def chunk_of(tokens, length, heads, CHUNK: tl.constexpr):
    """Return the `Chunk` of this program, from the `launch.Tokens` of a call."""
    chunk, batch, head = program_head(tl.cdiv(length, CHUNK), heads)
    start = chunk * CHUNK
    there = start + tl.arange(0, CHUNK) < length
    sequence = batch * heads + head
    place = sequence * tl.cdiv(length, CHUNK) + chunk
    first = batch * length * heads + head
    decays = head_rows(tokens.log_decay, batch, head)
    decays = Decays(decays.pointer, decays.stride, tokens.stride_decay_column, tokens.floor)
    query, key = head_rows(tokens.query, batch, head), head_rows(tokens.key, batch, head)
    value = head_rows(tokens.value, batch, head)
    read, write = key, key
    if tokens.low_rank_read is not None:
        read, write = head_rows(tokens.low_rank_read, batch, head), head_rows(tokens.low_rank_write, batch, head)
    return Chunk(place, batch, head, sequence, first, start, length, there, query, key, value, read, write, decays)


@triton.jit
def documents_of(tokens, chunk):
    """Return what documents mean for the tokens of a chunk.

    Returns:
        The document of each; which read the entering state; which the leaving state holds; which read the initial
        state; and whether a document begins within the chunk.
    """
    CHUNK: tl.constexpr = chunk.there.shape[0]
    there = chunk.there
    own, carried, held, restart = tl.zeros([CHUNK], tl.int32), there, there, chunk.start < 0
    if tokens.document_ids is not None:
        ids = tokens.document_ids + chunk.batch * chunk.length
        last, rows = tl.minimum(chunk.start + CHUNK, chunk.length) - 1, chunk.start + tl.arange(0, CHUNK)
        first_id, last_id = tl.load(ids + chunk.start), tl.load(ids + last)
        own = tl.where(there, tl.load(ids + rows, mask=there, other=0), last_id)
        carried, held, restart = there & (own == first_id), there & (own == last_id), first_id != last_id
    return own, carried, held, there & (carried == 0), restart


@triton.jit
def ends_of(tokens, ends, chunk, SIZES: tl.constexpr):
    """Return the `ChunkEnds` of a chunk, from the `launch.Ends` of a call."""
    place = chunk.place * (SIZES.DIM * SIZES.VALUE_DIM)
    state, grad_state = ends.states + place, ends.grad_states + place
    dy = head_rows(ends.grad_output, chunk.batch, chunk.head)
    u, dx = chunk.value, dy
    if ends.removed is not None:
        u = Rows(ends.removed + chunk.sequence * chunk.length * SIZES.VALUE_DIM, SIZES.VALUE_DIM)
        dx = Rows(ends.grad_removed + chunk.sequence * chunk.length * SIZES.VALUE_DIM, SIZES.VALUE_DIM)
    initial = ends.states
    if ends.initial is not None:
        initial = ends.initial + chunk.sequence * (SIZES.DIM * SIZES.VALUE_DIM)
    own, carried, held, later, restart = documents_of(tokens, chunk)
    return ChunkEnds(initial, state, grad_state, dy, u, dx, own, carried, held, later, restart)


@triton.jit
def load_columns(rows, chunk, column, SIZES: tl.constexpr):
    """Load [CHUNK, BLOCK] of a head's keys, or of what has their dimension."""
    return load_tile(rows.pointer, chunk.start, chunk.there, rows.stride, column, SIZES.BLOCK, SIZES.DIM)


@triton.jit
def load_values(rows, chunk, column, SIZES: tl.constexpr):
    """Load [CHUNK, VALUE_BLOCK] of a head's values, or of what has their dimension."""
    return load_tile(rows.pointer, chunk.start, chunk.there, rows.stride, column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM)


@triton.jit
def load_stored_columns(matrix, chunk, heads, column, SIZES: tl.constexpr):
    """Load what `store_columns` stored."""
    own = matrix + chunk.first * SIZES.DIM
    return load_tile(own, chunk.start, chunk.there, heads * SIZES.DIM, column, SIZES.BLOCK, SIZES.DIM)


@triton.jit
def store_columns(matrix, tile, chunk, heads, column, SIZES: tl.constexpr):
    """Store [CHUNK, BLOCK] of a contiguous [B, T, H, DIM]."""
    own = matrix + chunk.first * SIZES.DIM
    store_tile(own, tile, chunk.start, chunk.there, heads * SIZES.DIM, column, SIZES.BLOCK, SIZES.DIM)


@triton.jit
def store_values(matrix, tile, chunk, heads, column, SIZES: tl.constexpr):
    """Store [CHUNK, VALUE_BLOCK] of a contiguous [B, T, H, VALUE_DIM]."""
    own = matrix + chunk.first * SIZES.VALUE_DIM
    store_tile(own, tile, chunk.start, chunk.there, heads * SIZES.VALUE_DIM, column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM)


@triton.jit
def load_decay(chunk, column, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Load [CHUNK, BLOCK] log decays of a head, in base 2; 0 where there is none."""
    decays = chunk.decays
    rows = (chunk.start + tl.arange(0, chunk.there.shape[0])).to(tl.int64)
    columns = column + tl.arange(0, BLOCK)
    places = decays.pointer + rows[:, None] * decays.stride + columns[None, :] * decays.stride_column
    decay = tl.load(places, mask=chunk.there[:, None] & (columns < DIM)[None, :], other=0.0)
    return tl.maximum(decay, decays.floor) * 1.4426950408889634
