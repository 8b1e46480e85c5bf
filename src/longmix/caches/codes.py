"""Numbers as whole numbers of a few bits: x is read as code * step + low, with the least number as low.

Parameters are rounded to the dtype they are stored in before codes are made, so that codes are of what will be read.
Everything is of each row alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longmix_kernels.attention import packed_codes

DTYPES = {"float16": torch.float16, "float32": torch.float32}
"""What parameters of codes may be stored in."""


class Coded(NamedTuple):
    """Numbers [B, H, S, D] in codes.

    Attributes:
        codes: uint8 [B, H, S, D * bits / 8].
        low, step: as in `longmix_kernels.attention.Codes`.
    """

    codes: Tensor
    low: Tensor
    step: Tensor


def by_channel(x: Tensor, bits: int, group: int, dtype: torch.dtype, seen: Tensor | None = None) -> Coded:
    """Code numbers with a step of each channel over `group` consecutive tokens, as keys are.

    Args:
        x: [B, H, S, D]; `group` divides S, D fills whole bytes of codes.
        bits: of a code.
        group: tokens.
        dtype: of the parameters.
        seen: bool [B, 1 or H, S], tokens that count for the least and the largest number; None for all.

    Returns:
        The codes, and parameters [B, H, S / group, D].
    """
    low, high = _range(x.unflatten(2, (-1, group)), 3, None if seen is None else seen.unflatten(2, (-1, group)))
    low, step = _parameters(low, high, bits, dtype)  # [B, H, S / group, 1, D]
    codes = _codes(x.unflatten(2, (-1, group)), low, step, bits).flatten(2, 3)
    return Coded(packed_codes(codes, bits), low.squeeze(3), step.squeeze(3))


def by_token(x: Tensor, bits: int, group: int, dtype: torch.dtype) -> Coded:
    """Code numbers with a step of each token over `group` consecutive channels, as values are.

    Args:
        x: [B, H, S, D]; `group` divides D, which fills whole bytes of codes.
        bits, dtype: as in `by_channel`.
        group: channels.

    Returns:
        The codes, and parameters [B, H, S, D / group].
    """
    grouped = x.unflatten(3, (-1, group))
    low, high = grouped.amin(4, keepdim=True), grouped.amax(4, keepdim=True)
    low, step = _parameters(low, high, bits, dtype)
    codes = _codes(grouped, low, step, bits).flatten(3)
    return Coded(packed_codes(codes, bits), low.squeeze(4), step.squeeze(4))


def by_slot(x: Tensor, bits: int, dtype: torch.dtype) -> Coded:
    """Code numbers with one step of each slot over the channels of all heads.

    Args:
        x: [B, H, S, D], D fills whole bytes of codes.
        bits, dtype: as in `by_channel`.

    Returns:
        The codes, and parameters [B, 1, S, 1].
    """
    low, step = _parameters(x.amin((1, 3), keepdim=True), x.amax((1, 3), keepdim=True), bits, dtype)
    return Coded(packed_codes(_codes(x, low, step, bits), bits), low, step)


def _range(x: Tensor, axis: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the largest number along an axis, 0 where nothing is seen."""
    if seen is None:
        return x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    hidden = ~seen.unsqueeze(-1)
    low = x.masked_fill(hidden, torch.inf).amin(axis, keepdim=True)
    high = x.masked_fill(hidden, -torch.inf).amax(axis, keepdim=True)
    return torch.where(low > high, 0.0, low), torch.where(low > high, 0.0, high)


def _parameters(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Low and step as they are stored; what is too large for the dtype becomes its largest number."""
    step = (high - low) / (2**bits - 1)
    limit = torch.finfo(dtype).max
    return low.clamp(-limit, limit).to(dtype), step.clamp(max=limit).to(dtype)


def _codes(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """The codes of numbers, uint8; 0 where all numbers that share a step are alike."""
    exact = torch.promote_types(x.dtype, torch.float32)
    low, step = low.to(exact), step.to(exact)
    codes = ((x.to(exact) - low) / torch.where(step == 0, 1.0, step)).round()
    return torch.where(step == 0, 0.0, codes.clamp(0, 2**bits - 1)).to(torch.uint8)
