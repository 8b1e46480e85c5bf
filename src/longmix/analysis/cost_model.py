"""The cost of a generated token, arithmetic and memory in one unit (Sadhukhan et al. 2025, arXiv 2506.05333).

    eFLOP = FLOP + I * bytes        I = peak arithmetic / memory bandwidth of the hardware, FLOP per byte

Every product with a weight is one side, what depends on the sequence the other: scores, states, caches. That paper
leaves the reading of weights out, as for large batches; here it counts, divided by the sequences that are decoded
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longmix.accelerators import Accelerator
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.projections import weight_count
from longmix.model.backbone import LanguageModel


def intensity(accelerator: Accelerator, dtype: torch.dtype) -> float:
    """I, FLOP per byte, for dense bfloat16 arithmetic or for float32."""
    flops = accelerator.bf16_flops if dtype == torch.bfloat16 else accelerator.fp32_flops
    return flops / accelerator.bandwidth


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic and memory traffic of some steps.

    Attributes:
        parameter_flops: products with weights.
        mixing_flops: everything else that is counted.
        weight_bytes: of the weights that are read, for one of the sequences decoded together.
        state_bytes: of what is read and written of states and caches.
        held_bytes: of all that is remembered of a sequence.
    """

    parameter_flops: float
    mixing_flops: float
    weight_bytes: float
    state_bytes: float
    held_bytes: float

    def parameters(self, intensity: float) -> float:
        """eFLOP of products with weights, which do not depend on the sequence."""
        return self.parameter_flops + intensity * self.weight_bytes

    def mixing(self, intensity: float) -> float:
        """eFLOP of scores, states and caches, which depend on the sequence."""
        return self.mixing_flops + intensity * self.state_bytes

    def total(self, intensity: float) -> float:
        """eFLOP of all."""
        return self.parameters(intensity) + self.mixing(intensity)


@dataclass(frozen=True)
class StepCost(Cost):
    """Cost of the token after `context` others.

    Attributes:
        context: how many there are before it.
    """

    context: int


def step_cost(model: LanguageModel, context: int, batch: int = 1) -> StepCost:
    """Cost of one token, from the model's own counts; weights and caches in the dtype of its weights.

    Args:
        model: on any device, the meta device included.
        context: tokens before it.
        batch: sequences that are decoded together and so share the reading of weights.
    """
    weights = weight_count(model.modules())
    return StepCost(
        context,
        parameter_flops=2 * weights,
        mixing_flops=model.flops(context + 1) - model.flops(context) - 2 * weights,
        weight_bytes=read_weights(model) / batch,
        state_bytes=sum(part.step_bytes(context) for part in branches(model)),
        held_bytes=model.state_bytes(context),
    )


def read_weights(model: LanguageModel) -> int:
    """Bytes of the weights that a step reads: of an embedding that is not the head's too, next to nothing."""
    read = sum(parameter.nbytes for parameter in model.parameters())
    return read if model.head.weight is model.embedding.weight else read - model.embedding.weight.nbytes


def first_context(contexts: Sequence[int], holds: Sequence[bool]) -> int | None:
    """The first of ascending contexts from which on a condition holds up to the last; None if not there."""
    found = None
    for context, true in zip(contexts, holds, strict=True):
        found = (context if found is None else found) if true else None
    return found


def branches(model: LanguageModel) -> list[Mixer]:
    """The mixer and the channel mixer of every layer."""
    return [part for block in model.blocks for part in block.children() if isinstance(part, Mixer)]
