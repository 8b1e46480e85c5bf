"""Check the arguments of block-local attention with far keys. Every error names what is allowed."""

import torch

from longmix_kernels.attention.checks import TRITON_MAX_DIM, check_inputs
from longmix_kernels.runtime import check_device
from longmix_kernels.scatter.state import FeatureState

__all__ = ["TRITON_MAX_DIM", "check_features", "check_inputs", "check_sizes", "check_state"]


def check_features(
    query: torch.Tensor, key: torch.Tensor, query_features: torch.Tensor | None, key_features: torch.Tensor | None
) -> None:
    """Check log features against query and key; they are float32 whatever the dtype of those, or float64 with float64.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        query_features: [B, Tq, Hq, m], or None.
        key_features: [B, Tk, Hkv, m], or None.

    Raises:
        ValueError: one of them is missing, or has a wrong shape, dtype or device.
    """
    if (query_features is None) != (key_features is None):
        missing = "query_features" if query_features is None else "key_features"
        raise ValueError(f"{missing} is missing; query_features and key_features come together")
    exact = torch.promote_types(query.dtype, torch.float32)
    for name, x, of in (("query_features", query_features, query), ("key_features", key_features, key)):
        if x is None:
            continue
        if x.dim() != 4 or x.shape[:3] != of.shape[:3] or x.shape[3] < 1:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {list(of.shape[:3])} and m, at least 1")
        if x.dtype != exact:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is {exact}: logarithms are never rounded")
        check_device(name, x, query)
    if query_features is not None and key_features is not None and query_features.shape[3] != key_features.shape[3]:
        got, allowed = list(key_features.shape), query_features.shape[3]
        raise ValueError(f"key_features has shape {got}; allowed are {allowed} features, as query_features")


def check_sizes(query: torch.Tensor, key: torch.Tensor, block_size: int, past_blocks: int) -> None:
    """Check the sizes of blocks, and that there are no more queries than keys.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        block_size: tokens of a block, at least 1.
        past_blocks: whole blocks before its own that a query sees exactly, at least 0.

    Raises:
        ValueError: a size is not allowed.
    """
    if block_size < 1 or past_blocks < 0:
        raise ValueError(
            f"block_size is {block_size} and past_blocks is {past_blocks}; allowed are at least 1 and at least 0"
        )
    if query.shape[1] > key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} rows and key {key.shape[1]}; allowed are at most as many")


def check_state(
    key: torch.Tensor, value: torch.Tensor, key_features: torch.Tensor | None, state: FeatureState | None
) -> None:
    """Check an initial state.

    Args:
        key: [B, Tk, Hkv, D].
        value: [B, Tk, Hkv, Dv].
        key_features: [B, Tk, Hkv, m], or None.
        state: the state, or None.

    Raises:
        ValueError: the state comes without features, or has a wrong shape, dtype or device.
    """
    if state is None:
        return
    if key_features is None:
        raise ValueError("initial_state is given without key_features; allowed is None")
    batch, _, heads, features = key_features.shape
    sums = batch, heads, features
    for name, shape in (("memory", (*sums, value.shape[3])), ("normalizer", sums), ("log_scale", sums)):
        x = getattr(state, name)
        if tuple(x.shape) != shape or x.dtype != key_features.dtype:
            allowed = f"{key_features.dtype} {list(shape)}"
            raise ValueError(f"initial_state.{name} is {x.dtype} {list(x.shape)}; allowed is {allowed}")
        check_device(f"initial_state.{name}", x, key)
