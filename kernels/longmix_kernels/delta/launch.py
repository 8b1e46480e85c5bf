"""How the delta kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton; see `longmix_kernels.launch`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from longmix_kernels import launch
from longmix_kernels.columns import cover, fit
from longmix_kernels.delta.cost import choose_chunk
from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.launch import LaunchTable
from longmix_kernels.tensors import Strided, contiguous, gate, small_ids, strided, unit_stride

STEPS = ("step",)
"""The kernel that takes few tokens one after the other, without products of tiles."""

KERNELS = ("prepare", "scan", "grad_scan", "grad_value", "grad_query", "grad_key", *STEPS)
SCANS = ("scan", "grad_scan")

WIDTHS = (64, 128, 256)
"""The head dimensions, of keys or of values, up to which an entry is for."""

NO_FLOOR = -709.0
"""The log decay that stands for any smaller one: 2 ** -1022, next to which no weight is seen in float32."""


class Tokens(NamedTuple):
    """What comes per token, as one argument of a kernel.

    Attributes:
        query, key: [B, T, H, K].
        value: [B, T, H, V].
        log_decay: float32 [B, T, H, K], or [B, T, H].
        low_rank_read, low_rank_write: [B, T, H, K], or None.
        document_ids: int32 [B, T], contiguous, or None.
        stride_decay_column: the stride of the decays' last axis, 0 for one decay a head.
        scale: of the queries.
        floor: the least log decay.
    """

    query: Strided
    key: Strided
    value: Strided
    log_decay: Strided
    low_rank_read: Strided | None
    low_rank_write: Strided | None
    document_ids: Any
    stride_decay_column: Any
    scale: Any
    floor: Any


class Ends(NamedTuple):
    """The states at both ends of chunks and gradients, as one argument of a kernel of the backward.

    Attributes:
        initial: float32 [B, H, K, V], contiguous, or None.
        grad_output: [B, T, H, V].
        states: float32 [B, H, chunks, K, V], what enters each chunk.
        grad_states: float32 [B, H, chunks, K, V], of what leaves each chunk.
        removed: u, [B, H, T, V]; None without low-rank reads.
        grad_removed: dx, [B, H, T, V]; likewise.
    """

    initial: Any
    grad_output: Strided
    states: Any
    grad_states: Any
    removed: Any
    grad_removed: Any


@dataclass(frozen=True)
class LaunchConfig(launch.LaunchConfig):
    """One way to launch a kernel.

    Attributes:
        block: key columns taken in one step; of no meaning to the scans and to "step".
        values: value columns taken in one step; in the scans and in "step", of a program.
        warps: warps of a program.
        stages: steps that loads are ahead of their use.
    """

    block: int
    values: int
    warps: int
    stages: int

    def within(self, chunk: int, dim: int, value_dim: int) -> "LaunchConfig":
        """Return the same with blocks that waste no more of head dimensions than they must, but are at least 16.

        More than 4 warps have nothing to do on chunks of 16 tokens, but in the scans, which work on states.
        """
        warps = min(self.warps, 4) if chunk == 16 and self.block else self.warps
        return replace(self, block=self.block and fit(self.block, dim), values=fit(self.values, value_dim), warps=warps)

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles."""
        return {"block": self.block, "values": self.values}

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments."""
        return {"BLOCK": self.block, "VALUE_BLOCK": self.values, "STAGES": self.stages}


def piece(dim: int) -> int:
    """Return how many rows of a state the scans keep together; larger states are two pieces."""
    return min(cover(dim), 128)


# One row per entry of WIDTHS: block, values, warps, stages. Those of the first two columns were found to compile
# without a spill, with documents and an initial state, in the chunks that `cost.choose_chunk` takes, for sm_90. On
# sm_80 `prepare` spills up to 240 bytes, on sm_80 and sm_100 some others up to 112: the tests of the report list them.
# At 64 columns no other row does better for all. Smaller blocks leave `prepare` on sm_80 where it is, and 16 warps
# spill 2260 bytes. 32 values would spare `grad_value` with decays of heads its 32 bytes, for 8 with bounded decays. 16
# values would spare `grad_key` on sm_100 its 40 bytes, for 193 registers instead of 128: one program on each
# multiprocessor instead of two.
# None has been timed.
_AMPERE = {
    "prepare": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "scan": ((0, 32, 4, 3), (0, 16, 8, 2), (0, 16, 8, 1)),
    "grad_scan": ((0, 32, 4, 3), (0, 32, 8, 2), (0, 16, 8, 1)),
    "grad_value": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    "grad_query": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_key": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "step": ((0, 32, 4, 1), (0, 32, 4, 1), (0, 32, 8, 1)),
}
_HOPPER = _AMPERE | {
    "prepare": ((16, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "grad_value": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
TABLE = LaunchTable(
    LaunchConfig,
    WIDTHS,
    {80: _AMPERE, 86: _AMPERE, 90: _HOPPER, 100: _HOPPER},
    float32=dict.fromkeys(KERNELS, (32, 32, 8, 1)) | dict.fromkeys((*SCANS, *STEPS), (0, 16, 8, 1)),
    interpreted=dict.fromkeys(KERNELS, LaunchConfig(block=64, values=64, warps=1, stages=1)),
    measured={},
)


def table_entry(kernel: str, architecture: int, size: int, dim: int, value_dim: int) -> LaunchConfig:
    """Return the configuration of a kernel for elements of `size` bytes and these head dimensions."""
    return TABLE.entry(kernel, architecture, size, max(dim, value_dim))


class Call(launch.Call[LaunchConfig]):
    """The tensors and numbers of one call, as the kernels take them."""

    TABLE = TABLE
    SPREAD: ClassVar = dict.fromkeys((*SCANS, *STEPS), ("values", 16))

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, min_log_decay = inputs.query, inputs.key, inputs.value, inputs.min_log_decay
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.log_decay = gate(inputs.log_decay)
        self.low_rank_read, self.low_rank_write = (
            None if x is None else unit_stride(x) for x in (inputs.low_rank_read, inputs.low_rank_write)
        )
        self.initial, self.carried = contiguous(inputs.initial_state, inputs.carried_state)
        self.document_ids = small_ids(inputs.document_ids)
        self.scale = inputs.scale
        self.batch, self.length, self.heads, self.dim = query.shape
        self.value_dim = value.shape[3]
        self.low_rank = self.low_rank_read is not None
        self.per_head = self.log_decay.dim() == 3
        self.chunk, self.decay = choose_chunk(
            self.dim, self.value_dim, self.length, inputs.chunk_size, min_log_decay, self.per_head
        )
        # Just below the promise, so that a decay equal to it, rounded to float32, is not clamped.
        self.floor = NO_FLOOR if min_log_decay is None else max(1.0001 * min_log_decay, NO_FLOOR)
        self.chunks = -(-self.length // self.chunk)

    def tokens(self) -> Tokens:
        """Return what comes per token as one argument of a kernel."""
        query, key, value, log_decay = strided(self.query, self.key, self.value, self.log_decay)
        low_rank = [x for x in (self.low_rank_read, self.low_rank_write) if x is not None]
        read, write = strided(*low_rank) if low_rank else (None, None)
        stride_column = 0 if self.per_head else self.log_decay.stride(3)
        return Tokens(
            query, key, value, log_decay, read, write, self.document_ids, stride_column, self.scale, self.floor
        )

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return table_entry(kernel, architecture, size, self.dim, self.value_dim)

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration with blocks no larger than head dimensions."""
        return config.within(self.chunk, self.dim, self.value_dim)

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel takes."""
        parts = -(-self.value_dim // config.values) if kernel in (*SCANS, *STEPS) else self.chunks
        return parts * self.batch * self.heads

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return {
            "DECAY": self.decay,
            "CHUNK": self.chunk,
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "PIECE": piece(self.dim),
            "COVER": cover(self.dim),
            "PRECISION": precision_of(self.query.element_size()),
        }


def precision_of(size: int) -> str:
    """Return how products of float32 are taken: for inputs of two bytes, three TF32 products stand for one."""
    return "tf32x3" if size == 2 else "ieee"
