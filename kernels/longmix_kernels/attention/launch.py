"""Launch the attention kernels: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `longmix_kernels.launch` has what all engines share.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longmix_kernels import launch
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.columns import Columns, is_padded, split_dim
from longmix_kernels.launch import LaunchTable, known_architecture, with_tiles_of
from longmix_kernels.runtime import on_gpu
from longmix_kernels.tensors import aligned, unit_stride

KERNELS = ("forward", "grad_query", "grad_key_value")
WIDTHS = (64, 96, 128, 192, 256)
"""The largest head dimensions, of keys or of values, that the entries are for."""


@dataclass(frozen=True)
class LaunchConfig(launch.LaunchConfig):
    """One way to launch a kernel.

    Attributes:
        rows: query rows of a tile.
        keys: key rows of a tile.
        warps: how many warps a program has.
        stages: how many tiles loads are ahead of their use.
        fold: whether the products of the key and value gradients start from the row vectors that have to be added to
            them. This saves registers where products add up in registers (sm_90), and costs many elsewhere (sm_100).
        descriptors: whether tensor descriptors (the tensor memory accelerator of sm_90 and newer) load whole tiles of
            keys and values, where `describable` allows it.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    fold: bool = False
    descriptors: bool = False

    def used_by(self, kernel: str) -> Collection[str]:
        """Return the names of the attributes that change a kernel's code."""
        own = {"forward": {"descriptors"}, "grad_query": set(), "grad_key_value": {"fold"}}[kernel]
        return {"rows", "keys", "warps", "stages", *own}

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles."""
        return {"rows": self.rows, "keys": self.keys}

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments."""
        return {"ROWS": self.rows, "KEYS": self.keys, "FOLD": self.fold}

    def within(self, block: int) -> "LaunchConfig":
        """Return the same with tiles that fit into blocks of `block` rows and keys; 0 stands for no blocks."""
        if not block or max(self.rows, self.keys) <= block:
            return self
        # More warps than a tile has work for only cost registers.
        warps = min(self.warps, 4) if block < 64 else self.warps
        return replace(self, rows=min(self.rows, block), keys=min(self.keys, block), warps=warps)


