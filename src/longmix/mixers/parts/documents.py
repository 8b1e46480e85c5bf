"""The documents of new tokens, and whether they continue the document before."""

from typing import Any, Protocol

from torch import Tensor

from longmix.distributed.slices import Slices
from longmix_kernels.runtime import is_readable


class Before(Protocol):
    """The part of a state, or of earlier slices, that says which document the last token belongs to."""

    @property
    def last_id(self) -> Tensor | None:
        """int [B], the document of the last token."""

    @property
    def next_position(self) -> Tensor:
        """int [B], the position after the last token; 0 before the first."""


def continued_ids(document_ids: Tensor | None, state: Any, batch: int, length: int) -> Tensor | None:
    """Ids of new tokens: as given, or each row's last document going on; None while every row is one document.

    Args:
        document_ids: integer [B, T], or None.
        state: `Slices`, or one with `last_id`, and with `one_document` if it can tell that there were no ids so far.
        batch, length: B and T.
    """
    if document_ids is not None or state is None or isinstance(state, Slices):
        return document_ids
    if getattr(state, "one_document", False):
        return None
    last_id: Tensor = state.last_id
    return last_id[:, None].expand(batch, length)


def goes_on(before: Before, ids: Tensor) -> Tensor:
    """bool [B]: whether the first of new tokens, of documents `ids` [B, T], is of the document before, or the first."""
    assert before.last_id is not None
    return (before.next_position == 0) | (ids[:, 0] == before.last_id)


def told_apart(document_ids: Tensor | None) -> Tensor | None:
    """The ids integer [B, T]; None where they can be read without a wait, and every row is one document.

    On a CPU such rows take the faster path of rows that are not packed. A GPU would have to be waited for, and batches
    would take two paths in turn, each with a graph of its own.
    """
    if document_ids is None or not is_readable(document_ids):
        return document_ids
    return None if bool((document_ids == document_ids[:, :1]).all()) else document_ids
