"""How the delta kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `TABLE` is the one place that says how a kernel is launched; `overridden` replaces an entry
for a benchmark or a test. The entries are fixed, so no length and no batch size ever starts a search or a compile.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from longmix_kernels.delta.cost import choose_chunk
from longmix_kernels.launching import architecture_of, on_device, replaced, unit_stride
from longmix_kernels.linear.launch import small_ids

__all__ = ["Call", "LaunchConfig", "launch_config", "on_device", "overridden", "unit_stride"]

KERNELS = ("prepare", "scan", "grad_scan", "grad_value", "grad_key")
SCANS = ("scan", "grad_scan")

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that the table has entries for. Others use the newest that is not newer."""

NO_FLOOR = -709.0
"""The log decay that stands for any smaller one: 2 ** -1022, next to which no weight is seen in float32."""


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel.

    Attributes:
        block: key columns taken in one step; of no meaning to the scans.
        values: value columns taken in one step; in the scans, of a program.
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

    def tiles(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel that works on chunks."""
        return {"BLOCK": self.block, "VALUE_BLOCK": self.values}

    def options(self) -> dict[str, int | bool]:
        """Return the options of the compiler; from Triton 3.10 on, multiply-adds are no longer its default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def cover(size: int) -> int:
    """Return the smallest power of two, at least 16, that covers a head dimension."""
    return max(1 << (size - 1).bit_length(), 16)


def fit(block: int, dim: int) -> int:
    """Return a block no larger than needed, and halved down to 32 while fewer columns in all are then taken."""
    block = min(block, cover(dim))
    while block > 32 and -(-dim // (block // 2)) * (block // 2) < -(-dim // block) * block:
        block //= 2
    return block


def piece(dim: int) -> int:
    """Return how many rows of a state the scans keep together; larger states are two pieces."""
    return min(cover(dim), 128)


Key = tuple[str, int, int, int]
"""Kernel, architecture, bytes of an element, and the largest head dimension that the entry is for."""

WIDTHS = (64, 128, 256)
"""The head dimensions, of keys or of values, up to which an entry is for."""

Row = tuple[int, int, int, int]


def _entries(architecture: int, size: int, table: Mapping[str, Sequence[Row]]) -> dict[Key, LaunchConfig]:
    return {
        (kernel, architecture, size, width): LaunchConfig(*row)
        for kernel, rows in table.items()
        for width, row in zip(WIDTHS, rows, strict=True)
    }


# One row per entry of WIDTHS: block, values, warps, stages. Those of the first two columns were found to compile
# without a spill for bounded decays, with documents and an initial state, in the chunks that `cost.choose_chunk` takes
# (64 and 32 tokens), under Triton 3.9; but for `prepare` on sm_80, which then spills at 64 columns (about 220 bytes).
# Without a bound `grad_key` spills as much, and what is larger than 128 columns is not covered. None has been timed.
_AMPERE: dict[str, Sequence[Row]] = {
    "prepare": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)),
    "scan": ((0, 32, 4, 3), (0, 16, 8, 1), (0, 16, 8, 1)),
    "grad_scan": ((0, 32, 4, 3), (0, 32, 4, 2), (0, 16, 8, 1)),
    "grad_value": ((16, 16, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)),
    "grad_key": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
_HOPPER: dict[str, Sequence[Row]] = _AMPERE | {"grad_value": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1))}
_BLACKWELL = _HOPPER
# Products of float32 run outside the tensor cores, on every architecture alike; they are for checks, and may spill.
_FLOAT32: dict[str, Sequence[Row]] = {
    "prepare": ((32, 32, 8, 1),) * 3,
    "scan": ((0, 16, 8, 1),) * 3,
    "grad_scan": ((0, 16, 8, 1),) * 3,
    "grad_value": ((32, 32, 8, 1),) * 3,
    "grad_key": ((32, 32, 8, 1),) * 3,
}
TABLE: dict[Key, LaunchConfig] = {
    **_entries(80, 2, _AMPERE),
    **_entries(90, 2, _HOPPER),
    **_entries(100, 2, _BLACKWELL),
    **{key: config for architecture in ARCHITECTURES for key, config in _entries(architecture, 4, _FLOAT32).items()},
}

_INTERPRETED = LaunchConfig(block=64, values=64, warps=1, stages=1)
_overrides: dict[str, LaunchConfig] = {}


