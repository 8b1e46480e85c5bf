"""How the attention kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `TABLE` is the one place that says how a kernel is launched; `overridden` replaces an entry
for a benchmark or a test. The entries are fixed, so no length and no batch size ever starts a search or a compile.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from longmix_kernels.attention.pattern import Pattern

KERNELS = ("forward", "grad_query", "grad_key_value")
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that the table has entries for. Others use the newest that is not newer."""


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel.

    Attributes:
        rows: query rows of a tile.
        keys: key rows of a tile.
        warps: warps of a program.
        stages: tiles that loads are ahead of their use.
        fold: start the products of the key and value gradients from the row vectors that are added to them. Saves
            registers where products add up in registers (sm_90), and costs many where they do not (sm_100).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    fold: bool = False

    def tiles(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel."""
        return {"ROWS": self.rows, "KEYS": self.keys}

    def options(self) -> dict[str, int | bool]:
        """Return the options of the compiler; from Triton 3.10 on, multiply-adds are no longer its default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


Key = tuple[str, int, int, int]
"""Kernel, architecture, bytes of an element, and the largest head dimension that the entry is for."""

WIDTHS = (64, 96, 128, 192, 256)
"""The head dimensions, of keys or of values, up to which an entry is for."""


Row = tuple[int, int, int, int] | tuple[int, int, int, int, bool]


def _entries(architecture: int, size: int, table: Mapping[str, Sequence[Row]]) -> dict[Key, LaunchConfig]:
    return {
        (kernel, architecture, size, width): LaunchConfig(*row)
        for kernel, rows in table.items()
        for width, row in zip(WIDTHS, rows, strict=True)
    }


# One row per entry of WIDTHS: rows, keys, warps, stages and perhaps fold. Each is a tile that was found to compile
# without a spill at that head dimension, causal, under Triton 3.6 and 3.9 (the last of sm_90: 3.6 only).
# None has been timed.
_AMPERE: dict[str, Sequence[Row]] = {
    "forward": ((64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2), (64, 32, 8, 2)),
    "grad_query": ((128, 64, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2), (64, 16, 8, 1), (64, 64, 8, 1)),
    "grad_key_value": ((32, 128, 8, 3), (16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1), (16, 64, 8, 1)),
}
_HOPPER: dict[str, Sequence[Row]] = {
    "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    "grad_query": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    "grad_key_value": (
        (64, 128, 8, 2, True),
        (32, 128, 8, 1, True),
        (32, 128, 8, 2, True),
        (16, 64, 8, 2, True),
        (16, 64, 8, 2),
    ),
}
_BLACKWELL: dict[str, Sequence[Row]] = {
    "forward": ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    "grad_query": ((64, 64, 4, 3), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    "grad_key_value": ((64, 128, 8, 1), (32, 128, 8, 1), (32, 128, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
}
# Products of float32 run outside the tensor cores, on every architecture alike; they are for checks, and may spill.
_FLOAT32: dict[str, Sequence[Row]] = {
    "forward": ((32, 16, 8, 1),) * 5,
    "grad_query": ((16, 16, 8, 1),) * 5,
    "grad_key_value": ((16, 32, 8, 1),) * 5,
}
TABLE: dict[Key, LaunchConfig] = {
    **_entries(80, 2, _AMPERE),
    **_entries(90, 2, _HOPPER),
    **_entries(100, 2, _BLACKWELL),
    **{key: config for architecture in ARCHITECTURES for key, config in _entries(architecture, 4, _FLOAT32).items()},
}

_INTERPRETED = LaunchConfig(rows=32, keys=32, warps=1, stages=1)
_overrides: dict[str, LaunchConfig] = {}


@contextlib.contextmanager
def overridden(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def table_entry(kernel: str, architecture: int, size: int, width: int) -> LaunchConfig:
    """Return the configuration of a kernel for elements of `size` bytes and head dimensions up to `width`."""
    known = max(a for a in ARCHITECTURES if a <= architecture)
    return TABLE[kernel, known, size, min(w for w in WIDTHS if w >= width)]


def split_dim(dim: int) -> tuple[int, int]:
    """Return the powers of two, at least 16, that cover a head dimension; the second is 0 if the first is enough.

    48, 80, 96, 144, 160 and 192 waste nothing (32 + 16, 64 + 16, 64 + 32, 128 + 16, 128 + 32, 128 + 64), where one
    power of two would waste up to 60 %; 112, 176 and 240 waste 16 columns, 224 wastes 32 and 208 wastes 48.
    """
    main = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - main
    return main, max(1 << (rest - 1).bit_length(), 16) if rest > 0 else 0


class Call:
    """The tensors and numbers of one call, as the kernels take them."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: Pattern,
        scale: float,
    ) -> None:
        lo, hi, window = pattern.lo, pattern.hi, pattern.window
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.lo, self.hi = (None if x is None else unit_stride(x) for x in (lo, hi))
        self.batch, self.queries, self.heads, self.dim = query.shape
        _, self.keys, self.key_heads, self.value_dim = value.shape
        self.group = self.heads // self.key_heads
        self.scale = scale
        # A row sees no more than all keys, and i + window must stay within int32.
        self.window = 0 if window is None else min(window, self.keys)
        if hi is not None:
            self.mode = "bounds"
        elif lo is not None:
            self.mode = "documents"
        elif pattern.causal:
            self.mode = "causal" if window is None else "window"
        else:
            self.mode = "full"

    def scale_log2(self) -> float:
        """Return scale * log2(e), never 0: a hidden score is -inf before the multiplication, and L is divided by it."""
        return math.copysign(max(abs(self.scale), 1e-30), self.scale) * math.log2(math.e)

    def strides(self, *names: str) -> list[int]:
        """Strides of batch, row and head of tensors [B, T, H, D]."""
        return [stride for name in names for stride in getattr(self, name).stride()[:3]]

    def bound_strides(self, *bounds: torch.Tensor | None) -> list[int]:
        """Strides of batch and head of bounds [B or 1, H or 1, T], 0 where one is shared and where there is none."""
        return [
            0 if bound is None or bound.shape[axis] == 1 else bound.stride(axis) for bound in bounds for axis in (0, 1)
        ]

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments that every kernel takes."""
        main, rest = split_dim(self.dim)
        value_main, value_rest = split_dim(self.value_dim)
        return {
            "MODE": self.mode,
            "DIM": self.dim,
            "DIM_MAIN": main,
            "DIM_REST": rest,
            "VALUE_DIM": self.value_dim,
            "VALUE_MAIN": value_main,
            "VALUE_REST": value_rest,
            "UPCAST": self.query.device.type == "cpu",
        }


def launch_config(kernel: str, call: Call) -> LaunchConfig:
    """Return the configuration with which to launch a kernel for this call."""
    if kernel in _overrides:
        return _overrides[kernel]
    if call.query.device.type == "cpu":
        return _INTERPRETED
    width = max(call.dim, call.value_dim)
    return table_entry(kernel, _architecture(call.query.device), call.query.element_size(), width)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one; Triton launches on that."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if its last axis has unit stride, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
