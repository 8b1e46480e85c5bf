"""Compute causal attention within packed documents by torch's FlashAttention for sequences of unlike lengths.

`attention` covers packed documents on every device and in every dtype. This module covers what FlashAttention does:
float16 and bfloat16 on a CUDA GPU. It calls `torch.nn.attention.varlen.varlen_attn`, which is FlashAttention 2, or 3
and 4 where `sdpa` has put those behind torch's kernel. Nothing here waits for the device: a tensor says where the
documents start, and its length says how many there are at most.

FlashAttention's backward pass adds to the gradient of the queries in any order, as that of torch's plain causal kernel
does. So two runs may differ in rounding; with `torch.use_deterministic_algorithms(True)`, torch takes a fixed order.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import varlen

from longmix_kernels.attention.sdpa import activate_flash, flash_implementation
from longmix_kernels.runtime import on_gpu

ROWS_PER_SEQUENCE = 128
"""How many rows of memory FlashAttention's backward pass takes for each sequence, besides those of the tokens."""

_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
"""The argument that lets `varlen_attn` take fewer key heads than query heads. Versions without it take them unasked."""

_FLASH_4_LEARNS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether torch's bridge to FlashAttention 4 has the backward pass for `varlen_attn`; before 2.13 it refuses it."""


def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute causal attention in which a token sees its own document only.

    Args:
        query: [B, T, Hq, D], float16 or bfloat16; D is a multiple of 8, at most 256.
        key: [B, T, Hkv, D], same dtype; Hkv divides Hq.
        value: [B, T, Hkv, D], same dtype.
        starts: int32 [n + 1], ascending: where the documents start among the B * T tokens of all rows; the last number
            is B * T itself. Each row begins a document. A repeated start stands for a document without tokens.
        scale: the factor on the scores, D ** -0.5 by default.

    Returns:
        The output [B, T, Hq, D], in the dtype of `query`.

    Raises:
        ValueError: `packed_supports` is False for this call.
    """
    if not packed_supports(query, key, value, starts):
        got = ", ".join(
            f"{name} {x.dtype} {list(x.shape)} on {x.device}"
            for name, x in (("query", query), ("key", key), ("value", value), ("starts", starts))
        )
        raise ValueError(
            f"packed got {got}; allowed are query [B, T, Hq, D], key and value [B, T, Hkv, D] of float16 or bfloat16, "
            "Hkv a divisor of Hq, D a multiple of 8 that FlashAttention has for this GPU, and int32 starts, at most "
            f"one for {ROWS_PER_SEQUENCE} tokens, on one CUDA device"
        )
    attend: Callable[..., Any] = varlen.varlen_attn
    longest = query.shape[1]
    grouped = _GROUPED if query.shape[2] != key.shape[2] else {}
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    # `varlen_attn` has no argument for causal attention; a window of (-1, 0) means it.
    output = attend(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), scale=scale, **grouped)
    result: torch.Tensor = output.view(query.shape)
    return result


def packed_supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> bool:
    """Say whether `packed` covers a call. This looks at shapes, dtypes and the device, not at values.

    It covers at most one document for `ROWS_PER_SEQUENCE` tokens. For more of them `attention` is better: it takes no
    memory for a document, and visits no tile in vain.

    Args:
        query, key, value, starts: as in `packed`.
    """
    if not on_gpu(query) or not query.dim() == key.dim() == value.dim() == 4 or starts.dim() != 1:
        return False
    fits = (
        query.shape[:2] == key.shape[:2]
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and query.shape[2] % key.shape[2] == 0
        and starts.shape[0] - 1 <= max(1, query.shape[0] * query.shape[1] // ROWS_PER_SEQUENCE)
    )
    alike = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device == starts.device
    if not fits or not alike or starts.dtype != torch.int32 or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _covers(query.device, query.shape[3])


@torch.compiler.assume_constant_result
def _covers(device: torch.device, head_dim: int) -> bool:
    """Say whether FlashAttention in torch has forward and backward passes for heads of this size on this GPU."""
    if head_dim % 8 or head_dim > 256:
        return False
    if device.type != "cuda":  # the device stands for a GPU that is not there, as when memory is planned
        return True
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(device)
    activate_flash(capability[0])
    if flash_implementation() == "FA4":
        return head_dim <= 128 and _FLASH_4_LEARNS
    # The kernel of the backward pass for 224 needs more shared memory than consumer GPUs have.
    small = capability in ((8, 6), (8, 9)) or capability[0] == 12
    return capability[0] >= 8 and not (small and 192 < head_dim <= 224)
