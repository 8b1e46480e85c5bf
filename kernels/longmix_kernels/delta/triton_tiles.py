"""What the delta kernels do with a chunk: sums of decays, weights between its tokens, and the inverse those need.

Rows of a chunk are queries q and low-rank reads a; columns are keys k and low-rank writes b. Row i meets column j by
the decays after j up to i (a read: up to i - 1), exp2(G_i - G_j) with G the sums of decays in base 2. There are three
ways, which kernels take by the word `DECAY`:

    head       A head has one decay. The weights of a chunk are one matrix of products of decays, times products of
               rows and columns; any decay will do (`triton_head_pairs`).
    bounded    Each channel has its own. Both sides are scaled by exp2(+-(G - G_middle)), and their products are taken
               at once. The caller has promised a bound on the decays by which the exponents stay within +-100
               (`cost.SPAN`). Pairs that are not seen may overflow; a selection leaves them out, never a factor of 0.
    exact      Each channel has its own. Nothing is divided by, so any decay will do (`triton_exact_pairs`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.delta.triton_chunk import load_decay
from longmix_kernels.tiles import product, tile_places


class Sizes(NamedTuple):
    """Compile-time numbers of a kernel: head dimensions, the columns of a step, and how products are taken."""

    DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    BLOCK: tl.constexpr
    VALUE_BLOCK: tl.constexpr
    LOW: tl.constexpr
    PRECISION: tl.constexpr
    UPCAST: tl.constexpr


class Sums(NamedTuple):
    """Decays of a chunk's tokens in base 2, [CHUNK, BLOCK] or for one decay a head [CHUNK, 1], and sums of them.

    `total` is from the chunk's first token up to each token; `prefix` the same, but from the first token of the token's
    document on; `before` is that up to the token before; `suffix` is of all tokens after the token.
    """

    decay: tl.tensor
    total: tl.tensor
    prefix: tl.tensor
    before: tl.tensor
    suffix: tl.tensor


@triton.jit
def pair_mask(own, CHUNK: tl.constexpr, STRICT: tl.constexpr, TRANSPOSED: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return which columns rows see, [rows, columns] or `TRANSPOSED`; if `STRICT`, only earlier ones, not their own."""
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    row, column = (other, one) if TRANSPOSED else (one, other)
    mask = row > column if STRICT else row >= column
    if DOCUMENTS:
        mask = mask & (own[:, None] == own[None, :])
    return mask


@triton.jit
def masked_sum(mask, x, PRECISION: tl.constexpr):
    """Return for each row of the mask [CHUNK, CHUNK] the sum of the rows of x that it has, [CHUNK, BLOCK].

    No sum is a difference of larger ones.

    Three bfloat16 hold all bits of a float32, and one holds a mask's.
    """
    if PRECISION == "ieee":
        return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)
    else:
        chosen = mask.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        total = tl.dot(chosen, (rest - middle.to(tl.float32)).to(tl.bfloat16))
        return tl.dot(chosen, high, tl.dot(chosen, middle, total))


@triton.jit
def row_terms(mask, terms):
    """Return for each row of the mask [CHUNK, CHUNK] the sum [CHUNK] of the terms [CHUNK] that it has."""
    return tl.sum(tl.where(mask, terms[None, :], 0.0), 1)


@triton.jit
def rows_at(x, index, CHUNK: tl.constexpr):
    """Return rows of x [CHUNK, BLOCK] by their number [CHUNK], zero for numbers that no row has."""
    place = tl.broadcast_to(tl.minimum(tl.maximum(index, 0), CHUNK - 1)[:, None], x.shape)
    return tl.where(((index >= 0) & (index < CHUNK))[:, None], tl.gather(x, place, 0), 0.0)


