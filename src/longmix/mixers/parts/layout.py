"""Make positions, rotary angles and bounds once per pass, since its documents fix them for all layers.

The backbone makes a `Layout` for each `LayoutNeeds` that its mixers name, most often one, and hands it to the blocks.
A mixer that is called alone, or that goes on from a state of its own, makes what it needs itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.mixers.parts.rotary import Rotary, rotary_angles, token_positions
from longmix.pytrees import pytree


@dataclass(frozen=True)
class LayoutNeeds:
    """What a mixer needs of a layout. Mixers with equal needs share one layout.

    Attributes:
        rotary: the rotation; None for none.
        window: how many tokens `Layout.first_key` lets a token see; None for the whole document.
    """

    rotary: Rotary | None
    window: int | None = None


@pytree
@dataclass(frozen=True)
class Layout:
    """Where the tokens of a pass stand.

    Attributes:
        positions: integer [B or 1, T], the position of each token within what the rows have of its document.
        cosine, sine: float32 [B or 1, T, 1, channels], the rotation at each token's position in its document, as
            `rotate` takes it; None if nothing rotates.
        first_row: int32 [B, T], the first token of each token's document; None where `first_key` is None.
        first_key: int32 [B, 1, T], the first key that a token sees: the first of its document, or of its window if that
            begins later. None if every row is one document, and for a slice of longer rows.
        starts: int32 [n + 1], where the documents start among the tokens of all rows, as
            `longmix_kernels.attention.packed` takes it; None if the batch does not say.
    """

    positions: Tensor
    cosine: Tensor | None
    sine: Tensor | None
    first_row: Tensor | None = None
    first_key: Tensor | None = None
    starts: Tensor | None = None


def needs_of(mixer: Any) -> LayoutNeeds | None:
    """Return what a mixer needs of the layout that the backbone hands it; None if its `forward` takes none."""
    needs: LayoutNeeds | None = mixer.layout_needs() if mixer.takes_layout else None
    return needs


def layouts(
    needs: set[LayoutNeeds],
    tokens: Tensor,
    document_ids: Tensor | None,
    document_starts: Tensor | None = None,
    slices: Slices | None = None,
    positions_before: Tensor | None = None,
) -> dict[LayoutNeeds, Layout]:
    """Return the layouts that mixers need in a pass from the beginning of rows, or over a slice of rows.

    Args:
        needs: the needs of all mixers.
        tokens: [B, T]; only its shape and device matter.
        document_ids: int32 [B, T]; None if every row is one document.
        document_starts: int32 [B, N], as in `longmix.batch.Batch`; None if the batch does not say.
        slices: the slices, if the tokens are this process's slice of longer rows.
        positions_before: integer [B, T], what rotations add to each token's position; None for 0.
    """
    if not needs:
        return {}
    length, device = tokens.shape[1], tokens.device
    last_id, next_position = (None, None) if slices is None else (slices.last_id, slices.next_position)
    positions = token_positions(document_ids, last_id, next_position, length, device)
    packed = document_ids is not None and slices is None
    row = torch.arange(length, dtype=torch.int32, device=device)
    first_row = row - positions.int() if packed else None
    starts = _of_all_rows(document_starts, length) if packed and document_starts is not None else None
    rotated = positions if positions_before is None else positions + positions_before
    made = {}
    for need in needs:
        cosine, sine = _angles(rotated, need.rotary)
        first_key = None
        if first_row is not None:
            limited = first_row if need.window is None else torch.maximum(first_row, row - (need.window - 1))
            first_key = limited[:, None]
        made[need] = Layout(positions, cosine, sine, first_row, first_key, starts)
    return made


def layout_after(need: LayoutNeeds, state: Any, ids: Tensor | None, length: int, device: torch.device) -> Layout:
    """Return the positions and angles of new tokens of one mixer, after a state or from the beginning.

    The layout has no bounds; the engines make them.

    Args:
        need: the mixer's needs.
        state: the mixer's state, with `last_id` and `next_position`; None at the beginning.
        ids: integer [B, T], the documents of the new tokens; None if one document goes on.
        length: how many new tokens there are, T.
        device: their device.
    """
    last_id, next_position = (None, None) if state is None else (state.last_id, state.next_position)
    positions = token_positions(ids, last_id, next_position, length, device)
    return Layout(positions, *_angles(positions, need.rotary))


def _angles(positions: Tensor, rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rotary is None else rotary_angles(positions, rotary)


def _of_all_rows(document_starts: Tensor, length: int) -> Tensor:
    """Return starts within each of B rows [B, N] as starts among the tokens of all rows, int32 [B * N + 1]."""
    row = torch.arange(len(document_starts), dtype=torch.int32, device=document_starts.device)
    starts = (document_starts.int() + length * row[:, None]).flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=length * len(document_starts))
