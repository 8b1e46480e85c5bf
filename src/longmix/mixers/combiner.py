"""Combiner (Ren et al. 2021, arXiv 2107.05768), its fixed form: own segment exactly, one key for each one before.

    k_S = max_j k_j,   q_S = max_j q_j,   v_S = sum_j softmax_j(q_S . k_j / sqrt(d)) v_j       over the j of segment S
    y_i = W_o (one softmax over the k_j of the own segment up to i and the k_S before it) v

The largest is taken channel by channel, as in the authors' JAX code. At T tokens segments of sqrt(T) cost least. Keys
are pooled after the rotation here, which the paper does not have: the largest of rotated channels does not turn with
the positions, so `rotary_base=null` is closer to the paper.
"""

from typing import ClassVar, Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.scatterbrain_summaries import Pool
from longmix.mixers.scatterbrain import Scatterbrain


class Combiner(Scatterbrain):
    """Combiner's fixed form, which is Scatterbrain with summaries and without past blocks.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        block: tokens of a segment, counted from the beginning of the document.
        pool: "max" as published, or "mean".

    Raises:
        ConfigError: naming the setting.
    """

    small: ClassVar = {}

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        block: int = 128,
        pool: Pool = "max",
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(
            shape, layer_index, block=block, past_blocks=0, num_features=0, summaries=True, pool=pool, **options
        )
