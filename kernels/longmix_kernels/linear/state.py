"""The state of scalar-gated linear attention."""

from typing import NamedTuple

import torch


class LinearState(NamedTuple):
    """What is remembered of all tokens so far, in float32, or float64 for float64 inputs.

    With a normaliser the state means `exp(log_scale) * memory` and `exp(log_scale) * normalizer`; how it is divided
    between the factors is no information, and nothing that a continued call returns depends on it.

    Attributes:
        memory: [B, H, Dk, Dv], the decayed sum of key value^T.
        normalizer: [B, H, Dk], the decayed sum of keys; None without `normalize`.
        log_scale: [B, H], natural logarithm; None without `normalize`.
    """

    memory: torch.Tensor
    normalizer: torch.Tensor | None = None
    log_scale: torch.Tensor | None = None


def empty_state(query: torch.Tensor, value: torch.Tensor, normalize: bool) -> LinearState:
    """Return the state before anything was seen, for query [B, T, H, Dk] and value [B, T, H, Dv]."""
    batch, _, heads, dim = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    memory = query.new_zeros(batch, heads, dim, value.shape[-1], dtype=exact)
    if not normalize:
        return LinearState(memory)
    return LinearState(memory, memory.new_zeros(batch, heads, dim), memory.new_zeros(batch, heads))
