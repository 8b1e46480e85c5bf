"""Positions, rotary angles and bounds, which a pass's documents fix for all its layers: made once, not per layer.

The backbone makes a `Layout` for each `LayoutNeeds` that its mixers name, most often one, and hands it to the blocks.
A mixer that is called alone, or goes on from a state of its own, makes what it needs itself.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.mixers.parts.rotary import rotary_angles, token_positions
from longmix.pytrees import pytree


@dataclass(frozen=True)
class LayoutNeeds:
    """What a mixer wants of a layout; mixers that want the same share one.

    Attributes:
        head_dim: size of the heads that are rotated.
        rotary_base: wavelength base of the rotation.
        window: of `Layout.first_key`; None for the whole document.
    """

    head_dim: int
    rotary_base: float
    window: int | None = None


@pytree
@dataclass(frozen=True)
class Layout:
    """Where the tokens of a pass stand.

    Attributes:
        positions: integer [B or 1, T], of each token within its document.
        cosine, sine: float32 [B or 1, T, 1, head_dim], of the rotation at these positions, as `rotate` takes them.
        first_row: int32 [B, T], the first token of each token's document; None as `first_key`.
        first_key: int32 [B, 1, T], the first key that a token sees, which is that of its document or of its window;
            None where every row is one document, and for a slice of longer rows.
        starts: int32 [n + 1], where the documents start among the tokens of all rows, see
            `longmix_kernels.attention.packed`; None where the batch does not say.
    """

    positions: Tensor
    cosine: Tensor
    sine: Tensor
    first_row: Tensor | None = None
    first_key: Tensor | None = None
    starts: Tensor | None = None


@functools.cache
def takes_layout(kind: type) -> bool:
    """Whether a class of mixers has a `forward` with `layout`: a subclass of one that has may do without."""
    parameters = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return any(parameter.name == "layout" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def layouts(
    needs: set[LayoutNeeds],
    tokens: Tensor,
    document_ids: Tensor | None,
    document_starts: Tensor | None = None,
    slices: Slices | None = None,
) -> dict[LayoutNeeds, Layout]:
    """The layouts that mixers need in a pass over `tokens` [B, T] from the beginning of rows, or over a slice of rows.

    Args:
        needs: of all mixers.
        tokens: says where they are, and how many.
        document_ids: int32 [B, T]; None where every row is one document.
        document_starts: int32 [B, N], see `longmix.batch.Batch`; None where the batch does not say.
        slices: where the tokens are this process's slice of longer rows.
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
    made = {}
    for need in needs:
        angles = rotary_angles(positions, need.head_dim, need.rotary_base)
        first_key = None
        if first_row is not None:
            limited = first_row if need.window is None else torch.maximum(first_row, row - (need.window - 1))
            first_key = limited[:, None]
        made[need] = Layout(positions, *angles, first_row, first_key, starts)
    return made


def layout_after(need: LayoutNeeds, state: Any, ids: Tensor | None, length: int, device: torch.device) -> Layout:
    """The positions and angles of new tokens of one mixer, after a state or from the beginning; engines make bounds.

    Args:
        need: the mixer's.
        state: with `last_id` and `next_position`; None for none.
        ids: integer [B, T], the documents of the new tokens; None for one that goes on.
        length, device: how many tokens there are, and where.
    """
    last_id, next_position = (None, None) if state is None else (state.last_id, state.next_position)
    positions = token_positions(ids, last_id, next_position, length, device)
    return Layout(positions, *rotary_angles(positions, need.head_dim, need.rotary_base))


def _of_all_rows(document_starts: Tensor, length: int) -> Tensor:
    """Starts within each of B rows [B, N] as starts among the tokens of all, int32 [B * N + 1]."""
    row = torch.arange(len(document_starts), dtype=torch.int32, device=document_starts.device)
    starts = (document_starts.int() + length * row[:, None]).flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=length * len(document_starts))
