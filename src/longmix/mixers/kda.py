"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the delta rule with one decay per channel and token."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import DeltaOptions, GatedMemory


class KDA(GatedMemory):
    """The delta rule with one learned decay per channel and token, and an output gate of two thin matrices.

    Args:
        shape, layer_index, decay, output_gate, delta, key_factor, convolution, options: see `GatedMemory`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "channel",
        output_gate: str = "low_rank",
        delta: bool = True,
        key_factor: float = 1.0,
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
