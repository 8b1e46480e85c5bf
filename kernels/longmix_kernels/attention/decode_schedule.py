"""Divide the keys of a decoding step evenly among programs, whatever the lengths of rows.

This is the schedule of LeanAttention (arXiv 2405.10480), for rows of any lengths and without its locks. The keys of
each row and head are cut into tiles, and all tiles of a segment are dealt out to the programs in order, so that their
numbers differ by one at most. An item is a run of tiles of one row and head that one program takes. Its partial result
is the part of its number. Lists depend on numbers that the host knows, and change only where the end of a row
passes a multiple of a tile. Tensors on the device may end rows earlier.

All sizes of the lists depend on shapes alone, so a CUDA graph can go on with lists that are rewritten in place.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ITEM = 4
"""The numbers of an item: row and tile of query rows, key head, first tile of keys, and one past the last."""

HEAD = 8
"""The numbers that lists begin with for each segment; `Layout.lists` has their order."""

Span = tuple[int, int]
"""The first slot that may hold a key, and one past the last."""


class WorkList(NamedTuple):
    """Which program takes which tiles.

    Attributes:
        items: group of keys, first tile, and one past the last, in the order of groups.
        program_offsets: where the items of each program begin, and their number at the end.
        group_offsets: where the items of each group begin, and their number at the end.
    """

    items: list[tuple[int, int, int]]
    program_offsets: list[int]
    group_offsets: list[int]


def work_list(tiles: Sequence[Span], programs: int) -> WorkList:
    """Deal out tiles to programs: each takes a run of all tiles, and the first ones one more than the others.

    Args:
        tiles: the first tile of each group, and one past its last.
        programs: how many programs there are.

    Returns:
        The list. It has fewer items than groups and programs together.
    """
    total = sum(end - first for first, end in tiles)
    least, more = divmod(total, programs)
    items: list[tuple[int, int, int]] = []
    program_offsets, group_offsets = [0], [0]
    room = least + (more > 0)
    for group, (first, end) in enumerate(tiles):
        while first < end:
            taken = min(room, end - first)
            items.append((group, first, first + taken))
            first, room = first + taken, room - taken
            if room == 0:
                program_offsets.append(len(items))
                room = least + (len(program_offsets) <= more)
        group_offsets.append(len(items))
    program_offsets += [len(items)] * (programs + 1 - len(program_offsets))
    return WorkList(items, program_offsets, group_offsets)


@dataclass(frozen=True)
class SegmentShape:
    """What lists depend on besides the lengths of rows.

    Attributes:
        batch: rows of keys, or of an index into them.
        key_heads: Hk.
        repeats: how many rows of queries share a row of keys.
        rows: query rows that read the keys of one row and head: T * G * repeats.
        tile_rows: query rows of a tile.
        tile_keys: keys of a tile.
    """

    batch: int
    key_heads: int
    repeats: int
    rows: int
    tile_rows: int
    tile_keys: int

    @property
    def row_tiles(self) -> int:
        """Return how many tiles the query rows of one head make."""
        return -(-self.rows // self.tile_rows)

    @property
    def height(self) -> int:
        """Return how many rows a part has."""
        return min(self.rows, self.tile_rows)

    @property
    def groups(self) -> int:
        """Return how many runs of keys are cut into tiles: one for each row, tile of query rows and key head."""
        return self.batch * self.row_tiles * self.key_heads

    def tiles(self, spans: Sequence[Span]) -> list[Span]:
        """Return the tiles of each group.

        Args:
            spans: the slots of all keys, of each row [batch], or of each row and head [batch * key_heads].

        Raises:
            ValueError: there is another number of spans.
        """
        if len(spans) not in (1, self.batch, self.batch * self.key_heads):
            allowed = f"1, {self.batch} or {self.batch * self.key_heads}"
            raise ValueError(f"schedule got {len(spans)} lengths; allowed are {allowed}, of rows or of rows and heads")
        heads = self.key_heads if len(spans) == self.batch * self.key_heads else 1
        rows = [spans[place : place + heads] for place in range(0, len(spans), heads)]
        rows = rows * (self.batch // len(rows))
        size = self.tile_keys
        cut = [[(first // size, max(-(-end // size), first // size)) for first, end in row] for row in rows]
        return [span for row in cut for _ in range(self.row_tiles) for span in row * (self.key_heads // heads)]


class Places(NamedTuple):
    """Where the parts of a segment's lists begin in the lists of all, and its parts among the rows of all parts."""

    items: int
    programs: int
    groups: int
    parts: int


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the lists of a call; it depends on shapes alone.

    Attributes:
        segments: the shape of each segment.
        programs: how many programs each segment's kernel is launched with.
    """

    segments: tuple[SegmentShape, ...]
    programs: int

    @property
    def places(self) -> list[Places]:
        """Return the places of each segment."""
        return self._measured[0]

    @property
    def size(self) -> int:
        """Return how many numbers the lists have."""
        return self._measured[1]

    @property
    def part_rows(self) -> int:
        """Return how many rows the parts of all segments have."""
        return self._measured[2]

    @functools.cached_property
    def _measured(self) -> tuple[list[Places], int, int]:
        found, end, rows = [], HEAD * len(self.segments), 0
        for segment in self.segments:
            most = segment.groups + self.programs
            programs = end + ITEM * most
            found.append(Places(end, programs, programs + self.programs + 1, rows))
            end = programs + self.programs + 1 + segment.groups + 1
            rows += most * segment.height
        return found, end, rows

    def lists(self, spans: Sequence[Sequence[Span]]) -> list[int]:
        """Return the lists as one run of numbers, for an int32 tensor.

        Args:
            spans: of each segment the slots of its rows, as `SegmentShape.tiles` takes them.
        """
        places, size, _ = self._measured
        numbers = [0] * size
        for index, (segment, place) in enumerate(zip(self.segments, places, strict=True)):
            shape = segment.repeats, segment.row_tiles, segment.tile_rows, segment.height
            numbers[HEAD * index : HEAD * (index + 1)] = *shape, place.groups, place.parts, 0, 0
            work = work_list(segment.tiles(spans[index]), self.programs)
            items = [x for group, *run in work.items for x in (*divmod(group, segment.key_heads), *run)]
            for start, part in zip(place[:3], (items, work.program_offsets, work.group_offsets), strict=True):
                numbers[start : start + len(part)] = part
        return numbers


class Schedule:
    """The lists of a step on its device, which can be rewritten in place for the next one.

    Attributes:
        layout: where everything lies in the lists.
        lists: the lists, int32 [layout.size].
    """

    def __init__(self, layout: Layout, spans: Sequence[Sequence[Span]], device: torch.device) -> None:
        self.layout = layout
        self.lists = torch.tensor(layout.lists(spans), dtype=torch.int32).to(device)
        self._tiles = self._tiles_of(spans)

    def update(self, spans: Sequence[Sequence[Span]]) -> bool:
        """Rewrite the lists for other lengths, and return whether that took a copy to the device.

        It takes none as long as no row passes a multiple of a tile.

        Args:
            spans: of each segment the slots of its rows, as `SegmentShape.tiles` takes them.
        """
        tiles = self._tiles_of(spans)
        if tiles == self._tiles:
            return False
        self.lists.copy_(torch.tensor(self.layout.lists(spans), dtype=torch.int32))
        self._tiles = tiles
        return True

    def _tiles_of(self, spans: Sequence[Sequence[Span]]) -> list[list[Span]]:
        return [segment.tiles(own) for segment, own in zip(self.layout.segments, spans, strict=True)]
