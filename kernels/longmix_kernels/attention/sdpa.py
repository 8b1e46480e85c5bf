"""Compute plain causal or full attention by the fastest exact kernel that torch has on this machine.

`attention` covers every set of row bounds. This module covers only what torch's own kernels do, and chooses among them
by what torch and the kernels document; the project has not measured them.
"""

import functools
import importlib
from typing import Any

import torch
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from longmix_kernels.attention.cost import count_torch_on_a_cpu

count_torch_on_a_cpu()

_FLASH_PACKAGES = {"FA3": ("flash_attn_interface", (9,)), "FA4": ("flash_attn.cute.interface", (9, 10))}
"""By torch's name of a flash implementation, its module and the major compute capabilities that it is for."""


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """Compute causal or full attention by `torch.nn.functional.scaled_dot_product_attention`.

    With fewer queries than keys, the queries are the last rows (torch's `is_causal` would make them the first). Unless
    there is only one query, this costs a mask of Tq * Tk bytes, which `attention` does without. On CUDA, the first call
    of the process puts FlashAttention 3 or 4 behind torch's kernel if the package is installed and made for the GPU.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D], same dtype; Hkv divides Hq.
        value: [B, Tk, Hkv, Dv], same dtype.
        causal: whether a row sees no key after its own position; otherwise it sees all keys.
        scale: the factor on the scores, D ** -0.5 by default.

    Returns:
        The output [B, Tq, Hq, Dv], in the dtype of `query`.

    Raises:
        ValueError: `sdpa_supports` is False for this call.
    """
    if not sdpa_supports(query, key, value, causal=causal):
        got = ", ".join(f"{n} {list(x.shape)}" for n, x in (("query", query), ("key", key), ("value", value)))
        raise ValueError(
            f"sdpa got {got}, causal={causal}; allowed are query [B, Tq, Hq, D], key [B, Tk, Hkv, D] and value "
            "[B, Tk, Hkv, Dv] of one dtype and device, Hkv a divisor of Hq, and Tq <= Tk if causal"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    queries, keys = query.shape[1], key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if causal and queries == keys:
        options["is_causal"] = True
    elif causal and queries > 1:
        options["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)
    if query.shape[2] != key.shape[2]:
        options["enable_gqa"] = True
    if query.device.type != "cuda":
        output = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        with torch_attention.sdpa_kernel(_kernel_order(query.device), set_priority=True):
            output = F.scaled_dot_product_attention(q, k, v, **options)
    return output.transpose(1, 2)


def sdpa_supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = True) -> bool:
    """Say whether `sdpa` covers a call: shapes, dtypes and devices fit each other, and every row sees a key.

    Args:
        query, key, value, causal: as in `sdpa`.
    """
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    fits = (
        query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and query.shape[2] % key.shape[2] == 0
    )
    alike = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    return fits and alike and not (causal and query.shape[1] > key.shape[1])


@torch.compiler.assume_constant_result
def _kernel_order(device: torch.device) -> list[SDPBackend]:
    """Return the kernels in the order to try. Each refuses what it does not cover; the last covers everything.

    torch's built-in flash kernel is FlashAttention 2, written for Ampere; cuDNN has kernels for Hopper and Blackwell.
    """
    major, _ = torch.cuda.get_device_capability(device)
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if major < 9 or activate_flash(major):
        first.reverse()
    return [*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.cache
def activate_flash(major: int) -> bool:
    """Put the first FlashAttention package that is made for this GPU behind torch's flash kernel.

    Args:
        major: the first number of the GPU's compute capability.

    Returns:
        Whether there was such a package.
    """
    known = torch_attention.list_flash_attention_impls()
    for name, (module, capabilities) in _FLASH_PACKAGES.items():
        if major in capabilities and name in known:
            try:
                importlib.import_module(module)
            except ImportError:
                continue
            torch_attention.activate_flash_attention_impl(name)
            return True
    return False


def flash_implementation() -> str | None:
    """Return torch's name of the package behind its flash kernel; None for the built-in FlashAttention 2."""
    return torch_attention.current_flash_attention_impl()
