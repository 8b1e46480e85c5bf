"""Launch attention with few queries: one program for each part of the keys, and a merge of the parts.

In the plain forward a decoding step has one program per batch row and head, which walks along all keys while most of
the GPU idles. Here a program takes a part of the keys, and all query heads that share a key head, so that it loads
these keys once. Nothing here imports Triton. `longmix_kernels.launch` has what all engines share.
"""

import torch

from longmix_kernels import launch
from longmix_kernels.accelerators import TUNED
from longmix_kernels.attention import launch as whole
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.launch import LaunchConfig
from longmix_kernels.columns import cover
from longmix_kernels.launch import LaunchTable
from longmix_kernels.runtime import on_gpu

KERNELS = ("split_forward", "split_merge")
MOST_QUERIES = 15
"""The most queries for which keys are divided. More queries fill a tile of the forward kernel by themselves."""

ROWS = 16
"""How many rows a tile has, the least that a product takes. Rows are queries times the heads that share a key head."""

SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""The numbers of parts into which keys may be cut, ascending."""

LEAST_KEYS = 256
"""The fewest keys of a part. A part costs the loading of the queries, and a row of the result in float32."""

PROGRAMS_PER_PROCESSOR = 2
"""How many programs a multiprocessor has room for and needs, so that one loads while another multiplies."""

ELSEWHERE = 132
"""How many multiprocessors to assume where there is no GPU: those of an H100 or H200."""


# Rows, keys, warps and stages for each of `whole.WIDTHS`; the merge has no tiles. Each entry compiles without a spill
# for all modes of bounds and features, and fits into the 99 KiB of shared memory of consumer GPUs. The exception is 144
# columns with rows in an order of their own, which spill 20 bytes. None has been timed.
_TUNED = {
    "split_forward": ((16, 64, 4, 4), (16, 32, 4, 4), (16, 64, 4, 3), (16, 32, 8, 3), (16, 32, 4, 3)),
    "split_merge": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 1), (1, 1, 2, 1)),
}
TABLE = LaunchTable(
    LaunchConfig,
    whole.WIDTHS,
    dict.fromkeys(TUNED, _TUNED),
    float32={"split_forward": (16, 16, 4, 1), "split_merge": (1, 1, 2, 1)},
    interpreted={"split_forward": LaunchConfig(16, 16, 1, 1), "split_merge": LaunchConfig(1, 1, 1, 1)},
    measured={},
)


class Call(whole.Call):
    """The tensors and numbers of one call, as the kernels take them.

    Attributes:
        tiles: how many tiles of rows a key head has.
        splits: into how many parts the keys of a tile are cut; with 1, the plain forward kernel is the better choice.
    """

    TABLE = TABLE

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.tiles = -(-self.queries * self.group // ROWS)
        # Documents and bounds may hide keys, but only the device knows how many, so all keys count here.
        seen = min(self.keys, self.window + self.queries - 1) if self.mode == "window" else self.keys
        processors = launch.processors_of(self.query.device) if on_gpu(self.query) else ELSEWHERE
        self.splits = splits_of(self.tiles * self.batch * self.key_heads, seen, processors)

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return TABLE.entry(kernel, architecture, size, max(self.dim, self.value_dim))

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration as it is, since `covers` admits no blocks."""
        return config

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel is launched with."""
        if kernel == "split_merge":
            return self.batch * self.queries * self.heads
        return self.splits * self.tiles * self.batch * self.key_heads

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return {**super().constants(), "MOST_SPLITS": max(SPLITS), "VALUE_COVER": cover(self.value_dim)}


def covers(inputs: Inputs) -> bool:
    """Say whether a call has few queries, no block lists and no gradient; all this is known during compilation."""
    if inputs.query.shape[1] > MOST_QUERIES or inputs.pattern.blocks is not None:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (inputs.query, inputs.key, inputs.value)))


def splits_of(programs: int, keys: int, processors: int) -> int:
    """Return into how many parts to cut the keys that a program would see, so that all multiprocessors have work.

    Args:
        programs: how many programs there are without cutting.
        keys: how many keys one of them sees at most.
        processors: how many multiprocessors the GPU has.
    """
    wanted = PROGRAMS_PER_PROCESSOR * processors / programs
    allowed = [count for count in SPLITS if count == 1 or count * LEAST_KEYS <= keys]
    return next((count for count in allowed if count >= wanted), allowed[-1])
