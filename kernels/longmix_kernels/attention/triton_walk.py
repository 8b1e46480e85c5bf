"""Find the tiles of the score matrix that a program visits: the bounds of its tile, and the steps that cover them.

A tile of rows walks along the other axis of the score matrix in steps. `MODE` says where the bounds come from:

    "full"       every row sees every key                                         nothing is read
    "causal"     row i, at position p = i + keys - queries, sees keys up to p     nothing is read
    "window"     as causal, and at most `window` keys                             nothing is read
    "documents"  as causal, from the first key `lo` on (a window is in `lo`)      one int32 per row is read
    "bounds"     `lo` and `hi`                                                    two int32 per row are read

With a block list (`BLOCK` > 0) the walk goes through listed blocks only, laid end to end. A *place* on the walk counts
positions in these blocks alone. Every tile lies within one block, so that no step straddles two.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Walk(NamedTuple):
    """Steps that cover what a tile sees; with a block list, all but `stop` are places on the walk.

    Attributes:
        begin: where the steps begin.
        leading: the number of steps on the leading edge.
        full_start, full: where the steps without a mask begin, and their number.
        trailing_start, trailing: where the trailing edge begins, and its number of steps.
        stop: one past the last row or key that is seen.
    """

    begin: tl.tensor
    leading: tl.tensor
    full_start: tl.tensor
    full: tl.tensor
    trailing_start: tl.tensor
    trailing: tl.tensor
    stop: tl.tensor


@triton.jit
def keys_of_rows(lo, hi, rows, inside, queries, keys, window, MODE: tl.constexpr):
    """Return the first key, and one past the last, that each of `rows` sees; a row that is not `inside` sees none.

    `lo` and `hi` point to the first row of the head's bounds.
    """
    if MODE == "bounds":
        end = tl.load(hi + rows, mask=inside, other=0)
    elif MODE == "full":
        end = tl.where(inside, keys, 0)
    else:
        end = tl.where(inside, tl.maximum(rows + (keys - queries) + 1, 0), 0)
    if MODE == "bounds" or MODE == "documents":
        first = tl.load(lo + rows, mask=inside, other=0)
    elif MODE == "window":
        first = tl.maximum(end - window, 0)
    else:
        first = end * 0
    return first, end


@triton.jit
def rows_of_keys(first_row, end_row, columns, inside, queries, keys, window, MODE: tl.constexpr):
    """Return the first row, and one past the last, that sees each key of `columns`; no row sees one not `inside`.

    `first_row` and `end_row` point to the bounds of the head's first key, as `key_bounds` transposes them.
    """
    if MODE == "bounds":
        first = tl.load(first_row + columns, mask=inside, other=0)
    elif MODE == "full":
        first = tl.where(inside, columns * 0, 0)
    else:
        first = tl.where(inside, tl.maximum(columns - (keys - queries), 0), 0)
    if MODE == "bounds" or MODE == "documents":
        end = tl.load(end_row + columns, mask=inside, other=0)
    elif MODE == "window":
        end = tl.where(inside, tl.minimum(columns - (keys - queries) + window, queries), 0)
    else:
        end = tl.where(inside, queries, 0)
    return first, end


@triton.jit
def block_list(offsets, blocks, block):
    """Return the blocks that the list has for a block, a pointer, and how many these are."""
    offsets += block
    return blocks + tl.load(offsets), tl.load(offsets + 1) - tl.load(offsets)


@triton.jit
def cover(begin, full_begin, full_end, end, position, listed, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Cover [begin, end) by steps of `STEP`. Steps inside [full_begin, full_end) need no mask.

    With a list of `count` blocks, `listed`, the steps cover only positions in these blocks, and row or key 0 stands at
    `position`.
    """
    stop = end
    if BLOCK > 0:
        begin = listed_before(begin + position, listed, count, BLOCK) // STEP * STEP
        full_begin = listed_before(full_begin + position, listed, count, BLOCK)
        full_end = listed_before(full_end + position, listed, count, BLOCK)
        end = listed_before(end + position, listed, count, BLOCK)
    leading = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), STEP)
    full_start = begin + leading * STEP
    full = tl.maximum(full_end - full_start, 0) // STEP
    trailing_start = full_start + full * STEP
    trailing = tl.cdiv(tl.maximum(end - trailing_start, 0), STEP)
    return Walk(begin, leading, full_start, full, trailing_start, trailing, stop)


@triton.jit
def cover_keys(
    lo,
    hi,
    start,
    queries,
    keys,
    window,
    listed,
    count,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the walk along the keys of `ROWS` rows from `start` on, and the bounds of each row as `keys_of_rows`."""
    rows = start + tl.arange(0, ROWS)
    last = tl.minimum(start + ROWS, queries) - 1
    begin, full_end = keys_of_rows(lo, hi, start, start < queries, queries, keys, window, MODE)
    full_begin, end = keys_of_rows(lo, hi, last, last < queries, queries, keys, window, MODE)
    walk = cover(begin, full_begin, full_end, end, 0, listed, count, KEYS, BLOCK)
    first_key, end_key = keys_of_rows(lo, hi, rows, rows < queries, queries, keys, window, MODE)
    return walk, first_key, end_key


@triton.jit
def listed_before(position, listed, count, BLOCK: tl.constexpr):
    """Return how many positions before this one are in listed blocks, by a binary search: the list ascends."""
    block = position // BLOCK
    left = position * 0
    # Before position 0 there is nothing to search for.
    right = tl.where(position > 0, count, 0)
    while left < right:
        middle = (left + right) // 2
        below = tl.load(listed + middle) < block
        left = tl.where(below, middle + 1, left)
        right = tl.where(below, right, middle)
    found = tl.load(listed + left, mask=left < count, other=-1)
    return left * BLOCK + tl.where(found == block, position % BLOCK, 0)


@triton.jit
def step_start(step, walk, position, listed, STEP: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Return the row or key at which a step begins.

    The count of edge steps runs through the leading edge and goes on along the trailing one.
    """
    if EDGE:
        trailing = walk.trailing_start + (step - walk.leading) * STEP
        start = tl.where(step < walk.leading, walk.begin + step * STEP, trailing)
    else:
        start = walk.full_start + step * STEP
    if BLOCK > 0:
        start = tl.load(listed + start // BLOCK) * BLOCK + start % BLOCK - position
    return start


@triton.jit
def is_visible(first, end, places):
    """Return whether each place [N] lies from `first` [M] on and before `end` [M], [M, N]."""
    return (first[:, None] <= places[None, :]) & (places[None, :] < end[:, None])
