"""The ways to scale rotary frequencies, for rows that are longer than those of training.

A pair of channels turns by position * f, where f = base^(-2 i / d) for pair i of d rotated channels:

linear   f / factor: positions are interpolated (Chen et al. 2023, arXiv 2306.15595)
yarn     f where a pair turns more than `beta_fast` times within the original length, f / factor where it turns less
         than `beta_slow` times, a ramp between; queries and keys grow by `attention_factor` (Peng et al. 2023,
         arXiv 2309.00071)
llama3   the same with `high_freq_factor` and `low_freq_factor` turns, and a ramp over turns (Llama 3.1)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longmix.config.values import as_given
from longmix.errors import ConfigError

MOST = 1e12
"""The largest base and factor."""


@dataclass(frozen=True)
class Scaling:
    """A scaling of rotary frequencies; a subclass is a kind of it.

    Attributes:
        factor: how many times longer than in training rows may be, at least 1.
    """

    factor: float

    kind: ClassVar[str] = ""

    @property
    def attention_factor_in_use(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """Frequencies of the rotated pairs in their order, float64 [pairs], for those that are not scaled."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: all frequencies by the factor."""

    kind = "linear"

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """See `Scaling`."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN; transformers' `_compute_yarn_parameters`.

    Attributes:
        original_length: tokens of a row in training.
        beta_fast, beta_slow: turns within the original length from which on, and to which, a channel is as it was, or
            is interpolated.
        attention_factor: on rotated queries and keys; None for 0.1 log(factor) + 1.
        truncate: both ends of the ramp lie at whole pairs.
    """

    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    kind = "yarn"

    def __post_init__(self) -> None:
        """Refuse what gives no ramp."""
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"mixer.rotary_options.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and that "
                "above 0."
            )
        if self.original_length <= 2 * math.pi * self.beta_slow:
            raise ConfigError(
                f"mixer.rotary_original_length={self.original_length} is so short that no channel turns "
                f"beta_slow={self.beta_slow} times in it; give the length of training rows."
            )
        if self.attention_factor is not None and not 0 < self.attention_factor <= MOST:
            raise ConfigError(f"mixer.rotary_options.attention_factor={self.attention_factor} must be above 0.")

    @property
    def attention_factor_in_use(self) -> float:
        """The factor on rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """See `Scaling`."""
        pairs = len(frequencies)
        low, high = (self._pair(turns, 2 * pairs, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)  # channels, as the authors have it
        high = high + 0.001 if low == high else high
        number = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
        interpolated = ((number - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * interpolated + frequencies * (1 - interpolated)

    def _pair(self, turns: float, channels: int, base: float) -> float:
        """The pair, with a fraction, that turns so many times within the original length."""
        return channels * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


@dataclass(frozen=True)
class Llama3(Scaling):
    """The scaling of Llama 3.1; transformers' `_compute_llama3_parameters`.

    Attributes:
        original_length: tokens of a row in training.
        low_freq_factor: wavelengths above original_length / low_freq_factor are multiplied by the factor.
        high_freq_factor: those below original_length / high_freq_factor stay.
    """

    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    kind = "llama3"

    def __post_init__(self) -> None:
        """Refuse what leaves nothing between."""
        if not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"mixer.rotary_options.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}, and that above 0."
            )

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """See `Scaling`."""
        turns = self.original_length * frequencies / (2 * math.pi)
        smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


KINDS: dict[str, type[Scaling]] = {kind.kind: kind for kind in (Linear, Yarn, Llama3)}

ScalingKind = Literal["linear", "yarn", "llama3"]


def scaling_of(
    kind: str | None, factor: float | None, original_length: int | None, options: Mapping[str, float] | None
) -> Scaling | None:
    """The scaling that a mixer's settings ask for; see `longmix.mixers.parts.rotary.Rotary.of`.

    Raises:
        ConfigError: a setting is out of range, unknown, missing, or given without that which it belongs to.
    """
    if kind is None:
        given = {"factor": factor, "original_length": original_length, "options": options or None}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"mixer.rotary_{name}={value} belongs to a mixer.rotary_scaling, which is null; give one of "
                    f"{', '.join(KINDS)}, or mixer.rotary_{name}=null."
                )
        return None
    if kind not in KINDS:
        raise ConfigError(f"mixer.rotary_scaling={kind} is unknown; use {', '.join(KINDS)} or null.")
    if factor is None or not 1 <= factor <= MOST:
        raise ConfigError(
            f"mixer.rotary_factor={'null' if factor is None else factor} must be at least 1 and at most {MOST:.0e} "
            f"with mixer.rotary_scaling={kind}."
        )
    known = [field.name for field in fields(KINDS[kind])]
    values: dict[str, Any] = {"factor": float(factor)}
    if "original_length" in known:
        if original_length is None or not 1 <= original_length <= MOST:
            raise ConfigError(
                f"mixer.rotary_original_length={'null' if original_length is None else original_length} must be the "
                f"tokens of a row in training with mixer.rotary_scaling={kind}."
            )
        values["original_length"] = original_length
    elif original_length is not None:
        raise ConfigError(
            f"mixer.rotary_original_length={original_length} changes nothing with mixer.rotary_scaling={kind}; make it "
            "null."
        )
    further = [name for name in known if name not in ("factor", "original_length")]
    return KINDS[kind](**values, **_options(kind, options or {}, further))


def _options(kind: str, given: Mapping[str, float], known: list[str]) -> dict[str, float]:
    """The further settings of a kind, each of them known and of its type."""
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"mixer.rotary_options.{name} is unknown; those of mixer.rotary_scaling={kind} are "
                f"{', '.join(known) or 'none'}."
            )
        wanted = "true or false" if name == "truncate" else "a number"
        if isinstance(value, bool) != (name == "truncate") or not isinstance(value, int | float):
            raise ConfigError(f"mixer.rotary_options.{name}={as_given(value)} is not {wanted}.")
        if not abs(value) <= MOST:
            raise ConfigError(f"mixer.rotary_options.{name}={value} is out of range.")
    return dict(given)
