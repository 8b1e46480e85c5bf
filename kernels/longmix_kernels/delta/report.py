"""What the delta kernels compile to, and what a call costs: see `longmix_kernels.report`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.columns import cover
from longmix_kernels.cost import pass_rows
from longmix_kernels.delta import cost, launch
from longmix_kernels.report import read_pairs

DIMS = ((64, 64), (128, 128), (256, 256))
"""Head dimensions of keys and values."""

FORMS = ("low-rank", "diagonal")
"""Transitions with low-rank reads and writes, or without."""

FEATURES = ("plain", "documents", "state", "documents-state")
"""What a call has besides; "state" is an initial state, and with documents a carried one too."""

RWKV7 = -0.6065306597126334
"""RWKV-7's bound of the log decay."""

ROWS = 8 * 4096 * 64
"""Tokens times heads of the setting in which costs are given: RWKV-7 of width 4096, 8 sequences of 4096 tokens."""

DESIGNED = {64: 5250, 32: 7200, 16: 11000}
"""Bytes per token of a head, forward and backward with 64/64, that the design page counts, by chunk.

It counts one kernel for all gradients of a chunk, and what is kept for the backward once.
"""

OTHERS = 22300
"""The same, counted for the kernels of flash-linear-attention 0.6.0 in chunks of 64."""

NOTE = (
    f"A row is a token of a head, and times are for {ROWS} of them. The column `designed` counts one kernel for all "
    f"gradients of a chunk; by the same count, flash-linear-attention moves {OTHERS} bytes at 64."
)

_MODULES = {"grad_scan": "scan"}
_FUNCTIONS = (
    *(kernel for kernel in launch.KERNELS if kernel not in ("grad_query", "grad_key")),
    *(f"grad_query_{decay}" for decay in cost.DECAYS[1:]),
    *(f"grad_key_{decay}" for decay in cost.DECAYS),
)
_LOW_RANK = ("low_rank_read", "low_rank_write", "transitions", "inverses", "removed", "grad_removed")
_LOW_RANK_GRADS = ("grad_read", "grad_write")
_CARRIED = ("carried_state", "grad_carried")
_STATES = ("state", "states", "kept", "initial", "final", "grad_final", "grad_states", "grad_initial", *_CARRIED)


