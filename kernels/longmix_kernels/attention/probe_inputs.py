"""The arguments of one call of attention with a probe, as its implementations and torch operators take them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from longmix_kernels import operators
from longmix_kernels.attention.inputs import Inputs


@dataclass(frozen=True)
class ProbeInputs(operators.Inputs):
    """The arguments of one call.

    Attributes:
        probe: [B, Tq, Hq, D], beside the query.
        inputs: everything else, as for attention without a probe.
    """

    probe: torch.Tensor
    inputs: Inputs

    @classmethod
    def schema(cls) -> str:
        """Return the argument list of the torch operator."""
        return f"Tensor probe, {Inputs.schema()}"

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the arguments that `schema` names, in its order."""
        return self.probe, *self.inputs.flat()

    def first(self) -> torch.Tensor:
        """Return the tensor whose device decides."""
        return self.probe

    @classmethod
    def of(cls, flat: Iterable[Any]) -> "ProbeInputs":
        """Return the inputs of which `flat` returned these values."""
        probe, *rest = flat
        return cls(probe, Inputs.of(rest))


def own_products(call: ProbeInputs) -> torch.Tensor:
    """Return the product of each probe with the key at its own position, [B, Tq, Hq], in the exact dtype.

    With more queries than keys, early rows take the first key.
    """
    key, (_, queries, heads, _) = call.inputs.key, call.probe.shape
    exact = torch.promote_types(key.dtype, torch.float32)
    missing = key.shape[1] - queries
    if missing >= 0:
        own = key[:, missing:]
    else:
        place = torch.arange(missing, key.shape[1], device=key.device).clamp(min=0)
        own = key.index_select(1, place)
    own = own.repeat_interleave(heads // key.shape[2], dim=2) if key.shape[2] < heads else own
    return (call.probe.to(exact) * own.to(exact)).sum(-1)
