"""Gated DeltaNet-2 (arXiv 2605.22791): the delta rule with gates of its own for what is erased and what is written.

With unit q, k and v = silu(convolution(W x)), erase gates b = sigma(W_b x) for each channel of the keys, write gates
w = sigma(W_w x) for each channel of the values, and decays g as in KDA, per head

    S_t = (1 - k_t (b_t * k_t)^T) diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T
    y_t = W_o (sigma(W_gup W_gdown x_t) * norm(S_t^T q_t / sqrt(d)))

With b = w = beta this is KDA. Notable: `negative_eigenvalues` doubles b alone, as in the authors' code, whose gate of
the output has a bias besides. Heads of values that share a key (`num_value_heads`) share its decay and erase gate.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory, MemoryOptions, Terms


class GatedDeltaNet2(GatedMemory):
    """The delta rule with learned decays, erase gates and write gates per channel.

    Args:
        shape, layer_index, decay, output_gate, key_factor, value_factor, convolution, negative_eigenvalues, options:
            see `GatedMemory`.
    """

    decays_of_keys = True

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "channel",
        output_gate: str = "low_rank",
        key_factor: float = 0.75,
        value_factor: float = 0.75,
        convolution: int = 4,
        negative_eigenvalues: bool = False,
        **options: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            decay=decay,
            output_gate=output_gate,
            key_factor=key_factor,
            value_factor=value_factor,
            convolution=convolution,
            negative_eigenvalues=negative_eigenvalues,
            **options,
        )
        self.strength = None
        width = shape.d_model
        self.erase = nn.Linear(width, self.num_heads * self.key_dim, bias=False)
        self.write = nn.Linear(width, self.num_value_heads * self.value_dim, bias=False)
        for layer in (self.erase, self.write):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def _strengths(self, x: Tensor, rounded: Tensor) -> Tensor:
        """Erase and write gates before their sigmoid, [B, T, keys + values]."""
        return torch.cat([self.erase(rounded), self.write(rounded)], -1)

    def _replacing(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> Terms:
        """What the engine gets, see `GatedMemory`."""
        exact = strength.to(torch.promote_types(strength.dtype, torch.float32))
        erase, write = exact.split([self.erase.out_features, self.write.out_features], -1)
        erase = self._shared(self._gates(erase).unflatten(-1, (self.num_heads, -1)))
        value = value * write.sigmoid().unflatten(-1, (self.num_value_heads, -1)).to(value.dtype)
        query, key = self._shared(query), self._shared(key)
        return Terms(query, key, value, log_decay, -self._kept(log_decay) * erase * key, key)
