"""Angular hashes, the centring of hashed vectors, and pseudo-random numbers by position."""

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, at_most
from longmix.mixers.parts.between_steps import RunningMean


def running_center(heads: int, head_dim: int, decay: float | None) -> RunningMean | None:
    """The running mean of vectors that are hashed, or None without a decay.

    Raises:
        ConfigError: a decay outside [0, 1).
    """
    if decay is None:
        return None
    if not 0 <= decay < 1:
        raise ConfigError(f"mixer.center_decay={decay} must be from 0 to below 1, or null.")
    return RunningMean((heads, head_dim), decay)


def centered(x: Tensor, mean: RunningMean | None) -> Tensor:
    """`x` [B, T, H, D] less the running mean, which observes it."""
    if mean is None:
        return x
    mean.observe(x)
    return x.detach() - mean.value


def pseudo_random(positions: Tensor, salt: Tensor) -> Tensor:
    """Numbers in [0, 1) that look random and depend on position and salt alone: [B, T] and [H] to float32 [B, T, H].

    The 32-bit finaliser of MurmurHash3, whose constants make every input bit flip every output bit half the time.
    """
    mixed = positions.long().unsqueeze(-1) * 0x9E3779B1 + salt.long()
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    mixed = mixed & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8).float() * 2.0**-24


class AngularHash(nn.Module):
    """Bucket of a vector: the nearest of random directions and their opposites (Andoni et al. 2015, arXiv 1509.02897).

        bucket(x) = argmax [x R, -x R]

    R is drawn once from a generator of its own, saved with the model, and never drawn again.

    Args:
        heads: key heads, each with its own directions.
        head_dim: size of a vector.
        buckets: number of buckets, even.
        rounds: independent hashes.
        seed: of the generator.

    Raises:
        ConfigError: buckets that are odd or fewer than 2, rounds below 1.
    """

    directions: Tensor

    def __init__(self, heads: int, head_dim: int, buckets: int, rounds: int, seed: int) -> None:
        super().__init__()
        at_most(COUNT, buckets=buckets, rounds=rounds)
        if buckets < 2 or buckets % 2:
            raise ConfigError(f"mixer.buckets={buckets} must be even and at least 2: directions and their opposites.")
        if rounds < 1:
            raise ConfigError(f"mixer.rounds={rounds} must be at least 1.")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(heads, head_dim, rounds * buckets // 2, generator=generator)
        self.register_buffer("directions", directions)
        self.rounds = rounds

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, head_dim], H a multiple of `heads`, to int32 [B, T, H, rounds]; in float32 or better."""
        exact = torch.promote_types(x.dtype, torch.float32)
        directions = self.directions.to(exact)
        with torch.autocast(x.device.type, enabled=False):
            grouped = x.to(exact).unflatten(2, (directions.shape[0], -1)).transpose(1, 2)  # [B, heads, T, group, D]
            along = (grouped.flatten(2, 3) @ directions).unflatten(-1, (self.rounds, -1))
        nearest = along.abs().argmax(-1)
        opposite = along.gather(-1, nearest.unsqueeze(-1)).squeeze(-1) < 0
        bucket = torch.add(nearest, opposite, alpha=along.shape[-1]).int()
        return bucket.unflatten(2, grouped.shape[2:4]).transpose(1, 2).flatten(2, 3)

    def flops(self, length: int, heads: int) -> int:
        """Floating-point operations to hash `length` tokens of so many heads."""
        return 2 * length * heads * self.directions[0].numel()
