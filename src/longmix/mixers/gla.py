"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): one decay per channel and token."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory, GatedMemoryOptions


class GLA(GatedMemory):
    """Linear attention with one learned decay per channel and token; a write adds.

    Args:
        shape, layer_index, decay, output_gate, delta, key_factor, convolution, options: see `GatedMemory`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "sigmoid",
        output_gate: str = "silu",
        delta: bool = False,
        key_factor: float = 0.5,
        convolution: int = 0,
        **options: Unpack[GatedMemoryOptions],
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
