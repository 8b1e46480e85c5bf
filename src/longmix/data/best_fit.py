"""Best-fit decreasing: documents into windows of one length, so that none is cut and few windows are needed."""

import numpy as np

BITS = 1024
"""Spaces that one integer tells apart."""


class _Spaces:
    """The open windows by the space that they have left, and the smallest space that is large enough."""

    def __init__(self, most: int) -> None:
        self.windows: dict[int, list[int]] = {}
        self._blocks = [0] * (most // BITS + 1)
        self._used = 0

    def add(self, space: int, numbers: list[int]) -> None:
        """Windows with this space left; full ones are left out."""
        if not space or not numbers:
            return
        held = self.windows.setdefault(space, [])
        if not held:
            block, bit = divmod(space, BITS)
            self._blocks[block] |= 1 << bit
            self._used |= 1 << block
        held += numbers

    def take(self, space: int, count: int) -> list[int]:
        """The `count` latest windows with this space."""
        held = self.windows[space]
        taken = held[-count:]
        del held[-count:]
        if not held:
            block, bit = divmod(space, BITS)
            self._blocks[block] ^= 1 << bit
            if not self._blocks[block]:
                self._used ^= 1 << block
        return taken

    def smallest(self, least: int) -> int | None:
        """The smallest space of a window, at least `least`; None if no window has that much."""
        block, bit = divmod(least, BITS)
        here = self._blocks[block] >> bit
        if here:
            return least + _lowest(here)
        later = self._used >> (block + 1)
        if not later:
            return None
        block += 1 + _lowest(later)
        return block * BITS + _lowest(self._blocks[block])


def _lowest(bits: int) -> int:
    """The number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The number of the window that each document goes to: the one with the least space that is enough, or a new one.

    Equally long documents are placed together: a window that takes one is still the best for the next, as long as it
    has the space. So a million documents take about a second.

    Args:
        lengths: of the documents, descending, each from 1 to `room`, int64 [n].
        room: tokens of a window.

    Returns:
        int64 [n]; windows are numbered from 0 without gaps.
    """
    found = np.empty(len(lengths), np.int64)
    spaces = _Spaces(room)
    opened = 0
    firsts = np.flatnonzero(np.diff(lengths, prepend=room + 1))
    counts = np.diff(firsts, append=len(lengths))
    for length, place, count in zip(lengths[firsts].tolist(), firsts.tolist(), counts.tolist(), strict=True):
        while count:
            space = spaces.smallest(length)
            if space is None:
                space, needed = room, -(-count // (room // length))
                spaces.add(room, list(range(opened + needed - 1, opened - 1, -1)))
                opened += needed
            each = min(space // length, count)
            taken = spaces.take(space, min(len(spaces.windows[space]), count // each))
            placed = each * len(taken)
            found[place : place + placed] = taken[0] if len(taken) == 1 else np.repeat(taken, each)
            spaces.add(space - each * length, taken)
            place, count = place + placed, count - placed
    return found
