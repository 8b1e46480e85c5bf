"""Find the keys that a query row sees exactly, and those it sees through features, from documents and blocks alone.

A document is cut into blocks of C tokens, counted from its own beginning. A query in block n sees the keys of blocks
n - P .. n exactly, up to its own, and the keys of earlier blocks of its document through their features. So its exact
keys are a run of rows that begins at `lo`, and the others lie between the first row of the document and `lo`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from longmix_kernels.attention import positions_from_document_ids


def exact_bounds(
    document_ids: torch.Tensor | None,
    queries: int,
    keys: int,
    block_size: int,
    past_blocks: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the bounds of the last `queries` of `keys` rows.

    Args:
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; None if each row is one document.
        queries: how many query rows there are, Tq.
        keys: how many key rows there are, Tk.
        block_size: tokens of a block, C.
        past_blocks: whole blocks before its own that a query sees exactly, P.
        device: the device of the bounds.

    Returns:
        `first`, `lo` and `hi`, int32 [B or 1, 1, Tq]: the first row of the document, the first exact key, and one past
        the last exact key.
    """
    row = torch.arange(keys, dtype=torch.int32, device=device)[None]
    position = row if document_ids is None else positions_from_document_ids(document_ids)
    first = row - position
    lo = first + (position // block_size - past_blocks).clamp_(min=0) * block_size
    return tuple(x[:, None, keys - queries :].contiguous() for x in (first, lo, row.expand_as(lo) + 1))  # type: ignore


def read_blocks(
    document_ids: torch.Tensor | None,
    queries: int,
    keys: int,
    block_size: int,
    past_blocks: int,
    with_state: bool,
    device: torch.device,
) -> torch.Tensor:
    """Return the table of blocks whose queries see keys through features, without waiting for the device.

    A block that begins at key row r has slot r // C, which no other such block of its batch row has. The reason: blocks
    of a document begin C rows apart, and the first block of a document sees no keys through features. The one exception
    goes on from the initial state, and there is no block before it.

    Args:
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; None if each row is one document.
        queries, keys: how many query and key rows there are, Tq and Tk.
        block_size: tokens of a block, C.
        past_blocks: whole blocks before its own that a query sees exactly, P.
        with_state: whether an initial state stands before the document of each row's first query.
        device: the device of the table.

    Returns:
        int32 [B or 1, slots, 4]. The columns are the first query row of the slot's block; one past the last (both 0 if
        there are none); the first row of the C keys that this block is the first to see through features, or -1; and
        how the sums before the block begin: 0 with those of the block before, 1 with nothing, 2 with the initial state.
    """
    size, exact = min(block_size, keys), min((past_blocks + 1) * block_size, keys)
    row = torch.arange(keys, dtype=torch.int32, device=device)[None]
    first, end = torch.zeros_like(row), torch.full_like(row, keys)
    if document_ids is not None:
        ids = document_ids.contiguous()
        first, end = (torch.searchsorted(ids, ids, right=right, out_int32=True) for right in (False, True))
    offset = keys - queries
    goes_on = (first <= offset) & with_state  # documents that end before it are left out by `is_read`
    position = row - first
    is_read = (position % size == 0) & (end > offset) & ((position >= exact) | goes_on)
    start = F.pad(torch.where(is_read, row, -1), (0, -keys % size), value=-1).unflatten(1, (-1, size)).amax(-1)
    there, place = start >= 0, start.clamp(min=0).long()
    position, end, goes_on = (x.gather(1, place) for x in (position, end, goes_on))
    begins = torch.where(goes_on, 2 * (position == 0), (position == exact).int())
    columns = (
        (start - offset).clamp(min=0),
        (torch.minimum(start + size, end) - offset).clamp(min=0) * there,
        torch.where(position >= exact, start - exact, -1),  # absent blocks have row 0, whose position 0 gives -1
        begins * there,
    )
    return torch.stack([x.int() for x in columns], -1)


class Span(NamedTuple):
    """One document of which some queries see keys through features.

    Attributes:
        batch: the batch rows that have this document.
        start, stop: its first key row, and one past the last.
        with_state: whether an initial state stands before it.
    """

    batch: slice
    start: int
    stop: int
    with_state: bool


def spans(
    document_ids: torch.Tensor | None, batch: int, queries: int, keys: int, exact: int, with_state: bool
) -> Iterator[Span]:
    """Yield the documents that have far keys.

    Args:
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; None if each row is one document.
        batch, queries, keys: how many batch, query and key rows there are, B, Tq and Tk.
        exact: how many tokens of a document a query may see exactly, (P + 1) * C; a longer document has far keys.
        with_state: whether an initial state stands before the document of each row's first query.
    """
    if document_ids is None:
        if keys > exact or with_state:
            yield Span(slice(0, batch), 0, keys, with_state)
        return
    first_query = keys - queries
    for row, ids in enumerate(document_ids.cpu()):
        ends = torch.cat([(ids[1:] != ids[:-1]).nonzero()[:, 0] + 1, torch.tensor([keys])]).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            goes_on = with_state and start <= first_query < stop
            if stop > first_query and (stop - start > exact or goes_on):
                yield Span(slice(row, row + 1), start, stop, goes_on)
