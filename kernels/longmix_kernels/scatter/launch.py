"""How the scatter kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `TABLE` is the one place that says how a kernel is launched; `overridden` replaces an entry
for a benchmark or a test. The entries are fixed, so no length and no batch size ever starts a search or a compile; and
since every kernel takes features and columns in tiles, none depends on how many of these there are.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from longmix_kernels.delta.launch import cover, fit
from longmix_kernels.launching import architecture_of, on_device, replaced, unit_stride
from longmix_kernels.scatter.bounds import read_blocks

__all__ = ["Call", "LaunchConfig", "launch_config", "on_device", "overridden", "unit_stride"]

KERNELS = ("sums", "scan", "merge", "grad_query", "grad_sums", "grad_scan", "grad_key")
"""In the order of a forward and a backward; `grad_sums` is `sums` for queries instead of keys."""

SCANS = ("scan", "grad_scan")

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that the table has entries for. Others use the newest that is not newer."""


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel.

    Attributes:
        rows: rows of a block taken in one step; of no meaning to the scans.
        features: features taken in one step.
        values: value columns taken in one step; the scans take all of them.
        warps: warps of a program.
        stages: steps that loads are ahead of their use.
    """

    rows: int
    features: int
    values: int
    warps: int
    stages: int

    def within(self, block_size: int, features: int, value_dim: int) -> "LaunchConfig":
        """Return the same with tiles that waste no more than they must, but have at least 16 rows and columns.

        Fewer rows have work for fewer warps.
        """
        if not self.rows:
            tile = min(self.features, 1 << (features - 1).bit_length())
            return replace(self, features=tile, values=cover(value_dim))
        rows = min(self.rows, cover(block_size))
        warps = max(min(self.warps, 4), self.warps * rows // self.rows)
        tiles = {"features": fit(self.features, features), "values": fit(self.values, value_dim)}
        return replace(self, rows=rows, warps=warps, **tiles)

    def tiles(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel; loops without products take the stages only if told to."""
        rows = {"ROWS": self.rows} if self.rows else {"STAGES": self.stages}
        return {**rows, "FEATURE_BLOCK": self.features, "VALUE_BLOCK": self.values}

    def options(self) -> dict[str, int | bool]:
        """Return the options of the compiler; from Triton 3.10 on, multiply-adds are no longer its default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


Key = tuple[str, int, int]
"""Kernel, architecture, and bytes of an element."""

Row = tuple[int, int, int, int, int]


def _entries(architecture: int, size: int, table: Mapping[str, Row]) -> dict[Key, LaunchConfig]:
    return {(kernel, architecture, size): LaunchConfig(*row) for kernel, row in table.items()}


# Rows, features, values, warps, stages. With these, 64 to 256 features compile without a spill for values of 64 and 128
# columns, in blocks of 64, 128 and 256 tokens, under Triton 3.6 and 3.9. None has been timed.
_AMPERE: dict[str, Row] = {
    "sums": (64, 64, 64, 4, 2),
    "scan": (0, 8, 0, 4, 4),
    "merge": (128, 64, 64, 8, 2),
    "grad_query": (128, 64, 64, 8, 2),
    "grad_sums": (64, 64, 64, 4, 2),
    "grad_scan": (0, 8, 0, 4, 4),
    "grad_key": (128, 32, 32, 8, 2),
}
_HOPPER = _AMPERE | {"merge": (128, 64, 128, 8, 2), "grad_key": (128, 32, 64, 8, 2)}
_BLACKWELL = _AMPERE | {"grad_sums": (64, 64, 64, 8, 2), "grad_key": (128, 32, 64, 8, 1)}
# Products of float32 run outside the tensor cores, on every architecture alike; they are for checks, and may spill.
_FLOAT32: dict[str, Row] = {
    "sums": (32, 32, 32, 4, 1),
    "scan": (0, 8, 0, 4, 1),
    "merge": (32, 32, 32, 4, 1),
    "grad_query": (32, 32, 32, 4, 1),
    "grad_sums": (32, 32, 32, 4, 1),
    "grad_scan": (0, 8, 0, 4, 1),
    "grad_key": (32, 32, 32, 4, 1),
}
TABLE: dict[Key, LaunchConfig] = {
    **_entries(80, 2, _AMPERE),
    **_entries(90, 2, _HOPPER),
    **_entries(100, 2, _BLACKWELL),
    **{key: config for architecture in ARCHITECTURES for key, config in _entries(architecture, 4, _FLOAT32).items()},
}

_INTERPRETED: dict[bool, LaunchConfig] = {
    True: LaunchConfig(rows=0, features=64, values=0, warps=1, stages=1),
    False: LaunchConfig(rows=64, features=64, values=64, warps=1, stages=1),
}
_overrides: dict[str, LaunchConfig] = {}


def overridden(kernel: str, config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
    """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
    return replaced(_overrides, kernel, config)


