"""Launch a decoding step: tiles, warps and stages of its kernels, its lists, and which calls it covers.

Nothing here imports Triton. `longmix_kernels.launch` has what all engines share.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from longmix_kernels import launch
from longmix_kernels.accelerators import TUNED
from longmix_kernels.attention import launch as whole
from longmix_kernels.attention.checks import TRITON_MAX_DIM
from longmix_kernels.attention.decode_inputs import DecodeInputs
from longmix_kernels.attention.decode_schedule import Layout, Schedule, SegmentShape, Span
from longmix_kernels.attention.segments import Codes, Segment
from longmix_kernels.attention.split_launch import ELSEWHERE, PROGRAMS_PER_PROCESSOR
from longmix_kernels.columns import Columns, cover
from longmix_kernels.launch import LaunchTable
from longmix_kernels.runtime import on_gpu
from longmix_kernels.tensors import unit_stride

KERNELS = ("decode", "decode_wide", "decode_index", "decode_codes", "decode_merge", "decode_weights")
"""`decode_wide` is `decode` with tiles of more query rows, for many rows that share their keys."""

WIDE_ROWS = 64
"""How many query rows a tile of `decode_wide` has."""

FEW_ROWS = 16
"""How many query rows a tile of the other kernels has, the least that a product takes."""

CODE_WIDTH = 32
"""The most columns of codes that are multiplied at once. With 64, the kernel spills at a head dimension of 128."""

CODES_MAX_DIM = 128
"""The largest head dimension that the kernel for codes covers. At 256 it spills with every tile that was tried."""


@dataclass(frozen=True)
class LaunchConfig(whole.LaunchConfig):
    """One way to launch a kernel, with the attributes of attention's.

    `rows` is fixed, since lists depend on it. `keys` may be halved: those of a step, or the parts of a step of the
    merge. They divide `tile_keys`. None loads by descriptors.
    """

    def used_by(self, kernel: str) -> Collection[str]:
        """Return the names of the attributes that change a kernel's code."""
        return {"keys", "warps", "stages"}

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles and may be halved."""
        return {"keys": self.keys}

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments; `SegmentCall` has the rows."""
        return {"KEYS": self.keys}


