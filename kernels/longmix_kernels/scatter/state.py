"""What is remembered of keys that are seen through their features alone."""

from typing import NamedTuple

import torch


class FeatureState(NamedTuple):
    """Sums over keys, feature by feature, in float32, or float64 for float64 inputs.

    The state means `exp(log_scale) * memory` and `exp(log_scale) * normalizer`; how it is divided between the factors
    is no information, and nothing that a call returns depends on it.

    Attributes:
        memory: [B, H, m, Dv], the sum of phi_a(k_j) v_j.
        normalizer: [B, H, m], the sum of phi_a(k_j).
        log_scale: [B, H, m], the largest log phi_a(k_j); far below every other logarithm where there was no key.
    """

    memory: torch.Tensor
    normalizer: torch.Tensor
    log_scale: torch.Tensor


def lowest(dtype: torch.dtype) -> float:
    """The logarithm of nothing: finite, as are sums of a few, so that differences of such are no NaN."""
    return torch.finfo(dtype).min / 8


def empty_state(like: torch.Tensor, batch: int, heads: int, features: int, value_dim: int) -> FeatureState:
    """Return the state before any key, in the dtype (float32 at least) and on the device of `like`."""
    exact = torch.promote_types(like.dtype, torch.float32)
    memory = like.new_zeros(batch, heads, features, value_dim, dtype=exact)
    normalizer = like.new_zeros(batch, heads, features, dtype=exact)
    return FeatureState(memory, normalizer, torch.full_like(normalizer, lowest(exact)))


def absorb(state: FeatureState, key_features: torch.Tensor, value: torch.Tensor, wanted: torch.Tensor) -> FeatureState:
    """Return the state with more keys: what decoding does with a block that leaves the exact part.

    Differentiable in everything but `log_scale`, which counts as a constant.

    Args:
        state: of earlier keys.
        key_features: [B, T, H, m], log phi(k).
        value: [B, T, H, Dv].
        wanted: bool [B, T], keys that are to be absorbed.
    """
    if key_features.shape[1] == 0:
        return state
    exact = state.memory.dtype
    logs = key_features.to(exact).masked_fill(~wanted[..., None, None], lowest(exact))
    log_scale = torch.maximum(state.log_scale, logs.detach().amax(1))
    weights = (logs - log_scale[:, None]).exp().masked_fill(~wanted[..., None, None], 0.0)
    kept = (state.log_scale - log_scale).exp()
    memory = kept[..., None] * state.memory + torch.einsum("bthm,bthv->bhmv", weights, value.to(exact))
    return FeatureState(memory, kept * state.normalizer + weights.sum(1), log_scale)
