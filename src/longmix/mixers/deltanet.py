"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a write replaces what the state holds at its key."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import DeltaOptions, GatedMemory


class DeltaNet(GatedMemory):
    """The delta rule without decay and output gate.

    Args:
        shape, layer_index, decay, output_gate, delta, key_factor, convolution, options: see `GatedMemory`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "none",
        output_gate: str = "none",
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
