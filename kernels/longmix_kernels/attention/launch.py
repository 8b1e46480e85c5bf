"""How the attention kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `TABLE` is the one place that says how a kernel is launched; `overridden` replaces an entry
for a benchmark or a test. The entries are fixed, so no length and no batch size ever starts a search or a compile.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.launching import architecture_of, dim_constants, is_padded, replaced, unit_stride

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

    def within(self, block: int) -> "LaunchConfig":
        """Return the same with tiles that fit into blocks of this many rows and keys; 0 stands for no blocks."""
        if not block or max(self.rows, self.keys) <= block:
            return self
        # More warps than a tile has work for only cost registers.
        warps = min(self.warps, 4) if block < 64 else self.warps
        return replace(self, rows=min(self.rows, block), keys=min(self.keys, block), warps=warps)

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
# What needs more registers than a plain call: per feature, entries that replace those of the table. With these, 64
# and 128 columns compile without a spill, causal and with documents, under Triton 3.6 and 3.9. What still spills is
# `grad_key_value` on sm_90 beyond 128 columns, with a feature or with columns to mask. None has been timed.
NARROWER: dict[str, dict[tuple[str, int, int], LaunchConfig]] = {
    "permuted": {
        ("forward", 80, 64): LaunchConfig(64, 64, 4, 2),
        ("forward", 80, 96): LaunchConfig(64, 32, 4, 3),
        ("forward", 80, 192): LaunchConfig(64, 16, 4, 3),
        ("forward", 90, 128): LaunchConfig(128, 64, 8, 3),
        ("grad_query", 80, 64): LaunchConfig(128, 64, 8, 2),
        ("grad_key_value", 80, 64): LaunchConfig(32, 128, 8, 2),
        ("grad_key_value", 80, 96): LaunchConfig(32, 64, 8, 2),
        ("grad_key_value", 80, 128): LaunchConfig(32, 64, 8, 2),
        ("grad_key_value", 80, 256): LaunchConfig(32, 32, 8, 1),
    },
    "alibi": {
        ("forward", 90, 128): LaunchConfig(128, 64, 8, 3),
        ("forward", 100, 64): LaunchConfig(128, 64, 8, 3),
        ("grad_key_value", 80, 256): LaunchConfig(32, 32, 8, 1),
        ("grad_key_value", 90, 128): LaunchConfig(32, 64, 8, 2, fold=True),
    },
    "blocks": {
        ("forward", 90, 128): LaunchConfig(128, 64, 8, 3),
        ("forward", 100, 64): LaunchConfig(128, 64, 8, 3),
        ("grad_query", 100, 192): LaunchConfig(64, 64, 8, 2),
        ("grad_key_value", 80, 64): LaunchConfig(32, 128, 8, 2),
        ("grad_key_value", 80, 128): LaunchConfig(32, 64, 8, 2),
        ("grad_key_value", 80, 256): LaunchConfig(32, 32, 8, 1),
    },
    "padded": {
        ("forward", 80, 128): LaunchConfig(64, 32, 4, 3),
        ("forward", 90, 128): LaunchConfig(128, 64, 8, 3),
        ("grad_key_value", 80, 256): LaunchConfig(32, 32, 8, 1),
    },
}
"""Entries for a kernel, an architecture and a head dimension, for elements of two bytes."""

_INTERPRETED = LaunchConfig(rows=32, keys=32, warps=1, stages=1)
_overrides: dict[str, LaunchConfig] = {}
_gather_before = False


def overridden(kernel: str, config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
    """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
    return replaced(_overrides, kernel, config)


@contextlib.contextmanager
def gathered_before() -> Iterator[None]:
    """Put rows in order by copies around the kernels, instead of in their loads, while the context lasts.

    The copies cost memory and time once, the loads a row number per row and step: which is faster, a GPU must tell.
    """
    global _gather_before
    before, _gather_before = _gather_before, True
    try:
        yield
    finally:
        _gather_before = before


