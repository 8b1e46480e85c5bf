"""Estimate what attention costs by its mathematics. Nothing here is measured.

For each pair of a query and a key, the forward multiplies D + Dv columns, the gradient of queries 2 D + Dv, and the
gradient of keys and values 2 (D + Dv). Each kernel reads or writes each tensor once; all else stays on the chip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from longmix_kernels.attention.bounds import row_bounds
from longmix_kernels.attention.decode_inputs import DecodeInputs
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.launch import LaunchConfig
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.segments import Segment
from longmix_kernels.cost import Work
from longmix_kernels.runtime import has_values

FORWARD = ("forward",)
BACKWARD = ("grad_query", "grad_key_value")
"""The kernels of a call, in the order in which they run."""

# For each row, how many vectors of D columns, vectors of Dv columns and float32 numbers a kernel reads or writes
# (_MOVED), and how many of them copies would have to put in order (_COPIED).
_MOVED = {"forward": (2, 2, 1), "grad_query": (3, 3, 4), "grad_key_value": (3, 3, 2)}
_COPIED = {"forward": (2, 2, 1), "grad_query": (3, 3, 2), "grad_key_value": (1, 1, 0)}


def call_flops(inputs: Inputs) -> int:
    """Return the operations of a call by its definition: 2 (D + Dv) for each pair of a query and a key that it sees."""
    columns = inputs.query.shape[3] + inputs.value.shape[3]
    return 2 * columns * visible_pairs(inputs.query, inputs.key, inputs.pattern)


def decode_flops(inputs: DecodeInputs) -> int:
    """Return the operations of a decoding step: 2 (K + V) for each pair of a query and a key that it sees."""
    batch, length, heads, dim = inputs.query.shape
    width = dim if inputs.new_value is None else inputs.new_value.shape[3]
    pairs = 0 if inputs.new_key is None else batch * heads * length * (length + 1) // 2
    total = 2 * (dim + width) * pairs
    for segment in inputs.segments:
        width = segment.value.shape[3] * (1 if segment.value_codes is None else 8 // segment.value_codes.bits)
        total += 2 * (dim + width) * segment_pairs(inputs.query, segment)
    return total


def decode_weights_flops(inputs: DecodeInputs) -> int:
    """Return the operations of the weights of a decoding step: 2 K for each pair of a query and a cached key."""
    pairs = sum(segment_pairs(inputs.query, segment) for segment in inputs.segments)
    return 2 * inputs.query.shape[3] * pairs


def segment_pairs(query: torch.Tensor, segment: Segment) -> int:
    """Return how many pairs of a query and a key a segment has; this reads its counts, where they have values."""
    batch, length, heads, _ = query.shape
    rows, slots = batch * heads * length, segment.slots
    if segment.index is not None:
        own = segment.index
        return int((own >= 0).sum()) * rows // own.shape[:2].numel() if has_values(own) else rows * own.shape[2]
    bounds = [x for x in (segment.count, segment.first) if x is not None]
    if not bounds or not all(map(has_values, bounds)):
        return rows * slots
    end = torch.tensor(slots) if segment.count is None else segment.count.clamp(max=slots)
    first = torch.tensor(0) if segment.first is None else segment.first.clamp(min=0)[:, None]
    seen = (end - first).clamp(min=0)
    return int(seen.sum()) * rows // seen.numel()


@dataclass(frozen=True)
class Setting:
    """The sizes of a causal call with as many key heads as query heads.

    Attributes:
        rows: tokens times heads, B T H.
        length: tokens of a row of the batch, T.
        dim, value_dim: the head dimensions of keys and of values, D and Dv.
        size: bytes of a number of query, key and value.
        permuted: whether the kernels take rows in an order of their own.
    """

    rows: int
    length: int
    dim: int
    value_dim: int
    size: int = 2
    permuted: bool = False


def kernel_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of every kernel of a call, by name."""
    scores = setting.rows * (setting.length + 1) // 2
    order = 8 * setting.permuted  # an int32, the number of a row, for each row and on average for each step
    return {
        kernel: Work(
            2 * scores * _columns(kernel, setting.dim, setting.value_dim),
            setting.rows * (row_bytes(_MOVED[kernel], setting) + order),
            scores,
            setting.size,
        )
        for kernel in (*FORWARD, *BACKWARD)
    }


def copying_bytes(kernel: str, setting: Setting) -> int:
    """Return the bytes of a kernel whose rows copies put in order before and after, with those of the copies.

    A copy reads and writes. The arithmetic of its indices is not counted.

    Args:
        kernel: the kernel's name.
        setting: the sizes of the call.
    """
    return setting.rows * (row_bytes(_MOVED[kernel], setting) + 2 * row_bytes(_COPIED[kernel], setting))


def tile_work(kernel: str, config: LaunchConfig, setting: Setting) -> Work:
    """Return the work of one step of a kernel's inner loop: the products of a tile, and the bytes that it loads.

    Args:
        kernel: the kernel's name.
        config: its tile.
        setting: the sizes of the call.
    """
    over_rows = kernel == "grad_key_value"
    loaded = (setting.dim + setting.value_dim) * setting.size + 8 * over_rows + 4 * setting.permuted
    scores = config.rows * config.keys
    flops = 2 * scores * _columns(kernel, setting.dim, setting.value_dim)
    return Work(flops, (config.rows if over_rows else config.keys) * loaded, scores, setting.size)


def _columns(kernel: str, dim: int, value_dim: int) -> int:
    """Return how many columns a kernel multiplies for each score."""
    both = dim + value_dim
    return {"forward": both, "grad_query": both + dim, "grad_key_value": 2 * both}[kernel]


def row_bytes(counts: tuple[int, int, int], setting: Setting) -> int:
    """Return the bytes of so many vectors of D columns, vectors of Dv columns and float32 numbers."""
    matrices, value_matrices, numbers = counts
    return (matrices * setting.dim + value_matrices * setting.value_dim) * setting.size + 4 * numbers


def visible_pairs(query: torch.Tensor, key: torch.Tensor, pattern: Pattern) -> int:
    """Return how many pairs of a query row and a key it sees there are, over the whole batch and all heads.

    This reads bounds and block lists, which waits for the device. Where they have no values, it counts plain bounds.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        pattern: which keys a row sees.
    """
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
    """Register a count of operations for torch's own attention kernel on CPUs, for which torch has none.

    torch's counts of its CUDA kernels take the whole square of a causal call; this one takes the pairs that are seen.
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
