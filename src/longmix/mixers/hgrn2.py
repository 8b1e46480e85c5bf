"""HGRN2: a gated recurrence whose state is expanded by an outer product (Qin et al. 2024, arXiv 2404.07904).

With q = silu(W_q x), v = W_v x and forget gates f = b + (1 - b) sigmoid(W_f x) with a lower bound b, per head

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,    y_t = W_o norm(S_t^T q_t / sqrt(d))

That is GLA's memory with a decay per channel, whose key is what the decay takes away: 1 - f. There is no output gate,
and one RMSNorm over all heads.

Notable: bounds rise with the layer, so that upper layers keep more: none in the first, l / L at first in layer l of L.
The authors' bounds are a cumulative softmax over the layers of one weight of the whole model. Here each layer learns a
sigmoid of its own, which begins at the same values; nothing then forces trained bounds to rise. `lower_bound=fixed`
keeps them, and `none` has none, as in GLA.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import ModelShape, divided
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.head_gates import head_router
from longmix.mixers.parts.memory import ChannelMemory, Terms
from longmix.mixers.parts.norms import HeadwiseNorm, check_norm_eps
from longmix.recipe import Recipe, set_recipe

HEAD_DIM, LEAST_HEADS = 128, 4
"""By default, a head has so many channels, as published, and there are at least so many heads."""

BOUNDS = ("learned", "fixed", "none")


class HGRN2(ChannelMemory):
    """HGRN2's token mixer. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0; the first has no lower bound.
        num_heads: heads; None takes one for every 128 channels, and at least 4.
        lower_bound: "learned", "fixed" or "none".
        convolution: tokens that a short convolution mixes, of queries and values, with a SiLU; 0 for none.
        norm_eps: of the norm.
        heads_shared, heads_kept, heads_balance: a mixture of heads, see `longmix.mixers.parts.head_gates.HeadRouter`,
            on what the norm returns; none with `heads_kept` None.

    Raises:
        ConfigError: an unknown bound, heads that do not divide, a convolution of 1 token.
    """

    projections = ("query", "value")
    bound: Tensor | None

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        num_heads: int | None = None,
        lower_bound: str = "learned",
        convolution: int = 0,
        norm_eps: float = 1e-5,
        heads_shared: int = 0,
        heads_kept: int | None = None,
        heads_balance: float = 0.01,
    ) -> None:
        super().__init__()
        check_norm_eps(norm_eps)
        if lower_bound not in BOUNDS:
            raise ConfigError(f"mixer.lower_bound={lower_bound} is unknown; use learned, fixed or none.")
        width = self.d_model = shape.d_model
        self.num_heads = max(LEAST_HEADS, width // HEAD_DIM) if num_heads is None else num_heads
        self.key_dim = self.value_dim = divided(width, self.num_heads, "model.d_model", "mixer.num_heads")
        self.scale = self.key_dim**-0.5
        self.query, self.forget, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.convolve(convolution, 2 * width)
        self.norm = HeadwiseNorm(1, width, "rms", norm_eps)
        first: Tensor | None = None
        if lower_bound != "none" and layer_index > 0:
            first = torch.full((width,), math.log(layer_index / max(shape.num_layers - layer_index, 1)))
        if lower_bound == "learned":
            self.register_parameter("bound", None if first is None else nn.Parameter(first))
        else:
            self.register_buffer("bound", first)
        for layer in (self.query, self.forget, self.value):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=width**-0.5 / math.sqrt(2 * shape.num_layers))
        self.head_router = head_router(width, self.num_heads, heads_shared, heads_kept, heads_balance, shape.num_layers)
        set_recipe(self.forget.weight, Recipe("scalar"))  # as every gate, which autocast leaves exact

    def gates(self, x: Tensor) -> Tensor:
        """Logarithms of the forget gates, [B, T, D]."""
        forget = F.logsigmoid(exact_linear(self.forget, x))
        if self.bound is None:
            return forget
        bound = self.bound.to(forget.dtype)
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + forget)

    def terms(self, mixed: Tensor, gates: Tensor) -> Terms:
        """Query, 1 - f as the key, value and log f."""
        query, value, log_decay = (x.unflatten(-1, (self.num_heads, -1)) for x in (*mixed.chunk(2, -1), gates))
        query = query if self.convolution is not None else F.silu(query)
        return Terms(query, -torch.expm1(log_decay).to(value.dtype), value, log_decay)

    def leave(self, read: Tensor, x: Tensor) -> Tensor:
        """Norm over all heads."""
        return self.norm(read.flatten(2).unsqueeze(-2)).squeeze(-2)