def table_entry(kernel: str, architecture: int, size: int, width: int, features: Collection[str] = ()) -> LaunchConfig:
    """Return the configuration of a kernel for elements of `size` bytes and head dimensions up to `width`.

    `features` are keys of `NARROWER`; if several have an entry, the smallest tile with the fewest stages is returned.
    """
    known = max(a for a in ARCHITECTURES if a <= architecture)
    width = min(w for w in WIDTHS if w >= width)
    narrower = [NARROWER[name].get((kernel, known, width)) for name in features] if size == 2 else []
    found = [config for config in narrower if config is not None]
    return min(
        found, key=lambda config: (config.rows * config.keys, config.stages), default=TABLE[kernel, known, size, width]
    )


class Call:
    """The tensors and numbers of one call, as the kernels take them.

    Query and key rows are taken in the order `query_order` and `key_order` in the kernels, or have been copied into the
    order `query_rows` and `key_rows` before, and results are to be put back.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: Pattern,
        scale: float,
    ) -> None:
        lo, hi, window = pattern.lo, pattern.hi, pattern.window
        orders = pattern.query_rows, pattern.key_rows
        self.query_rows, self.key_rows = orders if _gather_before else (None, None)
        query, key, value = self.take_queries(query), take_rows(key, self.key_rows), take_rows(value, self.key_rows)
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
        self.alibi_slopes = None if pattern.alibi_slopes is None else pattern.alibi_slopes.contiguous()
        # Rows that were copied into order are looked up for their positions alone.
        looked_up = orders if self.alibi_slopes is not None or not _gather_before else (None, None)
        self.query_order, self.key_order = (None if rows is None else unit_stride(rows) for rows in looked_up)
        self.block, *lists = (0, None, None, None, None) if pattern.blocks is None else pattern.blocks
        self.row_offsets, self.row_blocks, self.key_offsets, self.key_blocks = (
            None if x is None else x.contiguous() for x in lists
        )

    def take_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Put rows [B, Tq, Hq, ...] in order, if that is not done in the kernels."""
        return take_rows(x, self.query_rows)

    def put_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `take_queries`."""
        return put_rows(x, self.query_rows)

    def put_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Put rows [B, Tk, Hkv, D] back that were in order because key and value were."""
        return put_rows(x, self.key_rows)

    def scale_log2(self) -> float:
        """Return scale * log2(e), never 0: a hidden score is -inf before the multiplication, and L is divided by it."""
        return math.copysign(max(abs(self.scale), 1e-30), self.scale) * math.log2(math.e)

    def strides(self, *others: torch.Tensor) -> list[int]:
        """Strides of batch, row and head of query, key, value and other tensors [B, T, H, D]."""
        return [stride for x in (self.query, self.key, self.value, *others) for stride in x.stride()[:3]]

    def row_strides(self, *rows: torch.Tensor | None) -> list[int]:
        """Strides of batch and head of tensors [B or 1, H or 1, T], 0 where one is shared and where there is none."""
        return [0 if x is None or x.shape[axis] == 1 else x.stride(axis) for x in rows for axis in (0, 1)]

    def features(self) -> list[str]:
        """Return which entries of `NARROWER` apply."""
        has = {
            "permuted": self.query_order is not None or self.key_order is not None,
            "alibi": self.alibi_slopes is not None,
            "blocks": self.block > 0,
            "padded": is_padded(self.dim) or is_padded(self.value_dim),
        }
        return [name for name in NARROWER if has[name]]

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments that every kernel takes."""
        return {
            "MODE": self.mode,
            "BLOCK": self.block,
            "GATHER_QUERY": self.query_order is not None and self.query_rows is None,
            "GATHER_KEY": self.key_order is not None and self.key_rows is None,
            **dim_constants(self.dim, self.value_dim),
            "UPCAST": self.query.device.type == "cpu",
        }


def launch_config(kernel: str, call: Call) -> LaunchConfig:
    """Return the configuration with which to launch a kernel for this call."""
    if kernel in _overrides:
        config = _overrides[kernel]
    elif call.query.device.type == "cpu":
        config = _INTERPRETED
    else:
        width = max(call.dim, call.value_dim)
        architecture, size = architecture_of(call.query.device), call.query.element_size()
        config = table_entry(kernel, architecture, size, width, call.features())
    return config.within(call.block)
