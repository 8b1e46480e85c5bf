"""The documents of new tokens, and whether they continue the document before."""

from typing import Any, Protocol

from torch import Tensor

from longmix.distributed.slices import Slices


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
