"""The arguments of one call of block-local attention with far keys, as its implementations take them."""

from dataclasses import dataclass

import torch

from longmix_kernels import operators


@dataclass(frozen=True)
class Inputs(operators.Inputs):
    """The arguments of one call, with the initial state taken apart.

    Attributes:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        value: [B, Tk, Hkv, Dv].
        query_features: [B, Tq, Hq, m], log phi(q); None if no key is far.
        key_features: [B, Tk, Hkv, m], log phi(k); None if no key is far.
        memory: [B, Hkv, m, Dv] of the initial state; None without one.
        normalizer, log_scale: [B, Hkv, m] of the initial state; None without one.
        document_ids: int32 or int64 [B, Tk]; None if each row is one document.
        block_size: tokens of a block.
        past_blocks: whole blocks before its own that a query sees exactly.
        scale: the factor on the exact scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_features: torch.Tensor | None
    key_features: torch.Tensor | None
    memory: torch.Tensor | None
    normalizer: torch.Tensor | None
    log_scale: torch.Tensor | None
    document_ids: torch.Tensor | None
    block_size: int
    past_blocks: int
    scale: float

    @property
    def exact(self) -> int:
        """Return how many tokens of a document a query may see exactly; in a shorter document no key is far."""
        return (self.past_blocks + 1) * self.block_size

    def has_far_keys(self) -> bool:
        """Say whether a query can see a key, or an initial state, through features."""
        return self.query_features is not None and (self.memory is not None or self.key.shape[1] > self.exact)
