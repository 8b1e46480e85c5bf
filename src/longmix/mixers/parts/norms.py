"""Normalisation of each head on its own."""

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import REAL, at_most

NORMS = ("rms", "layer")


class HeadwiseNorm(nn.Module):
    """RMSNorm or LayerNorm of each head on its own, in float32, with one weight per channel.

    Args:
        heads, head_dim: sizes.
        kind: "rms" or "layer".
        eps: added to the mean square. It is part of the model where heads are small, as an mLSTM's are at first.
        bias: add one number per channel.
        shared: all heads have the same weights.

    Raises:
        ConfigError: an unknown kind.
    """

    def __init__(
        self, heads: int, head_dim: int, kind: str, eps: float, bias: bool = False, shared: bool = False
    ) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ConfigError(f"mixer.norm={kind} is unknown; use {' or '.join(NORMS)}.")
        channels = head_dim if shared else heads * head_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.kind = kind
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, head_dim] -> [..., heads, head_dim] in the dtype of `x`."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layer":
            exact = exact - exact.mean(-1, keepdim=True)
        scale = (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        width = x.shape[-1]
        scaled = exact * scale * self.weight.view(-1, width)
        return (scaled if self.bias is None else scaled + self.bias.view(-1, width)).to(x.dtype)


def check_norm_eps(norm_eps: float) -> None:
    """Refuse a head-wise norm that would divide by the root of a negative number.

    Raises:
        ConfigError: it is negative, or out of range.
    """
    at_most(REAL, norm_eps=norm_eps)
    if norm_eps < 0:
        raise ConfigError(f"mixer.norm_eps={norm_eps} must not be negative.")
