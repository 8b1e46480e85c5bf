"""Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658): a constant decay per head, by ALiBi's slopes."""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_decay import HeadDecay, HeadDecayOptions


class Lightning(HeadDecay):
    """Linear attention with a constant decay per head, gentler in deeper layers.

    Args:
        shape, layer_index, decay, rotary_base, activation, output_gate, options: see `HeadDecay`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "alibi",
        rotary_base: float | None = None,
        activation: str = "silu",
        output_gate: str = "sigmoid",
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