# One row per entry of WIDTHS: rows, keys, warps, stages and perhaps fold. Each tile compiles without a spill at that
# head dimension, causal, under Triton 3.6 and 3.9 (the last of sm_90: 3.6 only). None has been timed.
_AMPERE = {
    "forward": ((64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2), (64, 32, 8, 2)),
    "grad_query": ((128, 64, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2), (64, 16, 8, 1), (64, 64, 8, 1)),
    "grad_key_value": ((32, 128, 8, 3), (16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1), (16, 64, 8, 1)),
}
# The entries of sm_80, except where those take more than 99 KiB of shared memory, or spill (at 128, Triton 3.9).
_ADA = _AMPERE | {
    "grad_query": (*_AMPERE["grad_query"][:4], (64, 32, 8, 1)),
    "grad_key_value": (*_AMPERE["grad_key_value"][:2], (32, 64, 8, 2), *_AMPERE["grad_key_value"][3:]),
}
_HOPPER = {
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
_BLACKWELL = {
    "forward": ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    "grad_query": ((64, 64, 4, 3), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    "grad_key_value": ((64, 128, 8, 1), (32, 128, 8, 1), (32, 128, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
}
TABLE = LaunchTable(
    LaunchConfig,
    WIDTHS,
    {80: _AMPERE, 86: _ADA, 90: _HOPPER, 100: _BLACKWELL},
    float32={"forward": (32, 16, 8, 1), "grad_query": (16, 16, 8, 1), "grad_key_value": (16, 32, 8, 1)},
    interpreted=dict.fromkeys(KERNELS, LaunchConfig(rows=32, keys=32, warps=1, stages=1)),
    measured={},
)
# A feature needs more registers than a plain call, so these entries replace those of the table where a call has it.
# With them, 64 and 128 columns compile without a spill, causal and with documents, under Triton 3.6 and 3.9. Only
# `grad_key_value` on sm_90 still spills beyond 128 columns, with a feature or columns to mask. None has been timed.
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
"""By feature, and by kernel, architecture and head dimension, entries for elements of two bytes that need less."""

_gather_before = False


@contextlib.contextmanager
def gathered_before() -> Iterator[None]:
    """Put rows in order by copies around the kernels, instead of in their loads, while the context lasts.

    The copies cost memory and time once; the loads cost a row number for each row and step. Only a GPU can tell which
    is faster.
    """
    global _gather_before
    before, _gather_before = _gather_before, True
    try:
        yield
    finally:
        _gather_before = before


def table_entry(kernel: str, architecture: int, size: int, width: int, features: Collection[str] = ()) -> LaunchConfig:
    """Return the configuration of a kernel for one architecture and kind of call.

    Args:
        kernel: the kernel's name.
        architecture: the compute capability, times ten.
        size: bytes of an element.
        width: the larger head dimension.
        features: the call's features, keys of `NARROWER`. If several have an entry, the smallest tile with the fewest
            stages is taken.

    Raises:
        UnsupportedDevice: the table has no entries for so old an architecture.
    """
    known, covering = with_tiles_of(known_architecture(architecture)), TABLE.covering(width)
    narrower = [NARROWER[name].get((kernel, known, covering)) for name in features] if size == 2 else []
    found = [config for config in narrower if config is not None]
    plain = TABLE.entry(kernel, architecture, size, width)
    return min(found, key=lambda config: (config.rows * config.keys, config.stages), default=plain)


def describable(x: torch.Tensor) -> bool:
    """Say whether a tensor descriptor can be made of x [B, T, H, D].

    D must be one power of two, at least 16. The address and the strides must be multiples of 16 bytes, and no stride
    may be 0. A GPU must be sm_90 or newer.
    """
    if on_gpu(x) and launch.architecture_of(x.device) < 90:
        return False
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return x.numel() > 0 and aligned and x.data_ptr() % 16 == 0 and split_dim(x.shape[3]) == (x.shape[3], 0)


class Call(launch.Call[LaunchConfig]):
    """The tensors and numbers of one call, as the kernels take them.

    There are two ways to take rows in an order of their own. The kernels load them in the order `query_order` and
    `key_order`; or, within `gathered_before`, copies have put them in the order `query_rows` and `key_rows`, and
    `put_queries` and `put_keys` put the results back.
    """

    TABLE = TABLE

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, pattern = inputs.query, inputs.key, inputs.value, inputs.pattern
        lo, hi, window = pattern.lo, pattern.hi, pattern.window
        orders = pattern.query_rows, pattern.key_rows
        self.query_rows, self.key_rows = orders if _gather_before else (None, None)
        query, key, value = self.take_queries(query), take_rows(key, self.key_rows), take_rows(value, self.key_rows)
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.lo, self.hi = (None if x is None else unit_stride(x) for x in (lo, hi))
        self.batch, self.queries, self.heads, self.dim = query.shape
        _, self.keys, self.key_heads, self.value_dim = value.shape
        self.group = self.heads // self.key_heads
        self.scale = inputs.scale
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
        self.alibi_slopes = None if pattern.alibi_slopes is None else aligned(pattern.alibi_slopes.contiguous())
        # Rows that were copied into order are looked up for their positions alone.
        looked_up = orders if self.alibi_slopes is not None or not _gather_before else (None, None)
        self.query_order, self.key_order = (None if rows is None else unit_stride(rows) for rows in looked_up)
        self.block, *lists = (0, None, None, None, None) if pattern.blocks is None else pattern.blocks
        self.row_offsets, self.row_blocks, self.key_offsets, self.key_blocks = (
            None if x is None else aligned(x.contiguous()) for x in lists
        )

    def take_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows [B, Tq, Hq, ...] in order, if the kernels do not order them; else as they are."""
        return take_rows(x, self.query_rows)

    def put_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows [B, Tq, Hq, ...] in the order before `take_queries`."""
        return put_rows(x, self.query_rows)

    def put_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return gradients of key or value [B, Tk, Hkv, D] in the order before key and value were put in order."""
        return put_rows(x, self.key_rows)

    def scale_log2(self) -> float:
        """Return scale * log2(e), but never 0.

        Kernels multiply hidden scores of -inf by it, and divide L by it.
        """
        return math.copysign(max(abs(self.scale), 1e-30), self.scale) * math.log2(math.e)

    def steps(self, kernel: str) -> tuple[Any, Any]:
        """Return descriptors of key and value, which load a tile at once; None twice where the kernel uses pointers."""
        config = self.config(kernel)
        if not (config.descriptors and self.key_order is None and describable(self.key) and describable(self.value)):
            return None, None
        from triton.tools.tensor_descriptor import TensorDescriptor

        def tiled(x: torch.Tensor) -> Any:
            return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, config.keys, 1, x.shape[3]])

        return tiled(self.key), tiled(self.value)

    def features(self) -> list[str]:
        """Return the features of this call, which are keys of `NARROWER`."""
        has = {
            "permuted": self.query_order is not None or self.key_order is not None,
            "alibi": self.alibi_slopes is not None,
            "blocks": self.block > 0,
            "padded": is_padded(self.dim) or is_padded(self.value_dim),
        }
        return [name for name in NARROWER if has[name]]

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return table_entry(kernel, architecture, size, max(self.dim, self.value_dim), self.features())

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration with tiles that fit into the call's blocks."""
        return config.within(self.block)

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel is launched with."""
        if kernel == "grad_key_value":
            return -(-self.keys // config.keys) * self.batch * self.key_heads
        return -(-self.queries // config.rows) * self.batch * self.heads

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return {
            "MODE": self.mode,
            "BLOCK": self.block,
            "GATHER_QUERY": self.query_order is not None and self.query_rows is None,
            "GATHER_KEY": self.key_order is not None and self.key_rows is None,
            "NEGATIVE_SCALE": self.scale_log2() < 0,
            "DIM": Columns.of(self.dim),
            "VALUE_DIM": Columns.of(self.value_dim),
        }
