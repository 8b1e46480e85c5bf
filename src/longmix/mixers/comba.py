"""Comba (Hu et al. 2025, arXiv 2506.02475): a delta rule that asks the state before it decays, and corrects queries.

With q and k of length 1, write strengths beta = sigma(w . x), decays g as in gated DeltaNet, and two learned numbers b
and d of each head of keys, per head (equation 5)

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T sigma(b) k_t)^T
    y_t = W_o (sigma(W_g x_t) * norm(S_t^T (q_t - d k_t) / sqrt(d_k)))

A gated DeltaNet asks exp(g_t) S_{t-1} with k_t itself: its transition is a decay times a Householder matrix, and here
it is a scalar plus a matrix of rank one. Notable: the eigenvalue along k_t, exp(g_t) - beta_t sigma(b), lies between -1
and 1 as it is, so `negative_eigenvalues` does not exist: doubled strengths would let states grow.

What differs from the authors' code, which corrects convolved queries by sigma(b) k and then normalises q, k and
sigma(b) k: there b drops out of what is asked of the state, and d weighs the lengths of k and q. Here both are as in
the paper. b begins at 1, as there. The paper begins d at 0.02 in models of 340 million weights and at 1 in larger ones.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from longmix.mixers.parts.base import REAL, ModelShape, at_most
from longmix.mixers.parts.gated_memory import GatedMemory, GatedMemoryOptions, Terms


class Comba(GatedMemory):
    """The delta rule with a learned decay per head and token, and feedback of the state to values and queries.

    Args:
        shape, layer_index, decay, output_gate, key_factor, convolution, options: see `GatedMemory`.
        correction: what d of all heads begins at.

    Raises:
        ConfigError: as `GatedMemory`; a correction beyond plus or minus a million.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "head",
        output_gate: str = "sigmoid",
        key_factor: float = 0.5,
        convolution: int = 4,
        correction: float = 0.02,
        **options: Unpack[GatedMemoryOptions],
    ) -> None:
        at_most(REAL, correction=correction)
        super().__init__(
            shape,
            layer_index,
            decay=decay,
            output_gate=output_gate,
            key_factor=key_factor,
            convolution=convolution,
            **options,
        )
        self.feedback = nn.Parameter(torch.ones(self.num_heads))
        self.correction = nn.Parameter(torch.full((self.num_heads,), float(correction)))

    def _replacing(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> Terms:
        """What the engine gets, see `GatedMemory`."""
        asked = self._shared(self.feedback.sigmoid().unsqueeze(-1) * key)
        query = self._shared(query - self.correction.unsqueeze(-1) * key)
        write, gates = self._shared(key), self._gates(strength).unsqueeze(-1)
        return Terms(query, gates * write, value, log_decay, -gates * asked, write)
