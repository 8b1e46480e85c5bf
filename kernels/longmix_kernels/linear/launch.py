"""How the linear-attention kernels are launched: tiles, warps and stages per architecture, and the arguments of a call.

Nothing here imports Triton. `TABLE` is the one place that says how a kernel is launched; `overridden` replaces an entry
for a benchmark or a test. The entries are fixed, so no length and no batch size ever starts a search or a compile.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from longmix_kernels.launching import architecture_of, dim_constants, on_device, replaced, split_dim, unit_stride
from longmix_kernels.linear.cost import clamp_chunk, default_chunk

__all__ = ["Call", "LaunchConfig", "launch_config", "on_device", "overridden", "stored_states", "unit_stride"]

TILED = ("states", "output", "grad_states", "grad_query", "grad_key_value")
"""The kernels that the table is about."""

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten, that the table has entries for. Others use the newest that is not newer."""


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel.

    Attributes:
        rows: rows of a tile, in the kernels that carry a state the tokens of one step.
        keys: key rows of a tile; in the kernels that carry a state, value columns of a program's block.
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

    def tiles(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel that works on tiles of rows and keys."""
        return {"ROWS": self.rows, "KEYS": self.keys, "BLOCK": self.block}

    def blocks(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel that carries a state."""
        return {"ROWS": self.rows, "BLOCK": self.block, "VALUE_BLOCK": self.keys}

    def options(self) -> dict[str, int | bool]:
        """Return the options of the compiler; from Triton 3.10 on, multiply-adds are no longer its default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def within(self, kernel: str, chunk: int, dim: int, value_dim: int) -> "LaunchConfig":
        """Return the same with tiles that are no larger than a chunk, and blocks no larger than a head dimension."""

        def cover(size: int) -> int:
            return max(1 << (size - 1).bit_length(), 16)

        carries = kernel in ("states", "grad_states")
        keys = min(self.keys, cover(value_dim) if carries else chunk)
        width = {"grad_query": value_dim, "grad_key_value": max(dim, value_dim)}.get(kernel, dim)
        return replace(self, rows=min(self.rows, chunk), keys=keys, block=min(self.block, cover(width)))


Key = tuple[str, int, int, int]
"""Kernel, architecture, bytes of an element, and the largest sum of head dimensions that the entry is for."""

WIDTHS = (128, 192, 384, 768, 1024)
"""The sums of both head dimensions up to which an entry is for: 64 + 64, 64 + 128, 128 + 256, 256 + 512, 512 + 512."""

Row = tuple[int, int, int, int, int] | tuple[int, int, int, int, int, bool]


def _entries(architecture: int, size: int, table: Mapping[str, Sequence[Row]]) -> dict[Key, LaunchConfig]:
    return {
        (kernel, architecture, size, width): LaunchConfig(*row)
        for kernel, rows in table.items()
        for width, row in zip(WIDTHS, rows, strict=True)
    }


# One row per entry of WIDTHS: rows, keys, block, warps, stages and perhaps fused. Each was found to compile without a
# spill at those head dimensions, for both gates, with and without documents and an initial state (`WITH_DOCUMENTS` says
# where not), under Triton 3.9; under 3.6, sm_90 likewise but for 8 bytes at 128 + 256. The last is not as well covered:
# what is larger than its tiles spills. None has been timed.
_AMPERE: dict[str, Sequence[Row]] = {
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
_HOPPER: dict[str, Sequence[Row]] = {
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
_BLACKWELL: dict[str, Sequence[Row]] = {
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
# Products of float32 run outside the tensor cores, on every architecture alike; they are for checks, and may spill.
_FLOAT32: dict[str, Sequence[Row]] = {
    "states": ((16, 32, 32, 4, 1),) * 5,
    "output": ((16, 16, 16, 8, 1),) * 5,
    "grad_states": ((16, 32, 32, 4, 1),) * 5,
    "grad_query": ((16, 16, 16, 8, 1),) * 5,
    "grad_key_value": ((16, 16, 16, 8, 1, False),) * 5,
}
TABLE: dict[Key, LaunchConfig] = {
    **_entries(80, 2, _AMPERE),
    **_entries(90, 2, _HOPPER),
    **_entries(100, 2, _BLACKWELL),
    **{key: config for architecture in ARCHITECTURES for key, config in _entries(architecture, 4, _FLOAT32).items()},
}
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
    ("output", 90, 768): LaunchConfig(64, 16, 16, 8, 2),
    ("grad_key_value", 90, 384): LaunchConfig(16, 64, 16, 8, 3),
    ("grad_key_value", 90, 768): LaunchConfig(16, 64, 16, 8, 2, False),
}
# The kernels without products, on every architecture: rows of a step, and columns where they read any.
OTHERS = {
    "scales": LaunchConfig(rows=1024, keys=0, block=0, warps=4, stages=1),
    "gates": LaunchConfig(rows=0, keys=0, block=0, warps=4, stages=1),
    "grad_rows": LaunchConfig(rows=16, keys=0, block=128, warps=4, stages=1),
    "grad_gates": LaunchConfig(rows=1024, keys=0, block=0, warps=4, stages=1),
}

_INTERPRETED = LaunchConfig(rows=64, keys=64, block=64, warps=1, stages=1)
_overrides: dict[str, LaunchConfig] = {}
_state_dtype = torch.float32


def overridden(kernel: str, config: LaunchConfig) -> contextlib.AbstractContextManager[None]:
    """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
    return replaced(_overrides, kernel, config)


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
    if kernel in OTHERS:
        return OTHERS[kernel]
    known = max(a for a in ARCHITECTURES if a <= architecture)
    width = min(w for w in WIDTHS if w >= sum(split_dim(dim)) + sum(split_dim(value_dim)))
    narrower = WITH_DOCUMENTS.get((kernel, known, width)) if documents and size == 2 else None
    return narrower or TABLE[kernel, known, size, width]


class Call:
    """The tensors and numbers of one call, as the kernels take them."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        log_input: torch.Tensor | None,
        memory: torch.Tensor | None,
        normalizer: torch.Tensor | None,
        log_scale: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        normalize: bool,
        scale: float,
        chunk_size: int | None,
    ) -> None:
        self.query, self.key, self.value = unit_stride(query), unit_stride(key), unit_stride(value)
        self.log_decay, self.log_input = log_decay, log_input
        self.memory, self.normalizer, self.log_scale = (
            None if x is None else x.contiguous() for x in (memory, normalizer, log_scale)
        )
        self.document_ids = None if document_ids is None else small_ids(document_ids)
        self.normalize, self.scale = normalize, scale
        self.batch, self.length, self.heads, self.dim = query.shape
        self.value_dim = value.shape[3]
        if chunk_size is None:
            self.chunk = default_chunk(self.dim, self.value_dim, self.length)
        else:
            self.chunk = clamp_chunk(chunk_size, self.length)
        self.chunks = -(-self.length // self.chunk)

    def strides(self, *tensors: torch.Tensor) -> list[int]:
        """Strides of batch, row and head of tensors [B, T, H, D]."""
        return [stride for x in tensors for stride in x.stride()[:3]]

    def gate_strides(self) -> list[int]:
        """Strides of batch, row and head of both gates, 0 for one that there is not."""
        return [*self.log_decay.stride(), *((0, 0, 0) if self.log_input is None else self.log_input.stride())]

    def new_states(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return memory for a state per chunk [B, H, chunks, Dk, Dv], and for normalisers [B, H, chunks, Dk]."""
        shape = self.batch, self.heads, self.chunks, self.dim
        states = self.query.new_empty(*shape, self.value_dim, dtype=_state_dtype)
        return states, self.query.new_empty(*shape, dtype=torch.float32) if self.normalize else None

    def state_programs(self, config: LaunchConfig) -> int:
        """Return how many programs carry the states."""
        return -(-self.dim // config.block) * -(-self.value_dim // config.keys) * self.batch * self.heads

    def state_constants(self, config: LaunchConfig) -> dict[str, object]:
        """Return the compile-time arguments of a kernel that carries a state, and its options."""
        return {
            "NORMALIZE": self.normalize,
            "CHUNK": self.chunk,
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "UPCAST": self.query.device.type == "cpu",
            **config.blocks(),
            **config.options(),
        }

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments of the kernels that work on tiles of rows and keys."""
        return {
            "NORMALIZE": self.normalize,
            "INITIAL": self.memory is not None,
            "CHUNK": self.chunk,
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
        architecture, size = architecture_of(call.query.device), call.query.element_size()
        config = table_entry(kernel, architecture, size, call.dim, call.value_dim, call.document_ids is not None)
    return config.within(kernel, call.chunk, call.dim, call.value_dim) if kernel in TILED else config


def small_ids(document_ids: torch.Tensor) -> torch.Tensor:
    """Return document ids [B, T] as contiguous int32; larger ones are counted anew, since only changes matter."""
    if document_ids.dtype == torch.int32:
        return document_ids.contiguous()
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.nn.functional.pad(changes.cumsum(1), (1, 0)).int()
