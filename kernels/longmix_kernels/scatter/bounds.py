"""Which keys a query row sees exactly, and which through features: both follow from documents and blocks alone.

A document is cut into blocks of C tokens, counted from its own beginning. A query in block n sees the keys of blocks
n - P .. n exactly, up to its own, and those of earlier blocks of its document through their features; so exact keys are
a run of rows that begins at `lo`, and the others lie between the first row of the document and `lo`.
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
    """Bounds of the last `queries` of `keys` rows.

    Returns:
        `first`, `lo` and `hi`, int32 [B or 1, 1, Tq]: the first row of the document, the first exact key, and one past
        the last.
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
    """Find the blocks whose queries see keys through features, without waiting for the device.

    A block that begins at key row r has slot r // C, which no other block of its batch row has: blocks of a document
    begin C rows apart, and the first block of a document is never among them but for the one that goes on from the
    initial state, before which there is none.

    Args:
        document_ids: integer [B, Tk], or None for one document in every row.
        queries, keys: sizes of the call.
        block_size, past_blocks: C and P.
        with_state: whether an initial state stands before the document of each row's first query.
        device: where to put the result.

    Returns:
        int32 [B or 1, slots, 4]: the first query row of the slot's block, and one past the last (0 and 0 where there
        are none); the first row of the C keys that it is the first block to see through features, or -1; and what the
        sums before the block are: 0 those of the block before, 1 nothing, 2 the initial state.
    """
    size, exact = min(block_size, keys), min((past_blocks + 1) * block_size, keys)
    row = torch.arange(keys, dtype=torch.int32, device=device)[None]
    first, end = torch.zeros_like(row), torch.full_like(row, keys)
    if document_ids is not None:
        ids = document_ids.contiguous()
        first, end = (torch.searchsorted(ids, ids, right=right, out_int32=True) for right in (False, True))
    offset = keys - queries
    goes_on = (first <= offset) & with_state  # those that end before it are not read
    position = row - first
    is_read = (position % size == 0) & (end > offset) & ((position >= exact) | goes_on)
    start = F.pad(torch.where(is_read, row, -1), (0, -keys % size), value=-1).unflatten(1, (-1, size)).amax(-1)
    there, place = start >= 0, start.clamp(min=0).long()
    position, end, goes_on = (x.gather(1, place) for x in (position, end, goes_on))
    begins = torch.where(goes_on, 2 * (position == 0), (position == exact).int())
    columns = (
        (start - offset).clamp(min=0),
        (torch.minimum(start + size, end) - offset).clamp(min=0) * there,
        torch.where(position >= exact, start - exact, -1),  # row 0 stands for what is not there, at position 0
        begins * there,
    )
    return torch.stack([x.int() for x in columns], -1)


class Span(NamedTuple):
    """Rows of one document in some batch rows, of which some queries see keys through features.

    Attributes:
        batch: which batch rows.
        start, stop: key rows of the document.
        with_state: whether an initial state stands before it.
    """

    batch: slice
    start: int
    stop: int
    with_state: bool


def spans(
    document_ids: torch.Tensor | None, batch: int, queries: int, keys: int, exact: int, with_state: bool
) -> Iterator[Span]:
    """Find the documents that have far keys.

    Args:
        document_ids: integer [B, Tk], or None for one document in every row.
        batch, queries, keys: sizes of the call.
        exact: tokens of a document within which a query sees every key exactly, (P + 1) * C.
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