@triton.jit
def neighbour(own, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Return the number [CHUNK] of the row before (`STEP` -1) or after (1) each row; -1 where that has another `own`.

    Rows that are moved by this stand for a second sum over them, which would need a mask of its own in registers.
    """
    one, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    found = (other == one + STEP) & (own[:, None] == own[None, :])
    return tl.sum(tl.where(found, other + 1, 0), 1) - 1


@triton.jit
def decay_sums(decay, own, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the `Sums` of decays [CHUNK, BLOCK], or [CHUNK, 1] if `DECAY` is "head"."""
    CHUNK: tl.constexpr = decay.shape[0]
    if DECAY == "bounded":
        total = tl.cumsum(decay, 0)
        prefix = total
        if DOCUMENTS:
            # Ids do not decrease: as many rows as have a smaller one come before the document.
            begins = tl.sum((own[None, :] < own[:, None]).to(tl.int32), 1)
            prefix = total - rows_at(total, begins - 1, CHUNK)
        before = prefix - decay
        suffix = tl.sum(decay, 0)[None, :] - total
    else:
        # A difference would lose small decays beside large ones.
        prefix = chosen_sum(pair_mask(own, CHUNK, False, False, DOCUMENTS), decay, PRECISION)
        if DECAY == "head":
            before = chosen_sum(pair_mask(own, CHUNK, True, False, DOCUMENTS), decay, PRECISION)
        else:
            before = rows_at(prefix, neighbour(own, -1, CHUNK), CHUNK)
        suffix = chosen_sum(pair_mask(own, CHUNK, True, True, False), decay, PRECISION)
        total = prefix
    return Sums(decay, total, prefix, before, suffix)


@triton.jit
def chosen_sum(mask, x, PRECISION: tl.constexpr):
    """Return the same as `masked_sum`, also for x [CHUNK, 1]."""
    if x.shape[1] == 1:
        return tl.sum(tl.where(mask, tl.trans(x), 0.0), 1)[:, None]
    else:
        return masked_sum(mask, x, PRECISION)


@triton.jit
def head_sums(chunk, own, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the `Sums` that hold for all columns where a head has one decay; nothing of use otherwise."""
    if DECAY == "head":
        return decay_sums(load_decay(chunk, 0, 1, 1), own, DECAY, DOCUMENTS, PRECISION)
    else:
        return Sums(chunk.there, chunk.there, chunk.there, chunk.there, chunk.there)


@triton.jit
def column_sums(of_head, chunk, own, column, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, SIZES: tl.constexpr):
    """Return the `Sums` of `BLOCK` columns: the head's, see `head_sums`, where all columns have the same."""
    if DECAY == "head":
        return of_head
    else:
        decay = load_decay(chunk, column, SIZES.BLOCK, SIZES.DIM)
        return decay_sums(decay, own, DECAY, DOCUMENTS, SIZES.PRECISION)


@triton.jit
def middle_of(total, CHUNK: tl.constexpr):
    """Return the sum up to the middle of a chunk, [1, BLOCK], from those up to each token."""
    return tl.sum(tl.where((tl.arange(0, CHUNK) == CHUNK // 2)[:, None], total, 0.0), 0)[None, :]


@triton.jit
def wide_product(a, b, total, LOW: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + a b of float32 factors up to 2 ** 100; for float16, which cannot hold those, in TF32."""
    if LOW == tl.float16:  # noqa: SIM300
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32")
    else:
        return product(a.to(LOW), b.to(LOW), total, UPCAST)


@triton.jit
def inverse_of(weights, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of 1 minus weights [CHUNK, CHUNK] that are zero but below the diagonal, in float32.

    Blocks of 16 by substitution, all at once; then pairs of neighbours are merged: ((P, 0), (X, R)) has the inverse
    (P', 0; R' X P', R'). Doubling the powers of the weights instead would lose 2 digits at 32 and all of them at 64
    where removal keys are alike.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    LEVELS: tl.constexpr = 4 + BLOCKS // 2
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    own = tl.where(row // 16 == column // 16, weights, 0.0)
    # [BLOCKS, 16, 16], the blocks on the diagonal.
    own = tl.sum(tl.reshape(own, [BLOCKS, 16, BLOCKS, 16]), 2)
    place = tl.arange(0, 16)
    found = tl.where((place[:, None] == place[None, :])[None, :, :], tl.full([BLOCKS, 16, 16], 1.0, tl.float32), 0.0)
    for index in range(1, 16):
        here = (place == index)[None, :, None]
        of_row = tl.sum(tl.where(here, own, 0.0), 1)
        found += tl.where(here, tl.sum(of_row[:, :, None] * found, 1)[:, None, :], 0.0)
    same = (tl.arange(0, BLOCKS)[:, None] == tl.arange(0, BLOCKS)[None, :])[:, None, :, None]
    found = tl.reshape(tl.where(same, found[:, :, None, :], 0.0), [CHUNK, CHUNK])
    # Two steps for each size, X P' and R' (X P'); all in one product, since two at once need too many registers.
    crossing = found
    for step in range(8, 2 * LEVELS):
        level, first = step // 2, step % 2 == 0
        below = (row >> level == (column >> level) + 1) & (row >> (level + 1) == column >> (level + 1))
        left = tl.where(first, tl.where(below, weights, 0.0), found)
        crossing = tl.dot(left, tl.where(first, found, crossing), input_precision=PRECISION)
        found = tl.where(first, found, found + crossing)
    return found


@triton.jit
def load_square(matrix, chunk, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Load the rows of a chunk of a contiguous [B, H, T, CHUNK], or the same `TRANSPOSED`."""
    own = matrix + chunk.sequence * chunk.length * CHUNK
    places = tile_places(own, chunk.start, CHUNK, 0, CHUNK, CHUNK)
    mask = chunk.there[:, None] & (tl.arange(0, CHUNK) < CHUNK)[None, :]
    if TRANSPOSED:
        places, mask = tl.trans(places), tl.trans(mask)
    return tl.load(places, mask=mask, other=0.0)
