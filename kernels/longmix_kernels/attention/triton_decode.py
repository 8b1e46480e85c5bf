"""Run a decoding step on a GPU: a kernel for each segment, one merge, and a kernel for the weights of a segment."""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from longmix_kernels.attention import decode_launch
from longmix_kernels.attention.decode_inputs import DecodeInputs
from longmix_kernels.attention.decode_launch import MergeCall, SegmentCall, layout_of, lists_of
from longmix_kernels.attention.decode_schedule import Layout, Places
from longmix_kernels.attention.segments import Codes
from longmix_kernels.attention.triton_decode_codes import CodeNumbers, decode_codes_kernel
from longmix_kernels.attention.triton_decode_exact import decode_kernel
from longmix_kernels.attention.triton_decode_merge import decode_merge_kernel
from longmix_kernels.attention.triton_decode_weights import decode_weights_kernel
from longmix_kernels.tensors import PerRow, aligned, per_row, strided, unit_stride


def triton_decode(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, T, Hq, V] in the dtype of the query, and the logsumexp [B, T, Hq] in float32.

    Args:
        inputs: a call for which `decode_launch.uncovered` has nothing to say.

    Raises:
        ValueError: the schedule has another size than the lists of this call.
    """
    query = unit_stride(inputs.query)
    inputs = replace(inputs, query=query)
    calls = [SegmentCall(inputs, segment) for segment in inputs.segments]
    layout = layout_of(tuple(call.shape for call in calls), decode_launch.programs_of(query))
    lists = _lists(inputs, calls, layout)
    merge = MergeCall(inputs)
    partial = query.new_empty(layout.part_rows, merge.value_dim, dtype=torch.float32)
    partial_logsumexp = query.new_empty(layout.part_rows, dtype=torch.float32)
    for call, places in zip(calls, layout.places, strict=True):
        _read(call, places, lists, partial, partial_logsumexp)
    output = query.new_empty(*query.shape[:3], merge.value_dim)
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    new = [None if x is None else strided(unit_stride(x))[0] for x in (inputs.new_key, inputs.new_value)]
    merge.launch(
        "decode_merge",
        decode_merge_kernel,
        *strided(query),
        *new,
        lists,
        partial,
        partial_logsumexp,
        output,
        logsumexp,
        scale_log2(inputs.scale),
        query.shape[1],
        merge.key_heads,
        query.shape[2] // merge.key_heads,
        len(calls),
    )
    return output, logsumexp


def triton_decode_weights(inputs: DecodeInputs) -> tuple[torch.Tensor, ...]:
    """Return the weights float32 [B, Hkv, G, T, S] of each segment; with an index, S is its length.

    Args:
        inputs: the call, with the logsumexp of all its keys.
    """
    inputs = replace(inputs, query=unit_stride(inputs.query))
    return tuple(_weights(SegmentCall(inputs, segment), inputs.logsumexp) for segment in inputs.segments)


def _weights(call: SegmentCall, logsumexp: torch.Tensor | None) -> torch.Tensor:
    assert logsumexp is not None
    segment, (key, _) = call.segment, call.tensors()
    shape = call.query.shape[0], call.key_heads, call.group, call.queries, call.slots
    weights = call.query.new_empty(shape, dtype=torch.float32)
    call.launch(
        "decode_weights",
        decode_weights_kernel,
        *strided(call.query, key),
        *_read_slots(call),
        *code_numbers(segment.key_codes, segment.slots, call.dim),
        logsumexp.contiguous(),
        weights,
        call.scale,
        call.slots,
        call.shape.rows,
        call.shape.row_tiles,
        call.key_heads,
        call.key_repeats,
        call.queries,
        call.group,
    )
    return weights


def scale_log2(scale: float) -> float:
    """Return scale * log2(e), but never 0, since kernels multiply hidden scores of -inf by it."""
    return math.copysign(max(abs(scale), 1e-30), scale) * math.log2(math.e)


def code_numbers(codes: Codes | None, slots: int, width: int) -> list[CodeNumbers | None]:
    """Return low, step and scale of codes as kernels take them, None for what is absent.

    Args:
        codes: the codes of keys or of values, or None.
        slots: how many slots they have.
        width: the head dimension.
    """
    if codes is None:
        return [None, None, None]
    return [None if x is None else _code_numbers(x, slots, width) for x in (codes.low, codes.step, codes.scale)]


def _lists(inputs: DecodeInputs, calls: Iterable[SegmentCall], layout: Layout) -> torch.Tensor:
    if inputs.schedule is None:
        return lists_of(layout, [((0, call.slots),) for call in calls], inputs.query.device)
    if inputs.schedule.shape != (layout.size,) or inputs.schedule.dtype != torch.int32:
        got = f"{inputs.schedule.dtype} {list(inputs.schedule.shape)}"
        raise ValueError(f"schedule is {got}; allowed is torch.int32 [{layout.size}] for these segments")
    return inputs.schedule


def _read_slots(call: SegmentCall) -> list[PerRow | None]:
    """Return count, first and index of a segment as kernels take them."""
    count, first = call.segment.count, call.segment.first
    return per_row(
        None if count is None else count.unsqueeze(-1),
        None if first is None else first[:, None, None],
        call.segment.index,
    )


def _read(
    call: SegmentCall, places: Places, lists: torch.Tensor, partial: torch.Tensor, partial_logsumexp: torch.Tensor
) -> None:
    """Launch the kernel that reads a segment, into its parts."""
    segment, shape = call.segment, call.shape
    count, first, index = _read_slots(call)
    numbers = (
        lists,
        partial,
        partial_logsumexp,
        scale_log2(call.scale),
        places.items,
        places.programs,
        places.parts,
        call.slots,
        shape.rows,
        shape.row_tiles,
        shape.height,
        shape.tile_keys,
    )
    head = (*strided(call.query, *call.tensors()), count, first)
    if call.kernel == "decode_codes":
        widths = (segment.key_codes, call.dim), (segment.value_codes, call.value_dim)
        codes = [x for own, width in widths for x in code_numbers(own, segment.slots, width)]
        call.launch(call.kernel, decode_codes_kernel, *head, *codes, *numbers, call.queries, call.group)
    else:
        call.launch(call.kernel, decode_kernel, *head, index, *numbers, call.key_repeats, call.queries, call.group)


def _code_numbers(x: torch.Tensor, slots: int, width: int) -> CodeNumbers:
    x = aligned(x)
    strides = [0 if size == 1 else 16 * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    # One entry for all tokens stands for more of them than there are.
    each = [_ALL if own == 1 else 16 * (size // own) for own, size in zip(x.shape[2:], (slots, width), strict=True)]
    return CodeNumbers(x, *strides, *each)


_ALL = 1 << 30
"""Sixteen times as many tokens, or channels, as a segment may have."""
