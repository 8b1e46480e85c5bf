"""Exact causal attention with equal work for all slices: the first half of one with the last half of another.

A token's work grows with its place in the row, so the last of W slices would have almost twice the mean work. Cut into
halves, process r computes halves r and 2 W - 1 - r instead of its own two; together they see W + 1/2 slices of keys,
whatever r. Only queries and outputs move, and keys and values that later halves see go to all who compute one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longmix.distributed.exchange import Ranges, exchanged
from longmix.distributed.slices import Slices


def balanced(attend: Callable[[Tensor, int], Tensor], query: Tensor, slices: Slices) -> Tensor:
    """The attention of this process's queries; other processes compute half of it.

    Args:
        attend: the outputs [B, T / 2, ...] of some queries [B, T / 2, ...] of any slice, which are the last ones before
            a place in the row.
        query: [B, T, ...], T even.
        slices: what this process has of the rows.
    """
    halves = (slices.rank, 2 * slices.size - 1 - slices.rank)
    ends = [(half + 1) * slices.length // 2 for half in halves]
    outputs = [attend(x, end) for x, end in zip(_swapped(query, slices).chunk(2, 1), ends, strict=True)]
    return _swapped_back(torch.cat(outputs, 1), slices)


def rows_needed(x: Tensor, slices: Slices) -> Tensor:
    """Rows of `x` [B, T, ...], from the beginning of the row on, that any of the halves of this process sees."""
    ends = [(2 * slices.size - rank) * slices.length // 2 for rank in range(slices.size)]
    sent = [(0, _within(end, slices.rank, slices.length)) for end in ends]
    got = [_within(ends[slices.rank], rank, slices.length) for rank in range(slices.size)]
    return exchanged(x, sent, got, slices.group)


def _within(end: int, rank: int, length: int) -> int:
    """The number of a slice's rows that lie before a place in the row."""
    return min(length, max(0, end - rank * length))


def _computed_by(half: int, size: int) -> int:
    return min(half, 2 * size - 1 - half)


def _swapped(x: Tensor, slices: Slices) -> Tensor:
    """Exchange the two halves that this process holds, [B, T, ...], for the two that it computes."""
    middle, length = slices.length // 2, slices.length
    owners = [half // 2 for half in (slices.rank, 2 * slices.size - 1 - slices.rank)]
    got = [middle * owners.count(rank) for rank in range(slices.size)]
    to = [_computed_by(2 * slices.rank + place, slices.size) for place in (0, 1)]
    return exchanged(x, [_range(rank, to, middle, length) for rank in range(slices.size)], got, slices.group)


def _swapped_back(x: Tensor, slices: Slices) -> Tensor:
    """Exchange the two computed halves, [B, T, ...], for the two that this process holds."""
    middle, length = slices.length // 2, slices.length
    to = [half // 2 for half in (slices.rank, 2 * slices.size - 1 - slices.rank)]
    computed_by = [_computed_by(2 * slices.rank + place, slices.size) for place in (0, 1)]
    got = [middle * computed_by.count(rank) for rank in range(slices.size)]
    sent = [_range(rank, to, middle, length) for rank in range(slices.size)]
    halves = exchanged(x, sent, got, slices.group)
    # Rows arrive in order of rank. In the second half of the row, earlier processes compute later halves.
    return halves.roll(middle, 1) if computed_by[0] > computed_by[1] else halves


def _range(rank: int, to: list[int], middle: int, length: int) -> tuple[int, int]:
    """The rows of two halves that go to a process, when the halves go to the two processes `to`."""
    ranges: Ranges = [(0, 0), (middle, length), (0, middle), (0, length)]
    return ranges[2 * (to[0] == rank) + (to[1] == rank)]
