"""Find the parts of the score matrix that row bounds need: tiles of rows, and panels of keys inside a tile.

Because neither bound ever decreases, everything follows from the bounds of a tile's first and last row:

    keys seen by any row    [lo[first], hi[last])
    keys seen by every row  [lo[last], hi[first])

Nothing outside the first range is computed, and inside the second range no mask is needed.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from longmix_kernels.attention.pattern import BlockList


class Panel(NamedTuple):
    """The scores of a tile's rows against a run of keys.

    Attributes:
        keys: the keys.
        kind: "full" (every row sees every key), "causal" (a square in which row i sees keys up to i) or "masked".
    """

    keys: slice
    kind: str


class Tile(NamedTuple):
    """A block of query rows and the panels that together cover the keys it sees.

    A tile with `repeats` above 1 stands for that many tiles, as a sliding window needs them. The next one is further
    down by the rows of a tile, and further right by as many keys.
    """

    rows: slice
    panels: list[Panel]
    repeats: int = 1


@dataclass(frozen=True)
class TileSizes:
    """How finely to cut.

    Attributes:
        rows: how many query rows a tile has.
        masked_keys: the most keys of a masked panel. A tile that sees no more is one such panel; a wider one is split
            into an unmasked interior and masked edges, whose results are then merged.
        full_keys: the most keys of an unmasked panel; None for no limit.
        whole_rows: the least length of a segment of plain causal or full attention that is not cut at all; None to cut
            every segment.
        repeated_keys: the most keys that a tile and its repetitions see; a key counts as often as it is seen.
    """

    rows: int
    masked_keys: int
    full_keys: int | None
    whole_rows: int | None
    repeated_keys: int


def plan_tiles(lo: torch.Tensor, hi: torch.Tensor, sizes: TileSizes) -> Iterator[Tile]:
    """Yield the tiles that bounds need, in order of their rows. Rows that see nothing may be in no tile.

    Args:
        lo: int32 [Tq] on the CPU, the first key that a row sees; non-decreasing.
        hi: as `lo`, one past the last key.
        sizes: how finely to cut.
    """
    # In a run of rows where these counts stay the same, the bound of every row is one more than that of the row above.
    lo_jumps, hi_jumps = ([0, *(x[1:] - x[:-1] != 1).cumsum(0).tolist()] for x in (lo, hi))
    first_key, end_key = lo.tolist(), hi.tolist()
    for start, stop in _row_blocks(lo, sizes.rows):
        last = stop - 1
        constant = first_key[start] == first_key[last]
        grows = constant and hi_jumps[start] == hi_jumps[last] and end_key[start] > first_key[start]
        closed = grows or (constant and end_key[start] == end_key[last])
        whole = closed and sizes.whole_rows is not None and stop - start >= sizes.whole_rows
        row = start
        while row < stop:
            rows = slice(row, stop if whole else min(row + sizes.rows, stop))
            seen = slice(first_key[row], end_key[rows.stop - 1])
            shared = slice(first_key[rows.stop - 1], end_key[row])
            slides = min(bisect_right(x, x[row]) for x in (lo_jumps, hi_jumps))
            height, width = rows.stop - row, max(seen.stop - seen.start, 1)
            repeats = max(1, min((min(slides, stop) - row) // height, sizes.repeated_keys // width))
            if seen.start < seen.stop:
                yield Tile(rows, _panels(seen, shared, grows and whole, sizes), repeats)
            row += height * repeats


def plan_blocks(lo: torch.Tensor, hi: torch.Tensor, sizes: TileSizes, blocks: BlockList, keys: int) -> Iterator[Tile]:
    """Yield a tile for each block of rows, with those keys that its rows see and that are in listed blocks.

    Args:
        lo, hi, sizes: as in `plan_tiles`.
        blocks: the lists; `keys - Tq` is a multiple of their size.
        keys: how many keys there are, Tk.
    """
    offsets, listed = blocks.row_offsets.tolist(), blocks.row_blocks.tolist()
    first_key, end_key = lo.tolist(), hi.tolist()
    for row in range(0, lo.shape[0], blocks.size):
        rows = slice(row, min(row + blocks.size, lo.shape[0]))
        block = (row + keys - lo.shape[0]) // blocks.size
        seen = slice(first_key[row], end_key[rows.stop - 1])
        shared = slice(first_key[rows.stop - 1], end_key[row])
        panels = [
            panel
            for run in _runs(listed[offsets[block] : offsets[block + 1]], blocks.size)
            for panel in _panels(_common(run, seen), _common(run, shared), False, sizes)
        ]
        if panels:
            yield Tile(rows, panels)


def _runs(listed: list[int], size: int) -> Iterator[slice]:
    """Yield the keys of ascending blocks, those of adjacent blocks together."""
    start = 0
    for index, block in enumerate(listed):
        if index + 1 == len(listed) or listed[index + 1] != block + 1:
            yield slice(listed[start] * size, (block + 1) * size)
            start = index + 1


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _row_blocks(lo: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row, and one past the last, of parts that begin and end where a long run of equal `lo` does.

    So no tile straddles two long segments.
    """
    length = lo.shape[0]
    begins = torch.cat([lo.new_ones(1, dtype=torch.bool), lo[1:] != lo[:-1]]).nonzero().squeeze(-1)
    ends = torch.cat([begins[1:], begins.new_tensor([length])])
    long = ends - begins >= rows // 2
    done = 0
    for start, stop in zip(begins[long].tolist(), ends[long].tolist(), strict=True):
        if done < start:
            yield done, start
        yield start, stop
        done = stop
    if done < length:
        yield done, length


def _panels(seen: slice, shared: slice, causal_whole: bool, sizes: TileSizes) -> list[Panel]:
    """Return the panels that cover the keys `seen` by a tile; every row sees those in `shared`."""
    if causal_whole:
        # Rows and keys past the shared ones form a square whose diagonal starts at the last shared key.
        shared = slice(shared.start, shared.stop - 1)
        square = [Panel(slice(shared.stop, seen.stop), "causal")]
        return square + _split(shared, "full", sizes.full_keys)
    if seen == shared:
        return _split(seen, "full", sizes.full_keys)
    if seen.stop - seen.start <= sizes.masked_keys or shared.start >= shared.stop:
        return _split(seen, "masked", sizes.masked_keys)
    return [
        *_split(shared, "full", sizes.full_keys),
        *_split(slice(seen.start, shared.start), "masked", sizes.masked_keys),
        *_split(slice(shared.stop, seen.stop), "masked", sizes.masked_keys),
    ]


def _split(keys: slice, kind: str, longest: int | None) -> list[Panel]:
    step = longest or max(keys.stop - keys.start, 1)
    return [Panel(slice(k, min(k + step, keys.stop)), kind) for k in range(keys.start, keys.stop, step)]
