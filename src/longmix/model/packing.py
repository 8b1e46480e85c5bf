"""Activations in 8 bits, as training keeps them for the backward pass (Pan et al. 2021, "Mesa", arXiv 2111.11124).

    s = max |x| / 127 of a token's group of channels,    code = floor(x / s + u),    x ~ code s

u is uniform between 0 and 1, so that the mean over draws is x: the error of a gradient is noise without a bias. It
comes from torch's generator, whose state checkpoints hold, as that of dropout.

Mesa has running means of the range of each head or group over the whole batch, and its kernel lets codes beyond the
range wrap around. Here every token has ranges of its own, and nothing is beyond them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
"""The most channels that share a scale."""

LEAST_GROUP = 16
"""Where no divisor of the channels between this and `GROUP` is found, all channels of a token share a scale."""

LEAST_NUMBERS = 4096
"""Smaller tensors are kept as they are."""

LARGEST = 127
"""The largest code; the smallest is its negative, so that zeros stay zeros."""

SLICE_NUMBERS = 1 << 22
"""Numbers that are packed or restored at once, so that float32 copies of long inputs are never held whole."""


@dataclass
class Packed:
    """An activation in 8 bits.

    Attributes:
        codes: int8, of the activation's shape.
        scale: float32 [..., groups].
    """

    codes: Tensor
    scale: Tensor


def group_size(channels: int) -> int:
    """How many neighbouring channels share a scale."""
    found = max(size for size in range(1, GROUP + 1) if channels % size == 0)
    return found if found >= LEAST_GROUP else channels


def packed_once(x: Tensor) -> Packed | None:
    """`packed`, of which the layers that are given the very same tensor share one, as long as the tensor lasts.

    It is for tensors that a block makes within: what enters a block is packed anew where the block is run again, as the
    draws have to be those of the first time.
    """
    if torch.compiler.is_compiling():
        return packed(x)
    known: tuple[int, Packed | None] | None = getattr(x, _SHARED, None)
    if known is None or known[0] != x._version:
        known = x._version, packed(x)
        setattr(x, _SHARED, known)
    return known[1]


_SHARED = "_longmix_packed"


@torch.no_grad()
def packed(x: Tensor) -> Packed | None:
    """x [..., C] in 8 bits; None for one with fewer than `LEAST_NUMBERS`, which is kept as it is."""
    if x.numel() < LEAST_NUMBERS:
        return None
    size = group_size(x.shape[-1])
    rows = x.detach().reshape(-1, size)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
    for part in _slices(rows.shape[0], size):
        numbers = rows[part].float()
        scale[part] = numbers.abs().amax(-1, keepdim=True) / LARGEST
        noise = torch.rand_like(numbers)
        codes[part] = codes_of(numbers, scale[part], noise, -LARGEST, LARGEST).to(torch.int8)
    groups = x.shape[-1] // size
    return Packed(codes.view(x.shape), scale.view(*x.shape[:-1], groups))


def codes_of(x: Tensor, step: Tensor, noise: Tensor, least: int, most: int) -> Tensor:
    """floor(x / step + noise), kept between `least` and `most` at both ends; 0 where the step is 0."""
    return (x / step + noise).floor().nan_to_num_(0.0).clamp_(least, most)


@torch.no_grad()
def restored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The activation that codes and scales of `Packed` stand for, in `dtype`."""
    size = codes.shape[-1] // scale.shape[-1]
    rows, scales = codes.reshape(-1, size), scale.reshape(-1, 1)
    found = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for part in _slices(rows.shape[0], size):
        found[part] = (rows[part] * scales[part]).to(dtype)
    return found.view(codes.shape)


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of codes and scales of an activation of this shape; 0 for one that is kept as it is."""
    numbers = math.prod(shape)
    return 0 if numbers < LEAST_NUMBERS else numbers + 4 * numbers // group_size(shape[-1])


def _slices(rows: int, size: int) -> list[slice]:
    step = max(1, SLICE_NUMBERS // size)
    return [slice(start, start + step) for start in range(0, rows, step)]
