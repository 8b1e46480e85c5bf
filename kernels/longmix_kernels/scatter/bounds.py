"""Which keys a query row sees exactly, and which through features: both follow from documents and blocks alone.

A document is cut into blocks of C tokens, counted from its own beginning. A query in block n sees the keys of blocks
n - P .. n exactly, up to its own, and those of earlier blocks of its document through their features; so exact keys are
a run of rows that begins at `lo`, and the others lie between the first row of the document and `lo`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

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
