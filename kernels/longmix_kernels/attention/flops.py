"""Operations of attention, for torch's `FlopCounterMode`: see `longmix_kernels.flop_formulas`."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.flop_formulas import has_values


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> int:
    """2 (D + Dv) for every pair of a query and a key that it sees."""
    *flat, _ = rest
    return 2 * (query.shape[3] + value.shape[3]) * visible_pairs(query, key, Pattern.of(flat))


def visible_pairs(query: torch.Tensor, key: torch.Tensor, pattern: Pattern) -> int:
    """Pairs of all rows and heads."""
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    lo, hi = (None if x is None or not has_values(x) else x for x in (pattern.lo, pattern.hi))
    first, end = row_bounds(queries, keys, causal=pattern.causal, window=pattern.window, device="cpu")
    if lo is not None:
        first, end = lo, end.to(lo.device)
    if hi is not None:
        end = hi
    first, end = torch.broadcast_tensors(first, end)
    repeats = batch // first.shape[0] * (heads // first.shape[1])
    if pattern.blocks is None or not has_values(pattern.blocks.row_blocks):
        return repeats * int((end - first).clamp(min=0).sum())
    size = pattern.blocks.size
    begin = size * torch.arange(pattern.blocks.row_offsets.shape[0] - 1, device=first.device)
    overlap = (torch.minimum(end.unsqueeze(-1), begin + size) - torch.maximum(first.unsqueeze(-1), begin)).clamp(min=0)
    block = torch.arange(keys - queries, keys, device=first.device) // size
    return repeats * int((overlap * pattern.blocks.mask()[block]).sum())


def count_torch_on_a_cpu() -> None:
    """Let torch count its own kernel for plain causal attention on a CPU, where it has no formula for it.

    For its CUDA kernels it has, which count the whole square of a causal call.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward in flop_registry or backward in flop_registry:
        return

    def count(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> int:
        batch, heads, queries, dim = query.shape
        pairs = queries * (queries + 1) // 2 if causal else queries * key.shape[2]
        return 2 * batch * heads * pairs * (dim + value.shape[3])

    def run(query: Any, key: Any, value: Any, *options: Any, is_causal: bool = False, **_: Any) -> int:
        return count(query, key, value, options[1] if len(options) > 1 else is_causal)

    def run_backward(grad: Any, *inputs: Any, **_: Any) -> int:
        query, key, value, _output, _logsumexp, _dropout, is_causal = inputs
        return 2 * count(query, key, value, is_causal)

    register_flop_formula(forward, get_raw=True)(run)
    register_flop_formula(backward, get_raw=True)(run_backward)