@dataclass(frozen=True)
class Build(aot.Build):
    """One kernel to compile.

    Attributes:
        dim, value_dim: of keys and of values.
        decay: one of `cost.DECAYS`; "bounded" with RWKV-7's bound.
        feature: one of `FEATURES`.
        form: one of `FORMS`.
        chunk: None for that of the cost model.
        config: None for that of the launch table.
        again: whether it runs in the backward, without outputs, as `prepare` and `scan` also do.
    """

    dim: int
    value_dim: int
    decay: str = "bounded"
    feature: str = "plain"
    form: str = "low-rank"
    chunk: int | None = None
    config: launch.LaunchConfig | None = None
    again: bool = False

    FUNCTIONS: ClassVar = {
        name: f"longmix_kernels.delta.triton_{_MODULES.get(name, name)}.{name}_kernel" for name in _FUNCTIONS
    }
    TYPES: ClassVar = {
        **dict.fromkeys(("length", "heads"), "i32"),
        **dict.fromkeys(("scale", "floor"), "fp32"),
        "document_ids": "*i32",
        **dict.fromkeys(("log_decay", "grad_log_decay", *_STATES), "*fp32"),
    }

    def name(self) -> str:
        """Return which of `FUNCTIONS` is compiled."""
        return f"{self.kernel}_{self.decay}" if self.kernel in ("grad_query", "grad_key") else self.kernel

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        sizes = self.architecture, aot.DTYPES[self.dtype], self.dim, self.value_dim
        config = self.config or launch.table_entry(self.kernel, *sizes)
        return config.within(self.chunk_size(), self.dim, self.value_dim)

    def chunk_size(self) -> int:
        """Return how many tokens a chunk has."""
        bound = RWKV7 if self.decay == "bounded" else None
        return cost.choose_chunk(self.dim, self.value_dim, 1 << 20, self.chunk, bound, self.decay == "head")[0]

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has."""
        absent = ["output", "final"] if self.again else ["inverses"] if self.kernel == "prepare" else []
        if not self.feature.startswith("documents"):
            absent += ["document_ids"]
        if not self.feature.endswith("state"):
            absent += ["initial", "grad_initial"]
        if self.feature != "documents-state":
            absent += _CARRIED
        if self.form == "diagonal":
            absent += [*_LOW_RANK, *_LOW_RANK_GRADS]
        return {
            "DECAY": self.decay,
            "CHUNK": self.chunk_size(),
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "PIECE": launch.piece(self.dim),
            "COVER": cover(self.dim),
            "PRECISION": launch.precision_of(aot.DTYPES[self.dtype]),
            "UPCAST": False,
            **({} if self.decay == "head" else {"stride_decay_column": 1}),
            **self.launch_config().tiles(),
            **dict.fromkeys(absent),
        }

    def columns(self) -> dict[str, Any]:
        """Return what a report says of it."""
        head = {"dims": f"{self.dim}/{self.value_dim}", "form": self.form, "decay": self.decay}
        return {**head, "feature": self.feature, "chunk": self.chunk_size(), "again": self.again}

    def wants_wgmma(self) -> bool:
        """Say whether its tiles have 64 rows: tokens of a chunk, or rows of a state.

        What is run again without a low-rank part adds up keys and values in smaller blocks, and nothing else.
        """
        if self.kernel in launch.STEPS or (self.again and self.form == "diagonal"):
            return False
        return (launch.piece(self.dim) if self.kernel in launch.SCANS else self.chunk_size()) >= 64


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[tuple[int, int]],
    decays: Sequence[str] = cost.DECAYS,
    features: Sequence[str] = ("plain",),
    forms: Sequence[str] = ("low-rank",),
    dtype: str = "bf16",
) -> list[Build]:
    """Return every kernel for every combination; the scans do not know how decays are bounded."""
    return [
        Build(kernel, architecture, dtype, dim, value_dim, decay, feature, form, again=again)
        for architecture in architectures
        for dim, value_dim in dims
        for form in forms
        for decay in decays
        for feature in features
        for kernel, again in [(kernel, False) for kernel in launch.KERNELS] + [("prepare", True), ("scan", True)]
        if kernel != "grad_query" or decay != "bounded"
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what is compiled."""
    parser.add_argument("--dims", nargs="+", default=[f"{a}/{b}" for a, b in DIMS], help="head dimensions, as 64/64")
    parser.add_argument("--decay", nargs="+", choices=cost.DECAYS, default=cost.DECAYS)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=("low-rank",), help="of transitions")
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")


def builds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Build]:
    """Return the kernels that the options ask for; the parser ends the command where they make no sense."""
    dims = read_pairs(parser, "--dims", options.dims, "64/64", (256, 256))
    return table_builds(options.arch, dims, options.decay, options.feature, options.form, options.dtype)


def costs(options: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Return the work of every kernel and of whole passes, in the setting of RWKV-7."""
    rows = []
    for dim, value_dim, chunk in ((64, 64, 64), (64, 64, 32), (64, 64, 16), (128, 128, 64), (256, 256, 32)):
        for form in FORMS:
            kernels = cost.kernel_work(cost.Setting(ROWS, dim, value_dim, chunk, form == "low-rank"))
            passes = pass_rows(kernels, cost.FORWARD, cost.BACKWARD, ROWS)
            head = {"dims": f"{dim}/{value_dim}", "chunk": chunk, "form": form}
            for kernel, columns in passes.items():
                designed = kernel == "both" and form == "low-rank" and dim == 64
                rows.append({**head, "kernel": kernel, **columns, "designed": DESIGNED[chunk] if designed else ""})
    return rows
