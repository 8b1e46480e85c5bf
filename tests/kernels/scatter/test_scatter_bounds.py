"""Which blocks of queries see keys through features, against a list of them made document by document."""

import random

import pytest
import torch

from longmix_kernels.scatter.bounds import exact_bounds, read_blocks


def listed(ids: list[int], queries: int, size: int, past: int, with_state: bool) -> dict[int, tuple[int, ...]]:
    """By slot, what `read_blocks` says of it."""
    keys, found, start = len(ids), {}, 0
    offset = keys - queries
    for stop in range(1, keys + 1):
        if stop < keys and ids[stop] == ids[start]:
            continue
        goes_on = with_state and start <= offset < stop
        for number, row in enumerate(range(start, stop, size)):
            if stop <= offset or (number <= past and not goes_on):
                continue
            slot, end = row // min(size, keys), min(row + size, stop)
            assert slot not in found, "two blocks have one slot"
            begins = 2 * (number == 0) if goes_on else int(number == past + 1)
            key_row = row - (past + 1) * size if number > past else -1
            found[slot] = max(row - offset, 0), max(end - offset, 0), key_row, begins
        start = stop
    return found


def test_no_document_is_one_for_all_rows():
    blocks = read_blocks(None, 20, 20, 4, 1, False, torch.device("cpu"))
    assert blocks.dtype == torch.int32
    nothing = [0, 0, -1, 0]
    assert blocks.tolist() == [[nothing, nothing, [8, 12, 0, 1], [12, 16, 4, 0], [16, 20, 8, 0]]]


@pytest.mark.parametrize("with_state", [False, True], ids=["plain", "state"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_every_block_has_a_slot_of_its_own(size, with_state):
    draw = random.Random(size)
    for _ in range(40):
        keys = draw.randint(1, 60)
        queries, past, often = draw.randint(1, keys), draw.randint(0, 3), draw.choice([0.03, 0.3])
        rows = [[0], [5]]
        for ids in rows:
            for _ in range(keys - 1):
                ids.append(ids[-1] + (draw.random() < often))
        blocks = read_blocks(torch.tensor(rows), queries, keys, size, past, with_state, torch.device("cpu"))
        assert blocks.shape == (2, -(-keys // min(size, keys)), 4)
        for ids, slots in zip(rows, blocks.tolist(), strict=True):
            wanted = listed(ids, queries, size, past, with_state)
            assert slots == [list(wanted.get(slot, (0, 0, -1, 0))) for slot in range(len(slots))]


def test_what_is_not_exact_is_read_in_blocks():
    """Every pair of a query and an earlier key of its document is seen once: exactly, or through a block's sums."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([9, 2, 23, 6]))[None]
    queries, keys, size, past = 31, 40, 4, 1
    offset = keys - queries
    first, lo, _ = (x[0, 0] for x in exact_bounds(ids, queries, keys, size, past, ids.device))
    seen: dict[int, set[int]] = {}
    carried: set[int] = set()
    for begin, end, key_row, begins in read_blocks(ids, queries, keys, size, past, False, ids.device)[0].tolist():
        carried = set() if begins else carried
        carried = carried | (set(range(key_row, key_row + size)) if key_row >= 0 else set())
        seen |= dict.fromkeys(range(begin, end), carried)
    for query in range(queries):
        assert seen.get(query, set()) == set(range(int(first[query]), int(lo[query]))), query + offset
