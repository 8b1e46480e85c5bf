"""Mamba-2, the block with state space duality (Dao and Gu 2024, arXiv 2405.21060, sections 3 and 7).

With z, dt = W x, and x', B, C = silu(convolution(W x)), dt_t = softplus(. + b), per head of x' and group of B and C

    S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x'_t^T,    y_t = S_t^T C_t + D x'_t,    out = W_o norm(y_t * silu(z_t))

That is the `linear` engine with queries C, keys B, values x', log decay -A dt and input gate dt. The norm is an RMSNorm
over each group's channels; heads of a group share B and C, as one key for many value heads.

Notable: the block is `expand` times as wide as the model inside, so that it has 6 d_model^2 weights at expand=2, more
than attention's 4: in the published models it replaces attention and feed-forward layer together. `match.parameters`
makes models equal by the width of the feed-forward layer. W is one matrix in the authors' code; here each part is a
matrix of its own, begun as that is, so that Muon sees matrices with one meaning.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, FACTOR, ModelShape, at_most, divided
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.head_gates import head_router
from longmix.mixers.parts.log_decay import RATES, STEPS
from longmix.mixers.parts.memory import MemoryMixer, Terms
from longmix.mixers.parts.norms import HeadwiseNorm, check_norm_eps
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.linear import LinearState, linear_attention

HEAD_DIM, LEAST_HEADS = 64, 4
"""By default, a head has so many channels, as published, and there are at least so many heads."""


def with_skip(query: Tensor, key: Tensor, value: Tensor, *, skip: Tensor, **options: Any) -> tuple[Tensor, LinearState]:
    """Return what `linear_attention` does, with `skip` [H] times each token's own value added to the output."""
    read, state = linear_attention(query, key, value, **options)
    return read + (skip.unsqueeze(-1) * value).to(read.dtype), state


class Mamba2(MemoryMixer):
    """Mamba-2's block. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        expand: width of the heads together over that of the model.
        state_size: channels of B and C, the state of each channel of x'.
        groups: sets of B and C; it divides the heads.
        num_heads: heads of x'; None takes one for every 64 channels, and at least 4.
        convolution: tokens that the short convolution mixes; 0 for none, nor its SiLU.
        norm_eps: of the norm.
        heads_shared, heads_kept, heads_balance: a mixture of heads, see `longmix.mixers.parts.head_gates.HeadRouter`,
            on what the norm returns; none with `heads_kept` None.

    Raises:
        ConfigError: heads or groups that do not divide, a size that is not positive, a convolution of 1 token.
    """

    engine = staticmethod(with_skip)
    projections = ("value", "key", "query")
    scale = 1.0

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        expand: float = 2.0,
        state_size: int = 128,
        groups: int = 1,
        num_heads: int | None = None,
        convolution: int = 4,
        norm_eps: float = 1e-5,
        heads_shared: int = 0,
        heads_kept: int | None = None,
        heads_balance: float = 0.01,
    ) -> None:
        super().__init__()
        check_norm_eps(norm_eps)
        at_most(FACTOR, expand=expand)
        at_most(COUNT, state_size=state_size)
        self.d_model, inner = shape.d_model, round(expand * shape.d_model)
        if inner < 1:
            raise ConfigError(f"mixer.expand={expand} of model.d_model={self.d_model} must be at least a channel.")
        if state_size < 1:
            raise ConfigError(f"mixer.state_size={state_size} must be at least 1.")
        heads = max(LEAST_HEADS, inner // HEAD_DIM) if num_heads is None else num_heads
        self.value_dim = divided(inner, heads, "mixer.expand * model.d_model", "mixer.num_heads")
        divided(heads, groups, "mixer.num_heads", "mixer.groups")
        self.num_heads, self.key_dim, self.groups = heads, state_size, groups
        self.gate = nn.Linear(self.d_model, inner, bias=False)
        self.value = nn.Linear(self.d_model, inner, bias=False)
        self.key = nn.Linear(self.d_model, groups * state_size, bias=False)
        self.query = nn.Linear(self.d_model, groups * state_size, bias=False)
        self.step = nn.Linear(self.d_model, heads, bias=False)
        self.convolve(convolution, inner + 2 * groups * state_size, bias=True)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())
        first = torch.empty(heads).uniform_(math.log(STEPS[0]), math.log(STEPS[1])).exp()
        self.step_bias = nn.Parameter(first + (-torch.expm1(-first)).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = HeadwiseNorm(groups, inner // groups, "rms", norm_eps)
        self.output = nn.Linear(inner, self.d_model, bias=False)
        with torch.no_grad():
            self.output.weight.div_(math.sqrt(shape.num_layers))
        set_recipe(self.step.weight, Recipe("scalar"))
        self.head_router = head_router(self.d_model, heads, heads_shared, heads_kept, heads_balance, shape.num_layers)

    def gates(self, x: Tensor) -> Tensor:
        """dt before its bias and softplus, [B, T, H]."""
        return exact_linear(self.step, x)

    def terms(self, mixed: Tensor, gates: Tensor) -> Terms:
        """C, B, x', log decay and log input gate; heads of a group share B and C."""
        narrow = self.groups * self.key_dim
        value, key, query = mixed.split([self.num_heads * self.value_dim, narrow, narrow], -1)
        step = F.softplus(gates + self.step_bias).clamp_min(torch.finfo(gates.dtype).tiny)
        log_decay = -self.log_rate.to(step.dtype).exp() * step
        value = value.unflatten(-1, (self.num_heads, -1))
        return Terms(self._of_heads(query), self._of_heads(key), value, log_decay, step.log(), {"skip": self.skip})

    def _of_heads(self, x: Tensor) -> Tensor:
        """[B, T, groups * N] -> [B, T, H, N]."""
        x = x.unflatten(-1, (self.groups, 1, -1))
        return x.expand(-1, -1, -1, self.num_heads // self.groups, -1).flatten(2, 3)

    def leave(self, read: Tensor, x: Tensor) -> Tensor:
        """Gate what was read, then norm each group; in float32 until both are done."""
        exact = torch.promote_types(read.dtype, torch.float32)
        gated = read.flatten(2).to(exact) * F.silu(self.gate(x).to(exact))
        return self.norm(gated.unflatten(-1, (self.groups, -1))).flatten(2).to(x.dtype)
