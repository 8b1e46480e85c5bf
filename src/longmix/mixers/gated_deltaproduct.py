"""Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297): a token makes several writes of the delta rule.

With n keys, values and strengths of a token, made as in gated DeltaNet, and one decay, per head

    S_{t,0} = exp(g_t) S_{t-1,n}
    S_{t,i} = (1 - beta_{t,i} k_{t,i} k_{t,i}^T) S_{t,i-1} + beta_{t,i} k_{t,i} v_{t,i}^T      for i = 1 .. n
    y_t = W_o (silu(W_g x_t) * norm(S_{t,n}^T q_t / sqrt(d)))

Each factor is a generalised Householder matrix. With strengths up to 2 the product of n of them reflects in n
directions, or rotates; any permutation of n + 1 things is such a product (`data=s3`, `data=s5`). `decay: none` is
DeltaProduct. Each of the n writes has projections and a short convolution of its own, as published.
"""

from typing import Unpack

from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory, MemoryOptions


class GatedDeltaProduct(GatedMemory):
    """The delta rule with `householders` writes a token and one learned decay per head and token.

    Args:
        shape, layer_index, decay, output_gate, delta, key_factor, value_factor, convolution, negative_eigenvalues,
            householders, options: see `GatedMemory`.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "head",
        output_gate: str = "silu",
        delta: bool = True,
        key_factor: float = 0.5,
        value_factor: float = 0.75,
        convolution: int = 4,
        negative_eigenvalues: bool = True,
        householders: int = 2,
        **options: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(
            shape,
            layer_index,
            decay=decay,
            output_gate=output_gate,
            delta=delta,
            key_factor=key_factor,
            value_factor=value_factor,
            convolution=convolution,
            negative_eigenvalues=negative_eigenvalues,
            householders=householders,
            **options,
        )
