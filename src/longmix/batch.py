"""Batches of windows, which data give and models take."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

if TYPE_CHECKING:  # preparing data needs no torch, which takes seconds to import
    import torch

IGNORE_INDEX = -100
"""A target where nothing is to be predicted."""


class Batch(TypedDict):
    """Rows of windows.

    Attributes:
        tokens: int64 [b, T].
        targets: int64 [b, T], `IGNORE_INDEX` where nothing is to be predicted.
        document_ids: int32 [b, T], or None where rows are never packed with several documents.
        document_starts: int32 [b, N], where each row's documents start, ascending from 0, and T for all that it does
            not have; or None. N is at least the number of documents and takes few values.
        positions_before: int32 [b, T], the tokens that each token's document has before those of the row, which its
            position counts too; only where positions go on from window to window.
        continues: bool [b], whether a row's first document is the one that its row of the step before ended with; only
            where rows read on from step to step.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    document_ids: "torch.Tensor | None"
    document_starts: "NotRequired[torch.Tensor | None]"
    positions_before: "NotRequired[torch.Tensor]"
    continues: "NotRequired[torch.Tensor]"


def each(batch: Batch, function: "Callable[[torch.Tensor], torch.Tensor]") -> Batch:
    """The batch with every tensor replaced by what `function` makes of it."""
    parts = cast("dict[str, torch.Tensor | None]", batch)
    return cast(Batch, {name: None if part is None else function(part) for name, part in parts.items()})


def documents_of(batch: Batch) -> "dict[str, torch.Tensor | None]":
    """The keyword arguments by which a model is told of the batch's documents.

    Every pass over a batch takes them from here, so that all are computed by the kernels that training uses.
    """
    further = {"document_starts": batch.get("document_starts"), "positions_before": batch.get("positions_before")}
    given = {name: part for name, part in further.items() if part is not None}
    return {"document_ids": batch["document_ids"], **given}


def first_tokens(batch: Batch, length: int) -> Batch:
    """The first `length` tokens of every row."""
    ids, starts = batch["document_ids"], batch.get("document_starts")
    return Batch(
        tokens=batch["tokens"][:, :length],
        targets=batch["targets"][:, :length],
        document_ids=None if ids is None else ids[:, :length],
        document_starts=None if starts is None else starts.clamp(max=length),
    )
