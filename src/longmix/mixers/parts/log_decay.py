"""Learned log decays of a matrix memory: one per head, or one per channel of its keys.

A and b of the softplus begin as in Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), so that heads remember from one token
to a thousand; the authors' code for gated DeltaNet draws A from 0 on, whose logarithm may be infinite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.mixers.parts.exact import exact_linear
from longmix.recipe import Recipe, set_recipe

RATES = 1.0, 16.0
"""A begins uniformly between these, as in Mamba-2."""

STEPS = 1e-3, 0.1
"""softplus(b) begins between these, its logarithm uniformly, as in Mamba-2."""

SIGMOID_DIVISOR, SIGMOID_RANK = 16.0, 16
"""Divisor of the log decay of GLA, which therefore begins at 0.96 a token."""


class LogDecay(nn.Module):
    """x [B, T, width] -> log decay, at most 0, in float32 or better, also under autocast.

    Args:
        width: of the input.
        heads, key_dim: of the state.
        kind: "head" for one number per head, [B, T, heads]; "channel" for -A softplus(.) and "sigmoid" for
            logsigmoid(.) / 16 of each channel of the keys, [B, T, heads, key_dim].
        rank: of the product that the latter two are made with.
    """

    def __init__(self, width: int, heads: int, key_dim: int, kind: str, rank: int) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        columns = heads if kind == "head" else heads * key_dim
        self.down = None if kind == "head" else nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(width if kind == "head" else rank, columns, bias=False)
        self.bias = nn.Parameter(torch.zeros(columns))
        self.log_rate: nn.Parameter | None = None
        if kind != "sigmoid":
            self.log_rate = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())
            step = torch.empty(columns).uniform_(math.log(STEPS[0]), math.log(STEPS[1])).exp()
            with torch.no_grad():
                self.bias.copy_(step + (-torch.expm1(-step)).log())
        for weight in (layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)):
            set_recipe(weight, Recipe("scalar"))

    def forward(self, x: Tensor) -> Tensor:
        """Log decays of each token of `x`, as the class says."""
        return self.of_thin(self.thin(x))

    def thin(self, x: Tensor) -> Tensor:
        """What is narrow in between: a number per head, or the thin matrix's rank."""
        return exact_linear(self.up if self.down is None else self.down, x)

    def of_thin(self, thin: Tensor) -> Tensor:
        """Log decays of what `thin` returned."""
        step = (thin if self.down is None else exact_linear(self.up, thin)) + self.bias
        if self.log_rate is None:
            return F.logsigmoid(step).unflatten(-1, (self.heads, -1)) / SIGMOID_DIVISOR
        rate = self.log_rate.to(step.dtype).exp()
        if self.kind == "head":
            return -rate * F.softplus(step)
        return -rate.unsqueeze(-1) * F.softplus(step).unflatten(-1, (self.heads, -1))
