"""The arguments of one decoding step, as its Triton kernels and torch operators take them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longmix_kernels import operators
from longmix_kernels.attention.segments import Codes, Segment

_TENSORS = 11
"""How many tensors a segment has, those of its codes among them."""


@dataclass(frozen=True)
class DecodeInputs(operators.Inputs):
    """The arguments of one step.

    Attributes:
        query: [B, T, Hq, D].
        new_key: [B, T, Hkv, D], or None.
        new_value: [B, T, Hkv, V], or None.
        segments: what the queries read besides.
        schedule: the lists of `decode_schedule.Schedule`, int32; None for those of all slots.
        scale: the factor on the scores.
        logsumexp: float32 [B, T, Hq], for the weights; None for the step itself.
    """

    query: torch.Tensor
    new_key: torch.Tensor | None
    new_value: torch.Tensor | None
    segments: tuple[Segment, ...]
    schedule: torch.Tensor | None
    scale: float
    logsumexp: torch.Tensor | None = None

    @classmethod
    def schema(cls) -> str:
        """Return the argument list of the torch operator, with the segments taken apart."""
        return (
            "Tensor query, Tensor? new_key, Tensor? new_value, Tensor?[] tensors, int[] bits, Tensor? schedule, "
            "float scale, Tensor? logsumexp"
        )

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the arguments that `schema` names, in its order."""
        tensors = [x for segment in self.segments for x in _tensors_of(segment)]
        bits = [
            0 if codes is None else codes.bits
            for segment in self.segments
            for codes in (segment.key_codes, segment.value_codes)
        ]
        return self.query, self.new_key, self.new_value, tensors, bits, self.schedule, self.scale, self.logsumexp

    @classmethod
    def of(cls, flat: Iterable[Any]) -> "DecodeInputs":
        """Return the inputs of which `flat` returned these values."""
        query, new_key, new_value, tensors, bits, schedule, scale, logsumexp = flat
        segments = tuple(
            _segment(tensors[_TENSORS * number : _TENSORS * (number + 1)], bits[2 * number : 2 * number + 2])
            for number in range(len(tensors) // _TENSORS)
        )
        return cls(query, new_key, new_value, segments, schedule, scale, logsumexp)


def _tensors_of(segment: Segment) -> list[torch.Tensor | None]:
    found = [segment.key, segment.value, segment.count, segment.first, segment.index]
    for codes in (segment.key_codes, segment.value_codes):
        found += [None, None, None] if codes is None else [codes.low, codes.step, codes.scale]
    return found


def _segment(tensors: Sequence[torch.Tensor | None], bits: Sequence[int]) -> Segment:
    key, value, count, first, index, *rest = tensors
    assert key is not None and value is not None
    codes = []
    for number, (low, step, scale) in zip(bits, (rest[:3], rest[3:]), strict=True):
        codes.append(None if low is None or step is None else Codes(number, low, step, scale))
    key_codes, value_codes = codes
    return Segment(key, value, count, first, index, key_codes, value_codes)
