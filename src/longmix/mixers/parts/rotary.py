"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), half-split layout as in Llama."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from longmix.errors import ConfigError
from longmix.mixers.parts.rotary_scaling import MOST, Scaling, ScalingKind, scaling_of
from longmix_kernels.attention import positions_from_document_ids


class RotaryScalingOptions(TypedDict, total=False):
    """The settings of rotary positions besides the base; see `Rotary.of`."""

    rotary_fraction: float
    rotary_scaling: ScalingKind | None
    rotary_factor: float | None
    rotary_original_length: int | None
    rotary_options: dict[str, float] | None


POSITIONS = ("rotary_base", *RotaryScalingOptions.__annotations__)
"""The settings of a mixer that say how positions turn its queries and keys; no weight depends on them."""


@dataclass(frozen=True)
class Rotary:
    """The rotation of a mixer's queries and keys.

    Attributes:
        base: wavelength base, 10000 in the paper; larger for long contexts.
        channels: how many channels of a head are rotated, the first ones; even.
        scaling: of the frequencies; None for none.
    """

    base: float
    channels: int
    scaling: Scaling | None = None

    @classmethod
    def of(
        cls,
        head_dim: int,
        heads: str,
        *,
        rotary_base: float | None,
        rotary_fraction: float = 1.0,
        rotary_scaling: str | None = None,
        rotary_factor: float | None = None,
        rotary_original_length: int | None = None,
        rotary_options: Mapping[str, float] | None = None,
    ) -> Self | None:
        """The rotation that a mixer's settings ask for; None without positions.

        Args:
            head_dim: channels of a head.
            heads: what sets it, for messages.
            rotary_base: wavelength base; None rotates nothing, so that the mixer has no positions (NoPE).
            rotary_fraction: the share of a head's channels that are rotated, the first ones, as in GPT-NeoX.
            rotary_scaling: a name in `KINDS`, or None.
            rotary_factor, rotary_original_length: of the scaling.
            rotary_options: its further attributes by name.

        Raises:
            ConfigError: a setting is out of range, or is given without that which it belongs to.
        """
        if not 0 < rotary_fraction <= 1:
            raise ConfigError(f"mixer.rotary_fraction={rotary_fraction} must be above 0 and at most 1.")
        scaling = scaling_of(rotary_scaling, rotary_factor, rotary_original_length, rotary_options)
        if rotary_base is None:
            for name, given, least in (("fraction", rotary_fraction, 1), ("scaling", rotary_scaling, None)):
                if given != least:
                    raise ConfigError(
                        f"mixer.rotary_{name}={given} has nothing to rotate: mixer.rotary_base=null is no positions; "
                        f"give a mixer.rotary_base, or mixer.rotary_{name}={'null' if least is None else least}."
                    )
            return None
        if not 1 < rotary_base <= MOST:
            raise ConfigError(f"mixer.rotary_base={rotary_base} must be above 1 and at most {MOST:.0e}, or null.")
        channels = int(head_dim * rotary_fraction)
        if channels < 2 or channels % 2:
            if rotary_fraction == 1:
                raise ConfigError(
                    f"rotary positions need an even head size, and {heads} gives {head_dim}; "
                    "mixer.rotary_base=null does without."
                )
            raise ConfigError(
                f"mixer.rotary_fraction={rotary_fraction} of a head of {head_dim} channels rotates {channels}; it must "
                "be an even number, at least 2."
            )
        return cls(float(rotary_base), channels, scaling)

    @property
    def attention_factor(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor_in_use

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians a token for each rotated pair, float32 [channels / 2]; scaled ones are rounded once, from float64."""
        exact = torch.float32 if self.scaling is None else torch.float64
        exponents = torch.arange(0, self.channels, 2, device=device, dtype=exact) / self.channels
        frequencies = self.base**-exponents
        return frequencies if self.scaling is None else self.scaling.scaled(frequencies, self.base).float()


def rotary_angles(positions: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles in float32, in the form that `rotate` takes.

    Angles are formed in float32: at position 65536 their spacing is 2^-7 radians for the fastest pair, whose value
    is the exact integer position, so every pair stays accurate to about 4e-3 radians.

    Args:
        positions: [B or 1, T], any integer dtype.
        rotary: the rotation.

    Returns:
        cosine and sine, each [B or 1, T, 1, channels]: both halves of the rotated channels have the same, but the sine
        of the first half is negated. Both have the factor on rotated queries and keys in them.
    """
    device = positions.device
    kept = device.type == "cpu" and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
    angles = positions.to(torch.float32)[..., None, None] * (_kept_turns if kept else _turns)(rotary, device)
    cosine, sine = angles.cos(), angles.sin()
    if rotary.attention_factor != 1:
        cosine, sine = cosine * rotary.attention_factor, sine * rotary.attention_factor
    return cosine, sine


def _turns(rotary: Rotary, device: torch.device) -> Tensor:
    """Radians a token for each rotated channel, float32 [channels]: the first half turns back, which negates its sine.

    On a CPU they are kept from step to step. A GPU's could be memory of a graph that is being captured.
    """
    frequencies = rotary.frequencies(device)
    return torch.cat((-frequencies, frequencies))


_kept_turns = lru_cache(maxsize=16)(_turns)


def rotate(x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
    """Rotate `x` [B, T, H, head_dim] by the angles of `rotary_angles`; in float32 or better, returned in x's dtype.

    Channels beyond those of the angles stay as they are; without angles all do.
    """
    if cosine is None or sine is None:
        return x
    channels = cosine.shape[-1]
    whole = channels == x.shape[-1]
    turned = x if whole else x[..., :channels]
    exact = turned if x.dtype in (torch.float32, torch.float64) else turned.float()
    first, second = exact.chunk(2, dim=-1)
    rotated = exact * cosine + torch.cat((second, first), dim=-1) * sine
    if rotated.dtype != x.dtype:
        rotated = rotated.to(x.dtype)
    return rotated if whole else torch.cat((rotated, x[..., channels:]), dim=-1)


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
        if length == 1 and next_position is not None:
            return next_position.to(device)[:, None]
        positions = torch.arange(length, device=device)[None]
        return positions if next_position is None else positions + next_position.to(device)[:, None]
    if length == 1 and last_id is not None and next_position is not None:
        return torch.where(document_ids == last_id[:, None], next_position[:, None], 0)
    positions = positions_from_document_ids(document_ids)
    if last_id is None or next_position is None:
        return positions
    return positions + torch.where(document_ids == last_id[:, None], next_position[:, None], 0)