def overridden(kernel: str, config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
    """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
    return replaced(_overrides, kernel, config)


def table_entry(kernel: str, architecture: int, size: int, dim: int, value_dim: int) -> LaunchConfig:
    """Return the configuration of a kernel for elements of `size` bytes and these head dimensions."""
    known = max(a for a in ARCHITECTURES if a <= architecture)
    width = min(w for w in WIDTHS if w >= max(dim, value_dim))
    return TABLE[kernel, known, size, width]


class Call:
    """The tensors and numbers of one call, as the kernels take them."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        low_rank_read: torch.Tensor | None,
        low_rank_write: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        scale: float,
        chunk_size: int | None,
        min_log_decay: float | None,
    ) -> None:
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.log_decay = log_decay
        self.low_rank_read, self.low_rank_write = (
            None if x is None else unit_stride(x) for x in (low_rank_read, low_rank_write)
        )
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.document_ids = None if document_ids is None else small_ids(document_ids)
        self.scale = scale
        self.batch, self.length, self.heads, self.dim = query.shape
        self.value_dim = value.shape[3]
        self.low_rank = low_rank_read is not None
        self.chunk, self.bounded = choose_chunk(self.dim, self.value_dim, self.length, chunk_size, min_log_decay)
        # Just below the promise, so that nothing rounded to float32 is held.
        self.floor = NO_FLOOR if min_log_decay is None else max(1.0001 * min_log_decay, NO_FLOOR)
        self.chunks = -(-self.length // self.chunk)

    def strides(self, *tensors: torch.Tensor) -> list[int]:
        """Strides of batch, row and head of tensors [B, T, H, D]."""
        return [stride for x in tensors for stride in x.stride()[:3]]

    def token_strides(self) -> list[int]:
        """Strides of what comes per token: of all axes for decays, and 0 for what there is not."""
        low_rank = (self.low_rank_read, self.low_rank_write)
        return [
            *self.strides(self.query, self.key, self.value),
            *self.log_decay.stride(),
            *(stride for x in low_rank for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        ]

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments of every kernel."""
        return {
            "CHUNK": self.chunk,
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "UPCAST": self.query.device.type == "cpu",
        }

    def chunk_constants(self, config: LaunchConfig) -> dict[str, object]:
        """Return the compile-time arguments of the kernels that work on chunks, and their options."""
        precision = precision_of(self.query.element_size())
        constants = {**self.constants(), "BOUNDED": self.bounded, "PRECISION": precision}
        return {**constants, **config.tiles(), **config.options()}

    def scan_constants(self, config: LaunchConfig) -> dict[str, object]:
        """Return the compile-time arguments of the kernels that carry a state, and their options."""
        return {**self.constants(), "PIECE": piece(self.dim), "VALUE_BLOCK": config.values, **config.options()}

    def chunk_programs(self) -> tuple[int]:
        """Return the grid of the kernels that work on chunks."""
        return (self.chunks * self.batch * self.heads,)

    def scan_programs(self, config: LaunchConfig) -> tuple[int]:
        """Return the grid of the kernels that carry a state."""
        return (-(-self.value_dim // config.values) * self.batch * self.heads,)


KEPT = 5
"""How many tensors the forward keeps for the backward."""


def kept_by_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    low_rank_read: torch.Tensor | None,
    low_rank_write: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    min_log_decay: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return memory for what the forward keeps: states, E, Q, M and shares, in the shapes of `triton_forward`."""
    batch, length, heads, dim = query.shape
    chunk, _ = choose_chunk(dim, value.shape[3], length, chunk_size, min_log_decay)
    chunks = batch, heads, -(-length // chunk), dim
    low_rank = low_rank_read is not None
    return (
        query.new_empty(*chunks, value.shape[3], dtype=torch.float32),
        query.new_empty((*chunks, dim) if low_rank else (0,)),
        query.new_empty(batch, heads, length, dim),
        query.new_empty((batch, heads, length, chunk) if low_rank else (0,)),
        query.new_empty(*chunks, dtype=torch.float32),
    )


def precision_of(size: int) -> str:
    """Return how products of float32 are taken: for inputs of two bytes, three TF32 products stand for one."""
    return "tf32x3" if size == 2 else "ieee"


def launch_config(kernel: str, call: Call) -> LaunchConfig:
    """Return the configuration with which to launch a kernel for this call."""
    if kernel in _overrides:
        config = _overrides[kernel]
    elif call.query.device.type == "cpu":
        config = _INTERPRETED
    else:
        architecture, size = architecture_of(call.query.device), call.query.element_size()
        config = table_entry(kernel, architecture, size, call.dim, call.value_dim)
    return config.within(call.chunk, call.dim, call.value_dim)
