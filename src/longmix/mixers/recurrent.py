"""What the mixers with a constant-size state share: continuing a sequence, and restarting at each document."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Run = Callable[[Any, Tensor | None], tuple[Tensor, Any]]
"""An engine, given the state before each document and the document ids: output [B, T, ...] and final state."""


@dataclass
class RecurrentState:
    """What a recurrent mixer remembers.

    Attributes:
        carried: the engine's state after the last token, tensors [B, ...].
        recent: [B, K, C], the last inputs of a short convolution or token shift; K may be 0.
        recent_ids: int32 [B, K], their documents, -1 before the first token.
        last_id: int32 [B], the document of the last token, -1 before the first.
        next_position: int64 [B], the position within its document that the next token of each row would take.
    """

    carried: Any
    recent: Tensor
    recent_ids: Tensor
    last_id: Tensor
    next_position: Tensor


def continued_ids(document_ids: Tensor | None, state: RecurrentState | None, batch: int, length: int) -> Tensor | None:
    """Ids of new tokens: as given, or each row's last document going on."""
    if document_ids is not None or state is None:
        return document_ids
    return state.last_id.clamp(min=0)[:, None].expand(batch, length)


def over_documents(run: Run, fresh: Any, state: RecurrentState | None, ids: Tensor | None) -> tuple[Tensor, Any]:
    """Run an engine on from a state: only the document that goes on sees it, others begin from the fresh state.

    Args:
        run: the engine.
        fresh: its state before a document, tensors [B, ...].
        state: where to go on; None for the beginning.
        ids: int32 [B, T], the new tokens' documents.
    """
    if state is None or ids is None:
        return run(fresh, ids)
    goes_on = (state.last_id < 0) | (ids[:, 0] == state.last_id)
    carried = select(goes_on, state.carried, fresh)
    first = ids == ids[:, :1]
    output, final = run(carried, None if first.all() else ids)
    if first.all():
        return output, final
    # An engine starts every document from one state, so rows with several documents are run from both.
    other_output, other_final = run(fresh, ids)
    first_document = first.view(*first.shape, *[1] * (output.dim() - 2))
    return torch.where(first_document, output, other_output), select(first[:, -1], final, other_final)


def select(rows: Tensor, chosen: Any, others: Any) -> Any:
    """Tensors [B, ...] of one state where `rows` [B] is set, and of another elsewhere."""

    def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    return tree_map(either, chosen, others)