def table_entry(kernel: str, architecture: int, size: int) -> LaunchConfig:
    """Return the configuration of a kernel for values of `size` bytes."""
    known = max(a for a in ARCHITECTURES if a <= architecture)
    return TABLE[kernel, known, size]


class Call:
    """The tensors and numbers of one call that has features, as the kernels take them.

    Args:
        inputs: as `blocked.blocked_forward` has them.

    Attributes:
        blocks: see `bounds.read_blocks`.
        slots: how many there are.
        exact: tokens of a document within which a query sees every key exactly.
        whole: whether every row is one document from its beginning on, so that positions say what is read.
    """

    def __init__(self, *inputs) -> None:
        query, _, value, query_features, key_features, *state, document_ids, block_size, past_blocks, _ = inputs
        self.value, self.query_features, self.key_features = map(unit_stride, (value, query_features, key_features))
        self.memory, self.normalizer, self.log_scale = (None if x is None else x.contiguous() for x in state)
        self.batch, self.queries, self.heads, self.features = query_features.shape
        _, self.keys, self.key_heads, self.value_dim = value.shape
        self.group = self.heads // self.key_heads
        self.block_size, self.exact = min(block_size, self.keys), (past_blocks + 1) * block_size
        sizes = self.queries, self.keys, block_size, past_blocks
        self.blocks = read_blocks(document_ids, *sizes, self.memory is not None, query.device).contiguous()
        self.slots = self.blocks.shape[1]
        self.stride_blocks = self.blocks.stride(0) if self.blocks.shape[0] > 1 else 0
        self.whole = document_ids is None and self.memory is None

    def new_sums(self) -> list[torch.Tensor]:
        """Return memory for scales, total weights and sums of every slot."""
        shape = self.batch, self.key_heads, self.slots, self.features
        return [self.value.new_empty(size, dtype=torch.float32) for size in (shape, shape, (*shape, self.value_dim))]

    def new_grad_features(self) -> list[torch.Tensor]:
        """Return memory for the gradients of both features, zero where no kernel will write."""
        grads = [self.value.new_empty(x.shape, dtype=x.dtype) for x in (self.query_features, self.key_features)]
        if self.whole:
            # The first blocks of queries have no far keys, and the last blocks of keys are far for none.
            grads[0][:, : max(self.exact - (self.keys - self.queries), 0)].zero_()
            grads[1][:, -(-self.keys // self.block_size) * self.block_size - self.exact :].zero_()
        else:
            for grad in grads:
                grad.zero_()
        return grads

    def constants(self, config: LaunchConfig) -> dict[str, object]:
        """Return the compile-time arguments and options of every kernel."""
        sizes = {"FEATURES": self.features, "VALUE_DIM": self.value_dim}
        return {**sizes, **config.tiles(), **config.options()}

    def product_constants(self, config: LaunchConfig) -> dict[str, object]:
        """Return those of the kernels that multiply matrices."""
        return {**self.constants(config), "UPCAST": self.value.device.type == "cpu"}

    def sums_programs(self, config: LaunchConfig) -> tuple[int]:
        """Return the grid of the kernels that sum over blocks."""
        tiles = -(-self.features // config.features) * -(-self.value_dim // config.values)
        return (self.slots * tiles * self.batch * self.key_heads,)

    def scan_programs(self, config: LaunchConfig) -> tuple[int]:
        """Return the grid of the scans."""
        return (-(-self.features // config.features) * self.batch * self.key_heads,)

    def row_tiles(self, config: LaunchConfig) -> int:
        """Return how many tiles of rows a block has."""
        return -(-self.block_size // config.rows)


def strides(*tensors: torch.Tensor) -> list[int]:
    """Return the strides of batch, row and head of tensors [B, T, H, D]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def launch_config(kernel: str, call: Call) -> LaunchConfig:
    """Return the configuration with which to launch a kernel for this call."""
    if kernel in _overrides:
        config = _overrides[kernel]
    elif call.value.device.type == "cpu":
        config = _INTERPRETED[kernel in SCANS]
    else:
        config = table_entry(kernel, architecture_of(call.value.device), call.value.element_size())
    return config.within(call.block_size, call.features, call.value_dim)
