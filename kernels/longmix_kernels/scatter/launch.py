"""Launch the scatter kernels: tiles, warps and stages per architecture, and the arguments of a call.

Every kernel takes features and columns in tiles, so no kernel limits how many of these there are. Nothing here imports
Triton. `longmix_kernels.launch` has what all engines share.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from longmix_kernels import launch
from longmix_kernels.columns import cover, fit
from longmix_kernels.launch import LaunchTable
from longmix_kernels.scatter.bounds import read_blocks
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.tensors import contiguous, unit_stride, vectors

KERNELS = ("sums", "scan", "merge", "grad_query", "grad_sums", "grad_scan", "grad_key")
"""The kernels in the order of a forward and a backward; `grad_sums` is `sums` for queries instead of keys."""

SCANS = ("scan", "grad_scan")

WIDTHS = (128, 256)
"""The largest head dimensions of values that the entries are for."""


@dataclass(frozen=True)
class LaunchConfig(launch.LaunchConfig):
    """One way to launch a kernel.

    Attributes:
        rows: how many rows of a block a step takes; 0 in the scans, which take no rows.
        features: how many features a step takes.
        values: how many value columns a step takes; the scans take all of them.
        warps: how many warps a program has.
        stages: how many steps loads are ahead of their use.
    """

    rows: int
    features: int
    values: int
    warps: int
    stages: int

    def within(self, block_size: int, features: int, value_dim: int) -> "LaunchConfig":
        """Return the same with tiles that waste no more than they must, but have at least 16 rows and columns.

        A tile with fewer rows gets fewer warps, since it has less work.

        Args:
            block_size: tokens of a block.
            features: how many features there are.
            value_dim: the head dimension of values.
        """
        if not self.rows:
            tile = min(self.features, 1 << (features - 1).bit_length())
            return replace(self, features=tile, values=cover(value_dim))
        rows = min(self.rows, cover(block_size))
        warps = max(min(self.warps, 4), self.warps * rows // self.rows)
        tiles = {"features": fit(self.features, features), "values": fit(self.values, value_dim)}
        return replace(self, rows=rows, warps=warps, **tiles)

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles and may be halved; in a scan `values` may not, it takes all."""
        return {"rows": self.rows, "features": self.features} | ({"values": self.values} if self.rows else {})

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments.

        The stages are among them, because Triton stages loops without products only where the loop says so.
        """
        return {
            "ROWS": self.rows,
            "STAGES": self.stages,
            "FEATURE_BLOCK": self.features,
            "VALUE_BLOCK": self.values,
        }


# Rows, features, values, warps, stages. With these, 64 to 256 features compile without a spill for values of 64 and 128
# columns, in blocks of 64, 128 and 256 tokens, under Triton 3.6 and 3.9. None has been timed.
_AMPERE = {
    "sums": (64, 64, 64, 4, 2),
    "scan": (0, 8, 0, 4, 4),
    "merge": (128, 64, 64, 8, 2),
    "grad_query": (128, 64, 64, 8, 2),
    "grad_sums": (64, 64, 64, 4, 2),
    "grad_scan": (0, 8, 0, 4, 4),
    "grad_key": (128, 32, 32, 8, 2),
}
# Values of 256 columns take more than 99 KiB of shared memory in the tiles of sm_80.
_ADA_256 = _AMPERE | {"grad_query": (64, 32, 32, 4, 2), "grad_key": (64, 32, 32, 8, 2)}
_HOPPER = _AMPERE | {"merge": (128, 64, 128, 8, 2), "grad_key": (128, 32, 64, 8, 2)}
_BLACKWELL = _AMPERE | {"grad_sums": (64, 64, 64, 8, 2), "grad_key": (64, 32, 32, 8, 1)}
TABLE = LaunchTable(
    LaunchConfig,
    WIDTHS,
    {
        architecture: {kernel: (narrow[kernel], wide[kernel]) for kernel in KERNELS}
        for architecture, narrow, wide in (
            (80, _AMPERE, _AMPERE),
            (86, _AMPERE, _ADA_256),
            (90, _HOPPER, _HOPPER),
            (100, _BLACKWELL, _BLACKWELL),
        )
    },
    float32=dict.fromkeys(KERNELS, (32, 32, 32, 4, 1)) | dict.fromkeys(SCANS, (0, 8, 0, 4, 1)),
    interpreted=dict.fromkeys(KERNELS, LaunchConfig(rows=64, features=64, values=64, warps=1, stages=1))
    | dict.fromkeys(SCANS, LaunchConfig(rows=0, features=64, values=0, warps=1, stages=1)),
    measured={},
)


def table_entry(kernel: str, architecture: int, size: int, value_dim: int) -> LaunchConfig:
    """Return the configuration of a kernel for one architecture and kind of call.

    Args:
        kernel: the kernel's name.
        architecture: the compute capability, times ten.
        size: bytes of an element of the values.
        value_dim: the head dimension of the values.

    Raises:
        UnsupportedDevice: the table has no entries for so old an architecture.
    """
    return TABLE.entry(kernel, architecture, size, value_dim)


class Sums(NamedTuple):
    """Sums over rows of every slot, as one argument of a kernel: contiguous, float32.

    Attributes:
        scales: [B, H, slots, FEATURES], the logarithms of what the others are divided by.
        weights: as scales, total weights.
        deltas: as scales, sums of D; None for sums over keys.
        sums: [B, H, slots, FEATURES, VALUE_DIM], sums of rows.
    """

    scales: Any
    weights: Any
    deltas: Any
    sums: Any


class Call(launch.Call[LaunchConfig]):
    """The tensors and numbers of one call that has features, as the kernels take them.

    Attributes:
        blocks: int32 [B or 1, slots, 4], the table of blocks that `bounds.read_blocks` makes.
        slots: how many slots the table has for each batch row.
        exact: how many tokens of a document a query may see exactly.
        whole: whether every row is one document from its beginning on, so that positions alone say what is far.
    """

    TABLE = TABLE

    def __init__(self, inputs: Inputs) -> None:
        assert inputs.query_features is not None and inputs.key_features is not None
        # `query` stands for the call's device and dtype alone: the kernels see queries through their features.
        self.query, self.value = inputs.query, unit_stride(inputs.value)
        self.query_features, self.key_features = unit_stride(inputs.query_features), unit_stride(inputs.key_features)
        self.memory, self.normalizer, self.log_scale = contiguous(inputs.memory, inputs.normalizer, inputs.log_scale)
        self.batch, self.queries, self.heads, self.features = inputs.query_features.shape
        _, self.keys, self.key_heads, self.value_dim = inputs.value.shape
        self.group = self.heads // self.key_heads
        self.block_size, self.exact = min(inputs.block_size, self.keys), inputs.exact
        sizes = self.queries, self.keys, inputs.block_size, inputs.past_blocks
        with_state, device = self.memory is not None, inputs.query.device
        self.blocks = read_blocks(inputs.document_ids, *sizes, with_state, device).contiguous()
        self.slots = self.blocks.shape[1]
        self.stride_blocks = self.blocks.stride(0) if self.blocks.shape[0] > 1 else 0
        self.whole = inputs.document_ids is None and self.memory is None

    def new_sums(self, *, of_queries: bool) -> Sums:
        """Return memory for the sums of every slot, over queries or over keys."""
        shape = self.batch, self.key_heads, self.slots, self.features
        scales, weights, deltas = vectors(self.value, 3 if of_queries else 2, *shape) + [None] * (not of_queries)
        return Sums(scales, weights, deltas, *vectors(self.value, 1, *shape, self.value_dim))

    def new_grad_features(self) -> list[torch.Tensor]:
        """Return memory for the gradients of both features; it is zero where no kernel will write."""
        grads = [self.value.new_empty(x.shape, dtype=x.dtype) for x in (self.query_features, self.key_features)]
        if self.whole:
            # The first blocks of queries have no far keys, and the last blocks of keys are far for no query.
            grads[0][:, : max(self.exact - (self.keys - self.queries), 0)].zero_()
            grads[1][:, -(-self.keys // self.block_size) * self.block_size - self.exact :].zero_()
        else:
            for grad in grads:
                grad.zero_()
        return grads

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return table_entry(kernel, architecture, size, self.value_dim)

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration with tiles that waste no more than they must."""
        return config.within(self.block_size, self.features, self.value_dim)

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel is launched with."""
        features, values = -(-self.features // config.features), -(-self.value_dim // config.values)
        if kernel in SCANS:
            return features * self.batch * self.key_heads
        if kernel in ("sums", "grad_sums"):
            return self.slots * features * values * self.batch * self.key_heads
        heads = self.key_heads if kernel == "grad_key" else self.heads
        return self.slots * self.row_tiles(kernel) * (values if kernel == "merge" else 1) * self.batch * heads

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return {"FEATURES": self.features, "VALUE_DIM": self.value_dim}

    def row_tiles(self, kernel: str) -> int:
        """Return how many tiles of rows a block has."""
        return -(-self.block_size // self.config(kernel).rows)
