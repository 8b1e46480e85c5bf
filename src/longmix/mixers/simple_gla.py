"""Gated linear attention with one decay per head (Yang et al. 2024, arXiv 2312.06635, with a scalar gate)."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_decay import HeadDecay, HeadDecayOptions


class SimpleGLA(HeadDecay):
    """Linear attention with one learned decay per head and token.

    Args:
        shape, layer_index, decay, rotary_base, activation, output_gate, options: see `HeadDecay`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "learned",
        rotary_base: float | None = None,
        activation: str = "none",
        output_gate: str = "silu",
        **options: Unpack[HeadDecayOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            decay=decay,
            rotary_base=rotary_base,
            activation=activation,
            output_gate=output_gate,
            **options,
        )
