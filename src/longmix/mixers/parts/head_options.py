"""What softmax mixers share beside their attention: their options, the norm of heads, and what content may choose."""

from dataclasses import dataclass, field

from torch import Tensor

from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.rms_norm import RMSNorm, rms_norm
from longmix.mixers.parts.rotary import RotaryScalingOptions


@dataclass
class Selection:
    """Labels and gates that a mixer chose for tokens, each from its token and position alone.

    Attributes:
        query_labels: integer [B, T, Hq, R]; None without labels.
        key_labels: integer [B, T, Hkv, R]; None without labels.
        query_gate: [B, T, Hq], factor on the output heads; None for 1.
        key_gate: [B, T, Hkv], factor on the values; None for 1.
        means: [B, ...], of each row, with gradients, that `SoftmaxAttention.losses_of` makes losses of; None for none.
        losses, metrics: as in `MixerOutput`.
    """

    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    query_gate: Tensor | None = None
    key_gate: Tensor | None = None
    means: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


class CommonHeadOptions(RotaryScalingOptions, total=False):
    """Those of `HeadOptions` of which no mixer has a default of its own."""

    num_heads: int | None
    num_kv_heads: int | None
    qk_norm: bool
    position: str
    bias_rank: int
    gain: str
    output_gate: str
    sink_logits: bool
    heads_shared: int
    heads_kept: int | None
    heads_balance: float
    heads_router: str


class HeadOptions(CommonHeadOptions, total=False):
    """The settings that all softmax mixers share; see `SoftmaxAttention`."""

    rotary_base: float | None
    bias: str


class HeadNorm(RMSNorm):
    """RMSNorm whose weight follows the input's dtype, since torch's fused kernel takes no mixture of dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., head_dim] -> [..., head_dim]."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)
