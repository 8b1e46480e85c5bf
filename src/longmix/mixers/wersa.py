"""Linear attention between wavelet-filtered queries and keys, causal (after WERSA, arXiv 2507.08637).

With details d_0 .. d_J of GELU(W_q x) and GELU(W_k x) at J + 1 scales (`longmix.mixers.parts.wavelet`), gains that come
from the token alone, and random projections w_a of each head,

    q_t = sum_j gain_j(x_t) d_j[t], k likewise,    phi_a(q) = relu(w_a . q) + 1e-6
    y_t = W_o (sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s))

Notable: as published, the transform mixes up to 2^J - 1 later tokens and gains are pooled over the row, so that a
language model could read ahead. Here filters reach back only, and stop where a document begins. Gains of 1, at which
they begin, return GELU(W_q x) exactly. No code of the authors has appeared; random projections are fixed, as theirs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, SEED, ModelShape, at_most, divided
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.features import orthogonal_projections
from longmix.mixers.parts.memory import MemoryMixer, Terms
from longmix.mixers.parts.wavelet import CausalWavelet
from longmix.recipe import Recipe, set_recipe

MOST_LEVELS = 12
"""Filters then reach 4,095 tokens back, all of which a state holds."""

LEAST_FEATURE = 1e-6
"""Added to each feature, so that no sum of weights is zero."""


class Wersa(MemoryMixer):
    """WERSA in a causal form. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        levels: J.
        num_features: random projections of each head.
        num_heads: heads; None takes the model's.
        feature_seed: of the projections.

    Raises:
        ConfigError: heads that do not divide, a number out of range.
    """

    projections = ("query", "key")
    plain = ("value",)
    scale = 1.0
    random: Tensor

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        levels: int = 3,
        num_features: int = 64,
        num_heads: int | None = None,
        feature_seed: int = 0,
    ) -> None:
        super().__init__()
        at_most(COUNT, num_features=num_features)
        at_most(SEED, feature_seed=feature_seed)
        if not 1 <= levels <= MOST_LEVELS:
            raise ConfigError(f"mixer.levels={levels} must be from 1 to {MOST_LEVELS}.")
        if num_features < 1:
            raise ConfigError(f"mixer.num_features={num_features} must be at least 1.")
        width = self.d_model = shape.d_model
        self.num_heads = shape.num_heads if num_heads is None else num_heads
        self.head_dim = divided(width, self.num_heads, "model.d_model", "mixer.num_heads")
        self.key_dim, self.value_dim = num_features, self.head_dim + 1
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gain = nn.Linear(width, 2 * self.num_heads * (levels + 1), bias=False)
        self.past, self.recent_channels = 2**levels - 1, 2 * width
        self.convolution = CausalWavelet(2 * width, levels)
        generator = torch.Generator().manual_seed(1_000_003 * feature_seed + layer_index)
        self.register_buffer("random", orthogonal_projections(self.num_heads, self.head_dim, num_features, generator))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=width**-0.5 / math.sqrt(2 * shape.num_layers))
        nn.init.zeros_(self.gain.weight)
        set_recipe(self.gain.weight, Recipe("scalar"))

    def gates(self, x: Tensor) -> Tensor:
        """Gains of queries, then keys, of each head and scale, [B, T, 2 H (J + 1)], between 0 and 2."""
        return 2 * exact_linear(self.gain, x).sigmoid()

    def terms(self, mixed: Tensor, gates: Tensor) -> Terms:
        """Features of the filtered queries and keys, and values with a 1 at the end, in float32 or better."""
        details, value = mixed[..., : -self.d_model], mixed[..., -self.d_model :]
        details = details.unflatten(-1, (-1, 2, self.num_heads, self.head_dim))
        gains = gates.unflatten(-1, (2, self.num_heads, -1)).movedim(-1, 2)
        query, key = (details * gains.unsqueeze(-1)).sum(2).unbind(2)
        query, key = self.features(query), self.features(key)
        value = F.pad(value.unflatten(-1, (self.num_heads, -1)).to(query.dtype), (0, 1), value=1.0)
        return Terms(query, key, value, query.new_zeros(query.shape[:3]))

    def features(self, y: Tensor) -> Tensor:
        """Positive random features [B, T, H, num_features] of filtered queries or keys [B, T, H, head_dim]."""
        with torch.autocast(y.device.type, enabled=False):
            return F.relu(torch.einsum("bthd,hdm->bthm", y, self.random.to(y.dtype))) + LEAST_FEATURE

    def leave(self, read: Tensor, x: Tensor) -> Tensor:
        """Divide by the sum of the weights."""
        return (read[..., :-1] / read[..., -1:]).flatten(2).to(x.dtype)

    def flops(self, length: int) -> int:
        """As the base says, and the features of queries and keys."""
        return super().flops(length) + 4 * length * self.random.numel()
