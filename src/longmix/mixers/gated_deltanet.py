"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with one decay per head and token."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import DeltaOptions, GatedMemory


class GatedDeltaNet(GatedMemory):
    """The delta rule with one learned decay per head and token.

    Args:
        shape, layer_index, decay, output_gate, delta, key_factor, convolution, options: see `GatedMemory`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "head",
        output_gate: str = "silu",
        delta: bool = True,
        key_factor: float = 0.5,
        convolution: int = 4,
        **options: Unpack[DeltaOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            decay=decay,
            output_gate=output_gate,
            delta=delta,
            key_factor=key_factor,
            convolution=convolution,
            **options,
        )
