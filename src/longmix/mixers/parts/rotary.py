"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), half-split layout as in Llama."""

import torch
from torch import Tensor

from longmix_kernels.attention import positions_from_document_ids


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles in float32, in the form that `rotate` takes.

    Angles are formed in float32: at position 65536 their spacing is 2^-7 radians for the fastest pair, whose value
    is the exact integer position, so every pair stays accurate to about 4e-3 radians.

    Args:
        positions: [B or 1, T], any integer dtype.
        head_dim: even.
        base: wavelength base, 10000 in the paper; larger for long contexts.

    Returns:
        cosine and sine, each [B or 1, T, 1, head_dim]: both halves of a head have the same, but the sine of the first
        half is negated.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)[..., None] * (base**-exponents)
    cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate `x` [B, T, H, head_dim] by the angles of `rotary_angles`; in float32 or better, returned in x's dtype."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = exact.chunk(2, dim=-1)
    return (exact * cosine + torch.cat((second, first), dim=-1) * sine).to(x.dtype)


def token_positions(
    document_ids: Tensor | None,
    last_id: Tensor | None,
    next_position: Tensor | None,
    length: int,
    device: torch.device,
) -> Tensor:
    """Position of each of `length` new tokens within its document, [B or 1, T].

    Args:
        document_ids: int32 [B, T]; None for one document that goes on.
        last_id: [B], document of the token before them; None if there is none.
        next_position: int64 [B], the position after that token; None for 0.
        length: number of tokens, T.
        device: where they are.
    """
    if document_ids is None:
        positions = torch.arange(length, device=device)[None]
        return positions if next_position is None else positions + next_position.to(device)[:, None]
    positions = positions_from_document_ids(document_ids)
    if last_id is None or next_position is None:
        return positions
    return positions + torch.where(document_ids == last_id[:, None], next_position[:, None], 0)
