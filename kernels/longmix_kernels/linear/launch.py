"""How the linear-attention kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton; see `longmix_kernels.launch`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from longmix_kernels import launch
from longmix_kernels.columns import cover, dim_constants, split_dim
from longmix_kernels.launch import LaunchTable, Rows, known_architecture, with_tiles_of
from longmix_kernels.linear.cost import clamp_chunk, default_chunk
from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.tensors import Strided, contiguous, gate, small_ids, strided, unit_stride

CARRYING = ("states", "grad_states")
"""The kernels that carry a state from chunk to chunk."""

TILED = ("states", "output", "grad_states", "grad_query", "grad_key_value")
"""The kernels that multiply tiles."""

GATED = ("scales", "gates", "grad_rows", "grad_gates")
"""The kernels without products."""

STEPS = ("step",)
"""The kernel that takes few tokens one after the other, without products of tiles."""

KERNELS = (*TILED, *GATED, *STEPS)

WIDTHS = (128, 192, 384, 768, 1024)
"""The sums of both head dimensions up to which an entry is for: 64 + 64, 64 + 128, 128 + 256, 256 + 512, 512 + 512."""


@dataclass(frozen=True)
class LaunchConfig(launch.LaunchConfig):
    """One way to launch a kernel.

    Attributes:
        rows: rows of a tile, in the kernels that carry a state the tokens of one step.
        keys: key rows of a tile; in the kernels that carry a state, and in a step, value columns of a program's block.
        block: columns of a head dimension taken in one step where a tile meets a state; in the kernels that carry a
            state, key columns of a program's block.
        warps: warps of a program.
        stages: steps that loads are ahead of their use.
        fused: the gradients of keys and values come from one program, else from one each. No product is computed twice
            either way; one program loads half, two need fewer registers.
    """

    rows: int
    keys: int
    block: int
    warps: int
    stages: int
    fused: bool = True

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles."""
        return {"rows": self.rows, "keys": self.keys, "block": self.block}

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments."""
        return {"ROWS": self.rows, "KEYS": self.keys, "BLOCK": self.block, "VALUE_BLOCK": self.keys}

    def within(self, kernel: str, chunk: int, dim: int, value_dim: int) -> "LaunchConfig":
        """Return the same with tiles that are no larger than a chunk, and blocks no larger than a head dimension."""
        if kernel in GATED:
            return self
        if kernel in STEPS:
            return replace(self, keys=min(self.keys, cover(value_dim)))
        keys = min(self.keys, cover(value_dim) if kernel in CARRYING else chunk)
        width = {"grad_query": value_dim, "grad_key_value": max(dim, value_dim)}.get(kernel, dim)
        return replace(self, rows=min(self.rows, chunk), keys=keys, block=min(self.block, cover(width)))


# One row per entry of WIDTHS: rows, keys, block, warps, stages and perhaps fused. Each was found to compile without a
# spill at those head dimensions, for both gates, with and without documents and an initial state (`WITH_DOCUMENTS` says
# where not), under Triton 3.9; under 3.6, sm_90 likewise but for 8 bytes at 128 + 256. The last is not as well covered:
# what is larger than its tiles spills. None has been timed.
_AMPERE: dict[str, Rows] = {
    "states": ((64, 128, 64, 4, 3),) * 5,
    "output": ((128, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 32, 8, 2), (64, 16, 16, 8, 2), (32, 32, 16, 8, 1)),
    "grad_states": ((64, 128, 64, 8, 3),) * 5,
    "grad_query": (
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 32, 8, 3),
        (64, 32, 32, 8, 2),
        (32, 32, 16, 8, 1),
    ),
    "grad_key_value": (
        (32, 64, 32, 4, 2),
        (16, 64, 32, 8, 2),
        (16, 64, 16, 8, 3),
        (16, 64, 16, 8, 2, False),
        (32, 32, 16, 8, 1, False),
    ),
}
# sm_80's, but for what takes more than 99 KiB of shared memory.
_ADA: dict[str, Rows] = _AMPERE | {
    "grad_query": (
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 32, 32, 8, 2),
        (64, 16, 32, 8, 2),
        (32, 32, 16, 8, 1),
    ),
}
_HOPPER: dict[str, Rows] = {
    "states": ((64, 128, 64, 4, 3),) * 5,
    "output": ((128, 64, 64, 8, 3), (128, 64, 64, 8, 3), (128, 32, 32, 8, 2), (64, 32, 32, 8, 2), (32, 32, 16, 8, 1)),
    "grad_states": ((64, 128, 64, 4, 3),) * 5,
    "grad_query": (
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 32, 8, 3),
        (64, 32, 32, 8, 2),
        (32, 32, 16, 8, 1),
    ),
    "grad_key_value": (
        (64, 128, 32, 8, 2),
        (64, 64, 32, 8, 2),
        (32, 64, 16, 8, 3),
        (32, 64, 32, 8, 2, False),
        (32, 32, 16, 8, 1, False),
    ),
}
_BLACKWELL: dict[str, Rows] = {
    "states": ((64, 128, 64, 4, 3),) * 5,
    "output": ((128, 64, 64, 8, 3), (128, 64, 64, 8, 3), (128, 64, 32, 8, 3), (64, 32, 32, 8, 2), (32, 32, 16, 8, 1)),
    "grad_states": ((64, 128, 64, 4, 3), *((64, 128, 64, 8, 3),) * 4),
    "grad_query": (
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 32, 8, 3),
        (64, 32, 32, 8, 2),
        (32, 32, 16, 8, 1),
    ),
    "grad_key_value": (
        (64, 128, 32, 8, 2),
        (64, 128, 32, 8, 2),
        (64, 64, 16, 8, 2),
        (32, 64, 32, 8, 2, False),
        (32, 32, 16, 8, 1, False),
    ),
}
# The kernels without products, on every architecture and for every width and size.
_GATED = {
    "scales": (1024, 0, 0, 4, 1),
    "gates": (0, 0, 0, 4, 1),
    "grad_rows": (16, 0, 128, 4, 1),
    "grad_gates": (1024, 0, 0, 4, 1),
}
_GATED_ROWS: dict[str, Rows] = {kernel: (row,) * len(WIDTHS) for kernel, row in _GATED.items()}
# A whole column of a state is in one program, up to 512 rows of it.
_STEP: dict[str, Rows] = {"step": (*((0, 32, 0, 4, 1),) * 3, *((0, 32, 0, 8, 1),) * 2)}
TABLE = LaunchTable(
    LaunchConfig,
    WIDTHS,
    {
        architecture: kernels | _GATED_ROWS | _STEP
        for architecture, kernels in {80: _AMPERE, 86: _ADA, 90: _HOPPER, 100: _BLACKWELL}.items()
    },
    float32={
        "states": (16, 32, 32, 4, 1),
        "output": (16, 16, 16, 8, 1),
        "grad_states": (16, 32, 32, 4, 1),
        "grad_query": (16, 16, 16, 8, 1),
        "grad_key_value": (16, 16, 16, 8, 1, False),
        "step": (0, 16, 0, 4, 1),
        **_GATED,
    },
    interpreted=dict.fromkeys(KERNELS, LaunchConfig(rows=64, keys=64, block=64, warps=1, stages=1)),
    measured={},
)
# What needs more registers: entries for a kernel, an architecture and a width, of two bytes, that replace those of the
# table where there are documents.
WITH_DOCUMENTS: dict[tuple[str, int, int], LaunchConfig] = {
    **{
        (kernel, architecture, width): LaunchConfig(64, 128, 64, 8, 3)
        for kernel, architecture, widths in (
            ("states", 80, (192, 384, 768, 1024)),
            ("states", 90, (192,)),
            ("grad_states", 90, (192, 384, 768, 1024)),
            ("states", 100, (192, 384, 768, 1024)),
        )
        for width in widths
    },
    # Of three stages 8 bytes would spill with a carried state beside the initial one.
    **{("grad_states", 100, width): LaunchConfig(64, 128, 64, 8, 2) for width in (192, 384, 768, 1024)},
    ("output", 90, 768): LaunchConfig(64, 16, 16, 8, 2),
    ("grad_key_value", 90, 384): LaunchConfig(16, 64, 16, 8, 3),
    ("grad_key_value", 90, 768): LaunchConfig(16, 64, 16, 8, 2, False),
}
_state_dtype = torch.float32


@contextlib.contextmanager
def stored_states(dtype: torch.dtype) -> Iterator[None]:
    """Store states and their gradients between chunks in this dtype, while the context lasts.

    They are carried from chunk to chunk in float32 in any case, and products round them to the dtype of the queries as
    they are read. bfloat16 halves the bytes that pass between the kernels; with bfloat16 inputs it changes no result by
    a bit, and with float32 inputs it costs gradients of decays up to 3e-2, relative.
    """
    global _state_dtype
    before, _state_dtype = _state_dtype, dtype
    try:
        yield
    finally:
        _state_dtype = before


def table_entry(
    kernel: str, architecture: int, size: int, dim: int, value_dim: int, documents: bool = False
) -> LaunchConfig:
    """Return the configuration of a kernel for elements of `size` bytes and these head dimensions."""
    width = TABLE.covering(sum(split_dim(dim)) + sum(split_dim(value_dim)))
    plain = TABLE.entry(kernel, architecture, size, width)
    if not documents or size != 2:
        return plain
    return WITH_DOCUMENTS.get((kernel, with_tiles_of(known_architecture(architecture)), width), plain)


class Call(launch.Call[LaunchConfig]):
    """The tensors and numbers of one call, as the kernels take them."""

    TABLE = TABLE
    SPREAD: ClassVar = dict.fromkeys(CARRYING, ("keys", 32)) | dict.fromkeys(STEPS, ("keys", 16))

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, chunk_size = inputs.query, inputs.key, inputs.value, inputs.chunk_size
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.log_decay = gate(inputs.log_decay)
        self.log_input = None if inputs.log_input is None else gate(inputs.log_input)
        self.memory, self.normalizer, self.log_scale = contiguous(inputs.memory, inputs.normalizer, inputs.log_scale)
        self.carried_memory, self.carried_normalizer, self.carried_log_scale = contiguous(
            inputs.carried_memory, inputs.carried_normalizer, inputs.carried_log_scale
        )
        self.document_ids = small_ids(inputs.document_ids)
        self.normalize, self.scale = inputs.normalize, inputs.scale
        self.batch, self.length, self.heads, self.dim = query.shape
        self.value_dim = value.shape[3]
        if chunk_size is None:
            self.chunk = default_chunk(self.dim, self.value_dim, self.length)
        else:
            self.chunk = clamp_chunk(chunk_size, self.length)
        self.chunks = -(-self.length // self.chunk)

    def gates(self) -> tuple[Strided, Strided | None]:
        """Return the log decay and the log input gate as kernels take them."""
        (log_decay,) = strided(self.log_decay)
        return log_decay, None if self.log_input is None else strided(self.log_input)[0]

    def new_states(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return memory for a state per chunk [B, H, chunks, Dk, Dv], and for normalisers [B, H, chunks, Dk]."""
        shape = self.batch, self.heads, self.chunks, self.dim
        states = self.query.new_empty(*shape, self.value_dim, dtype=_state_dtype)
        return states, self.query.new_empty(*shape, dtype=torch.float32) if self.normalize else None

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return table_entry(kernel, architecture, size, self.dim, self.value_dim, self.document_ids is not None)

    def fitted(self, kernel: str, config: LaunchConfig) -> LaunchConfig:
        """Return the configuration with tiles no larger than a chunk."""
        return config.within(kernel, self.chunk, self.dim, self.value_dim)

    def programs(self, kernel: str, config: LaunchConfig) -> int:
        """Return how many programs a kernel takes."""
        heads = self.batch * self.heads
        if kernel in CARRYING:
            return -(-self.dim // config.block) * -(-self.value_dim // config.keys) * heads
        if kernel in STEPS:
            return -(-self.value_dim // config.keys) * heads
        if kernel == "gates":
            return self.chunks * heads
        if kernel in GATED and kernel != "grad_rows":
            return heads
        return -(-self.length // (config.keys if kernel == "grad_key_value" else config.rows)) * heads

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments besides tiles."""
        return {
            "NORMALIZE": self.normalize,
            "INITIAL": self.memory is not None,
            "CARRIED": self.carried_memory is not None,
            "CHUNK": self.chunk,
            "COVER": cover(self.dim),
            **dim_constants(self.dim, self.value_dim),
        }
