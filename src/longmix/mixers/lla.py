"""Local linear attention by its definition (arXiv 2510.01450), for short rows: the teacher of `parallax`.

    z_j = k_j - q_i,  w_j = exp(q_i . k_j / sqrt(d))             over the j <= i of the document
    om = sum_j w_j,  mu = sum_j w_j z_j,  S = sum_j w_j z_j z_j^T + ridge I,  rho = S^-1 mu
    y_i = W_o sum_j w_j (1 - z_j . rho) v_j / (om - mu . rho)

Softmax attention averages the values around a query; this fits a line to them and takes its value at the query.

Notable: the weights are those of `flash`, with no other parameter; with a large ridge it nears `flash`. Every query
solves a system of d equations in float64, and the sums need T^2 + T d^2 numbers for each head, so that rows have at
most `MOST_TOKENS` tokens. The authors' kernels solve by conjugate gradients instead, which need about d steps and a
pass over the keys for each. With a small ridge, a query that sees fewer keys than d extrapolates far.
"""

from typing import Unpack

from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import REAL, ModelShape, at_most
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix_kernels.attention.reference_lla import local_linear_attention

MOST_TOKENS = 1024
"""The longest row that is taken, tokens of a state included."""


class LLA(SoftmaxAttention):
    """Every token sees itself and all earlier tokens of its document, through a line fitted to the values around it.

    Args:
        ridge: the penalty of the line's slopes, above 0; added to sums of weights that are not normalised, so that it
            weighs less in long rows.

    The other arguments are those of `SoftmaxAttention`.

    Raises:
        ConfigError: a ridge that is not above 0, and from `forward` rows of more than `MOST_TOKENS` tokens.
    """

    def __init__(
        self, shape: ModelShape, layer_index: int, *, ridge: float = 1.0, **options: Unpack[HeadOptions]
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(REAL, ridge=ridge)
        if ridge <= 0:
            raise ConfigError(f"mixer.ridge={ridge} must be above 0.")
        self.ridge = ridge

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Solve for the line of every query."""
        self.prepare(rows.key.shape[1])
        tensors, ids = (rows.query, rows.key, rows.value), rows.document_ids
        return local_linear_attention(*tensors, ridge=self.ridge, document_ids=ids)[0], {}

    def prepare(self, length: int) -> None:
        """Refuse rows that are too long."""
        if length > MOST_TOKENS:
            raise ConfigError(
                f"Local linear attention (longmix.mixers.lla.LLA) takes rows of at most {MOST_TOKENS:,} tokens, not of "
                f"{length:,}, as every query solves a system of equations; use mixer=parallax, its scalable form."
            )

    def visible_pairs(self, length: int) -> int:
        """The causal triangle with its diagonal."""
        return length * (length + 1) // 2

    def flops(self, length: int) -> int:
        """As in `SoftmaxAttention`; means, second moments and tilts of every visible pair, and the systems."""
        width = self.head_dim
        pairs = (2 * width * width + 4 * width) * self.visible_pairs(length)
        return super().flops(length) + self.num_heads * (pairs + length * 2 * width**3 // 3)
