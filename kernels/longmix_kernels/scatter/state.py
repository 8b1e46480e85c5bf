"""The state that stands for keys which queries see through features alone."""

from typing import NamedTuple

import torch


class FeatureState(NamedTuple):
    """Sums over keys, feature by feature, in float32, or float64 for float64 inputs.

    The sums are `exp(log_scale) * memory` and `exp(log_scale) * normalizer`. How a sum is divided between the two
    factors carries no information: nothing that a call returns depends on it.

    Attributes:
        memory: [B, H, m, Dv], the sum of phi_a(k_j) v_j over exp(log_scale).
        normalizer: [B, H, m], the sum of phi_a(k_j) over exp(log_scale).
        log_scale: [B, H, m], the largest log phi_a(k_j); far below every other logarithm if there was no key.
    """

    memory: torch.Tensor
    normalizer: torch.Tensor
    log_scale: torch.Tensor


def lowest(dtype: torch.dtype) -> float:
    """Return the number that stands for the logarithm of 0.

    It is finite, and so are sums of a few of it, so that their differences are not NaN.
    """
    return torch.finfo(dtype).min / 8


def empty_state(like: torch.Tensor, batch: int, heads: int, features: int, value_dim: int) -> FeatureState:
    """Return the state before any key, on the device of `like`, in its dtype or in float32 if that is wider.

    Args:
        like: a tensor of the call.
        batch, heads, features, value_dim: the sizes B, H, m and Dv.
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    memory = like.new_zeros(batch, heads, features, value_dim, dtype=exact)
    normalizer = like.new_zeros(batch, heads, features, dtype=exact)
    return FeatureState(memory, normalizer, torch.full_like(normalizer, lowest(exact)))


def absorb(state: FeatureState, key_features: torch.Tensor, value: torch.Tensor, wanted: torch.Tensor) -> FeatureState:
    """Return the state with more keys added, as decoding does it with a block that leaves the exact part.

    The result is differentiable in everything but `log_scale`, which counts as a constant.

    Args:
        state: the state after earlier keys.
        key_features: [B, T, H, m], log phi(k).
        value: [B, T, H, Dv].
        wanted: bool [B, T], whether to add a key.
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
