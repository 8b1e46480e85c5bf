"""Forgetting attention, FoX (Lin et al. 2025, arXiv 2503.02130): softmax attention with a forget gate of each token.

    f_t = sigmoid(w . x_t + b),   y_i = W_o sum_j softmax_j(q_i . k_j / sqrt(d) + sum_{j < t <= i} log f_t) v_j

There is no rotation: the gates alone tell where tokens stand. `ForgetBias` computes the sums.
"""

from typing import Unpack

from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import CommonHeadOptions


class Fox(Flash):
    """`flash` with forget gates.

    Args:
        shape, layer_index, bias, rotary_base, options: see `SoftmaxAttention`.
        attention_dropout: see `Flash`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        bias: str = "forget",
        rotary_base: float | None = None,
        attention_dropout: float = 0.0,
        **options: Unpack[CommonHeadOptions],
    ) -> None:
        super().__init__(
            shape, layer_index, bias=bias, rotary_base=rotary_base, attention_dropout=attention_dropout, **options
        )
