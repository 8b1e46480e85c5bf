"""Retention (Sun et al. 2023, arXiv 2307.08621): a constant decay per head, and rotary positions."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_decay import HeadDecay, HeadDecayOptions


class Retention(HeadDecay):
    """Linear attention with a constant decay per head and rotary positions.

    Args:
        shape, layer_index, decay, rotary_base, activation, output_gate, options: see `HeadDecay`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "retention",
        rotary_base: float | None = 10000.0,
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