# Rows, keys, warps and stages for each of `whole.WIDTHS`; `decode_codes` has no use for the last two. Each entry fits
# into the 99 KiB of shared memory of consumer GPUs. None has been timed. None spills under Triton 3.9. Under 3.6 those
# of `decode_codes` at 64 and 96 columns spill up to 60 bytes and a few others up to 32: its ptxas stops at 96, 128 or
# 168 registers.
_TUNED = {
    "decode": ((16, 64, 4, 4), (16, 32, 4, 4), (16, 64, 4, 3), (16, 32, 8, 3), (16, 32, 4, 3)),
    "decode_wide": ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3), (64, 16, 8, 2), (64, 32, 8, 2)),
    "decode_index": ((16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 3), (16, 32, 8, 2), (16, 32, 8, 2)),
    "decode_codes": ((16, 32, 8, 2), (16, 32, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "decode_merge": ((1, 16, 4, 1), (1, 16, 4, 1), (1, 16, 4, 1), (1, 16, 4, 1), (1, 16, 4, 1)),
    "decode_weights": ((16, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1)),
}
_BLACKWELL = _TUNED | {
    "decode_wide": (*_TUNED["decode_wide"][:3], (64, 32, 8, 2), _TUNED["decode_wide"][4]),
}
TABLE = LaunchTable(
    LaunchConfig,
    whole.WIDTHS,
    dict.fromkeys(TUNED, _TUNED) | {100: _BLACKWELL},
    float32={kernel: (rows[0][0], 16, 4, 1) for kernel, rows in _TUNED.items()},
    interpreted={kernel: LaunchConfig(rows[0][0], 16, 1, 1) for kernel, rows in _TUNED.items()},
    measured={},
)


def tile_keys(width: int) -> int:
    """Return how many keys a tile of the work list has, for the larger head dimension."""
    return 128 if width <= 128 else 64


def code_width(dim: int, each: int) -> int:
    """Return how many columns of codes to multiply at once: a power of two that divides both numbers.

    Args:
        dim: the head dimension.
        each: how many channels share an entry of what codes are multiplied with.
    """
    return min(dim & -dim, each & -each, CODE_WIDTH)


class SegmentCall(launch.Call[LaunchConfig]):
    """One segment of a step, as its kernels take it.

    Attributes:
        segment: the segment.
        kernel: the kernel that reads it.
        shape: what the work list depends on.
        launched: how many programs that kernel is launched with.
    """

    TABLE = TABLE

    def __init__(self, inputs: DecodeInputs, segment: Segment) -> None:
        self.query, self.segment, self.scale = inputs.query, segment, inputs.scale
        batch, self.queries, heads, self.dim = inputs.query.shape
        self.own_rows, self.key_heads, self.slots = segment.key.shape[:3]
        self.value_dim = width_of(segment.value, segment.value_codes)
        self.group, repeats = heads // self.key_heads, batch // self.own_rows
        self.key_repeats = 1
        if segment.index is not None:
            # Rows read keys of their own, so that each is a group, whichever row of the segment has the keys.
            self.own_rows, self.key_repeats, repeats = batch, repeats, 1
            self.slots = segment.index.shape[2]
        rows = self.queries * self.group * repeats
        self.kernel = kernel_of(segment, rows)
        tile_rows = WIDE_ROWS if self.kernel == "decode_wide" else FEW_ROWS
        size = tile_keys(max(self.dim, self.value_dim))
        self.shape = SegmentShape(self.own_rows, self.key_heads, repeats, rows, tile_rows, size)
        self.launched = programs_of(inputs.query)

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return TABLE.entry(kernel, architecture, size, max(self.dim, self.value_dim))

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration with steps in which all keys share the numbers of their codes."""
        codes = self.segment.key_codes
        if codes is None or kernel == "decode_merge":
            return config
        return replace(config, keys=min(config.keys, token_group(codes, self.segment.slots)))

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel is launched with."""
        if kernel == "decode_weights":
            return self.shape.groups * -(-self.slots // config.keys)
        return self.launched

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        own = {"ROWS": self.shape.tile_rows, "NEGATIVE_SCALE": self.scale < 0}
        return {**constants_of(self.dim, self.value_dim, self.segment, self.query.dtype), **own}

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [R, S, Hk, .], as kernels of [B, T, H, D] take them, without a copy."""
        key, value = (unit_stride(x).transpose(1, 2) for x in (self.segment.key, self.segment.value))
        return key, value


class MergeCall(launch.Call[LaunchConfig]):
    """The merge of a step: slots of all segments, and the new tokens.

    Attributes:
        query: [B, T, Hq, K].
        key_heads: Hk.
        value_dim: V.
    """

    TABLE = TABLE

    def __init__(self, inputs: DecodeInputs) -> None:
        self.query = inputs.query
        self.key_heads, self.value_dim = sizes_of(inputs)

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return TABLE.entry(kernel, architecture, size, max(self.query.shape[3], self.value_dim))

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration as it is."""
        return config

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel is launched with: one for each query row."""
        return self.query.shape[:3].numel()

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return constants_of(self.query.shape[3], self.value_dim, None, self.query.dtype)


def constants_of(dim: int, value_dim: int, segment: Segment | None, dtype: torch.dtype) -> dict[str, object]:
    """Return the compile-time arguments that head dimensions, codes and the dtype of the query decide."""
    found: dict[str, object] = {
        "DIM": Columns.of(dim),
        "VALUE_DIM": Columns.of(value_dim),
        "DIM_COVER": cover(dim),
        "VALUE_COVER": cover(value_dim),
    }
    key_codes, value_codes = (None, None) if segment is None else (segment.key_codes, segment.value_codes)
    width = code_width(dim, dim)
    value_width = 0 if value_codes is None else code_width(value_dim, channel_group(value_codes, value_dim))
    return {
        **found,
        "KEY_BITS": 0 if key_codes is None else key_codes.bits,
        "VALUE_BITS": 0 if value_codes is None else value_codes.bits,
        "WIDTH": width,
        "COUNT": dim // width,
        "VALUE_WIDTH": value_width,
        "VALUE_COUNT": value_dim // max(value_width, 1),
        "FULL": dtype == torch.float32,
    }


def kernel_of(segment: Segment, rows: int) -> str:
    """Return the name in the table of the kernel that reads a segment for so many query rows of a key head."""
    if segment.index is not None:
        return "decode_index"
    if segment.key_codes is not None:
        return "decode_codes"
    return "decode" if rows <= FEW_ROWS else "decode_wide"


def width_of(x: torch.Tensor, codes: Codes | None) -> int:
    """Return how many numbers a row of keys or values stands for."""
    return x.shape[3] if codes is None else x.shape[3] * 8 // codes.bits


def sizes_of(inputs: DecodeInputs) -> tuple[int, int]:
    """Return the key heads and the head dimension of values of a step."""
    if inputs.new_value is not None:
        return inputs.new_value.shape[2], inputs.new_value.shape[3]
    first = inputs.segments[0]
    return first.key.shape[1], width_of(first.value, first.value_codes)


def token_group(codes: Codes, slots: int) -> int:
    """Return how many tokens share every number that codes are multiplied with or added to."""
    return min(slots // x.shape[2] if x.shape[2] > 1 else 1 << 30 for x in _numbers(codes))


def channel_group(codes: Codes, dim: int) -> int:
    """Return how many channels share a step and a low."""
    return min(dim // x.shape[3] if x.shape[3] > 1 else dim for x in (codes.low, codes.step))


def _numbers(codes: Codes) -> list[torch.Tensor]:
    return [x for x in (codes.low, codes.step, codes.scale) if x is not None]


def uncovered(inputs: DecodeInputs) -> str | None:
    """Return what of a call the kernels do not cover, and what is allowed; None if they cover it."""
    query = inputs.query
    if query.dtype == torch.float64:
        return "query of dtype torch.float64; allowed are torch.float16, torch.bfloat16 and torch.float32"
    widest = max(query.shape[3], *(width_of(x.value, x.value_codes) for x in inputs.segments), 0)
    if widest > TRITON_MAX_DIM:
        return f"head dimension {widest}; allowed are 1 to {TRITON_MAX_DIM}"
    for number, segment in enumerate(inputs.segments):
        reason = _uncovered_segment(segment, query)
        if reason is not None:
            return f"segments[{number}] with {reason}"
    return None


def _uncovered_segment(segment: Segment, query: torch.Tensor) -> str | None:
    key_codes, value_codes = segment.key_codes, segment.value_codes
    if key_codes is None and value_codes is None:
        if segment.key.dtype != query.dtype or segment.value.dtype != query.dtype:
            return (
                f"keys of {segment.key.dtype} and values of {segment.value.dtype}; allowed is {query.dtype}, as query"
            )
        return None
    if key_codes is None or value_codes is None:
        return "codes of keys or of values alone; allowed are both or none"
    if segment.index is not None:
        return "codes and an index; allowed is one of them"
    dim, value_dim = query.shape[3], width_of(segment.value, value_codes)
    if dim % 16 or code_width(value_dim, channel_group(value_codes, value_dim)) < 16:
        return f"codes for heads of {dim} and {value_dim}; allowed are multiples of 16, in groups of such"
    if max(dim, value_dim) > CODES_MAX_DIM:
        return f"codes for heads of {max(dim, value_dim)}; allowed are at most {CODES_MAX_DIM}"
    by_channel = [(key_codes.low, dim), (key_codes.step, dim), (key_codes.scale, dim), (value_codes.scale, value_dim)]
    if any(x is not None and (x.shape[3] != width or x.stride(3) != 1) for x, width in by_channel):
        return "channels that share a step of keys or a scale; allowed is one for each channel, side by side"
    group = token_group(key_codes, segment.slots)
    if group < 16 or group & (group - 1):
        return f"keys that share a step by {group}; allowed are powers of two from 16 on"
    if any(x.shape[2] != segment.slots for x in (value_codes.low, value_codes.step)):
        return "values whose tokens share a step; allowed is one for each token"
    if any(x is not None and x.shape[2] > 1 for x in (key_codes.scale, value_codes.scale)):
        return "a scale that changes from token to token; allowed is one for each channel"
    return None


def programs_of(query: torch.Tensor) -> int:
    """Return with how many programs each segment's kernel is launched: two for each multiprocessor."""
    return PROGRAMS_PER_PROCESSOR * (launch.processors_of(query.device) if on_gpu(query) else ELSEWHERE)


@functools.lru_cache(maxsize=256)
def layout_of(shapes: tuple[SegmentShape, ...], programs: int) -> Layout:
    """Return where everything lies in the lists of a step, the same object for the same shapes."""
    return Layout(shapes, programs)


def schedule_decoding(query: torch.Tensor, segments: Sequence[Segment], spans: Sequence[Sequence[Span]]) -> Schedule:
    """Return the lists of a step such that its owner can rewrite them in place, as for a CUDA graph.

    Shapes are fixed from then on: segments are whole buffers, whose `count` on the device says how much of them is
    read. `Schedule.update` has to be called before a step whose spans pass a multiple of a tile.

    Args:
        query, segments: as in `decode_attention`.
        spans: of each segment the slots that may hold keys: one span for all rows, one for each row of the segment (of
            the index, where it has one), or one for each row and head.

    Raises:
        ValueError: the Triton kernels do not cover the segments, or there is another number of spans.
    """
    inputs = DecodeInputs(query, None, None, tuple(segments), None, 1.0)
    reason = uncovered(inputs)
    if reason is not None or len(spans) != len(segments):
        raise ValueError(f"schedule got {reason or f'{len(spans)} lists of spans for {len(segments)} segments'}")
    shapes = tuple(SegmentCall(inputs, segment).shape for segment in segments)
    return Schedule(layout_of(shapes, programs_of(query)), spans, query.device)


def lists_of(layout: Layout, spans: Sequence[Sequence[Span]], device: torch.device) -> torch.Tensor:
    """Return the lists of a step on its device, which all layers and all steps with these tiles share."""
    tiles = tuple(
        tuple((first // shape.tile_keys, -(-end // shape.tile_keys)) for first, end in own)
        for shape, own in zip(layout.segments, spans, strict=True)
    )
    return _lists(layout, tiles, device)


@functools.lru_cache(maxsize=256)
def _lists(layout: Layout, tiles: tuple[tuple[Span, ...], ...], device: torch.device) -> torch.Tensor:
    spans = [
        [(first * shape.tile_keys, end * shape.tile_keys) for first, end in own]
        for shape, own in zip(layout.segments, tiles, strict=True)
    ]
    return Schedule(layout, spans, device).lists
