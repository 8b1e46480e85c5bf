"""What every launch configuration compiles to, and what a call costs: `python -m longmix_kernels.delta.report`.

Nothing runs and no GPU is needed. Each kernel is compiled ahead of time for each architecture of the launch table; one
that spills, uses stack, wants more shared memory than there is, or misses `wgmma` on sm_90 where its tiles have 64 rows
makes the command exit with 1. The costs are *estimates*, not measurements: the operations and bytes of `cost`, each
tensor read or written once per kernel, and the least time that they take at the peak rates of an H200.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longmix_kernels.compiling import DTYPES, Compiled, as_table, compile_for, concluded, pairs
from longmix_kernels.delta import cost, launch

DIMS = ((64, 64), (128, 128), (256, 256))
"""Head dimensions of keys and values."""

FEATURES = ("plain", "documents", "state", "documents-state")
"""What a call has besides; "state" is an initial state."""

DECAYS = ("bounded", "exact")
"""Whether a bound of the decays is promised, RWKV-7's, or none."""

FORMS = ("low-rank", "diagonal")
"""Transitions with low-rank reads and writes, or without."""

RWKV7 = -0.6065306597126334
"""RWKV-7's bound of the log decay."""

_MODULES = {"grad_scan": "scan"}
_LOW_RANK = ("low_rank_read", "low_rank_write", "transitions", "inverses", "removed", "grad_removed")
_LOW_RANK_GRADS = ("grad_read", "grad_write")
_FLOAT32 = ("log_decay", "states", "kept", "initial", "final", "grad_final", "grad_states", "grad_initial")


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Attributes:
        kernel: one of `launch.KERNELS`.
        decay: one of `DECAYS`.
        form: one of `FORMS`.
        chunk: None for that of the cost model.
        config: None for that of the launch table.
    """

    kernel: str
    architecture: int
    dtype: str
    dim: int
    value_dim: int
    decay: str = "bounded"
    feature: str = "plain"
    form: str = "low-rank"
    chunk: int | None = None
    config: launch.LaunchConfig | None = None

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        config = self.config or launch.table_entry(
            self.kernel, self.architecture, DTYPES[self.dtype], self.dim, self.value_dim
        )
        return config.within(self.chunk_size(), self.dim, self.value_dim)

    def chunk_size(self) -> int:
        """Return how many tokens a chunk has."""
        bound = RWKV7 if self.decay == "bounded" else None
        return cost.choose_chunk(self.dim, self.value_dim, 1 << 20, self.chunk, bound)[0]

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has."""
        config = self.launch_config()
        documents, state = self.feature.startswith("documents"), self.feature.endswith("state")
        constants: dict[str, Any] = {
            "BOUNDED": self.decay == "bounded",
            "CHUNK": self.chunk_size(),
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "PIECE": launch.piece(self.dim),
            "PRECISION": launch.precision_of(DTYPES[self.dtype]),
            "UPCAST": False,
            "stride_decay_column": 1,
            **config.tiles(),
        }
        absent: list[str] = []
        if not documents:
            absent += ["document_ids"]
        if not state:
            absent += ["initial", "grad_initial"]
        if self.form == "diagonal":
            absent += [*_LOW_RANK, *_LOW_RANK_GRADS]
        return constants | dict.fromkeys(absent)

    def faults(self, compiled: Compiled) -> list[str]:
        """Name what must not be."""
        rows = launch.piece(self.dim) if self.kernel in launch.SCANS else self.chunk_size()
        return compiled.faults(self, with_wgmma=rows >= 64)


def _kernel(name: str) -> Any:
    module = importlib.import_module(f"longmix_kernels.delta.triton_{_MODULES.get(name, name)}")
    return getattr(module, f"{name}_kernel")


def compile_kernel(build: Build) -> Compiled:
    """Compile a kernel as the launcher would for aligned tensors, and read what ptxas says about it."""
    kernel, config = _kernel(build.kernel), build.launch_config()

    def type_of(name: str) -> str:
        if name in ("length", "heads"):
            return "i32"
        if name in ("scale", "floor"):
            return "fp32"
        float32 = name in _FLOAT32 or name == "grad_log_decay"
        return "*i32" if name == "document_ids" else "*fp32" if float32 else f"*{build.dtype}"

    return compile_for(kernel, type_of, build.constants(), build.architecture, config.options())


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[tuple[int, int]],
    decays: Sequence[str] = DECAYS,
    features: Sequence[str] = ("plain",),
    forms: Sequence[str] = ("low-rank",),
    dtype: str = "bf16",
) -> list[Build]:
    """Return every kernel for every combination; the scans do not know how decays are bounded."""
    return [
        Build(kernel, architecture, dtype, dim, value_dim, decay, feature, form)
        for architecture in architectures
        for dim, value_dim in dims
        for form in forms
        for decay in decays
        for feature in features
        for kernel in launch.KERNELS
    ]


def as_row(build: Build, compiled: Compiled) -> dict[str, Any]:
    """Return everything known about a kernel as one flat record."""
    return {
        "kernel": build.kernel,
        "arch": f"sm_{build.architecture}",
        "dtype": build.dtype,
        "dims": f"{build.dim}/{build.value_dim}",
        "form": build.form,
        "decay": build.decay,
        "feature": build.feature,
        "chunk": build.chunk_size(),
        **asdict(build.launch_config()),
        **compiled.columns(),
        "faults": ", ".join(build.faults(compiled)),
    }


ROWS = 8 * 4096 * 64
"""Tokens times heads of the setting in which costs are given: RWKV-7 of width 4096, 8 sequences of 4096 tokens."""

DESIGNED = {64: 5250, 32: 7200, 16: 11000}
"""Bytes per token of a head, forward and backward with 64/64, that the design page counts, by chunk.

It counts one kernel for all gradients of a chunk, and what is kept for the backward once.
"""

OTHERS = 22300
"""The same, counted for the kernels of flash-linear-attention 0.6.0 in chunks of 64."""


def cost_rows() -> list[dict[str, Any]]:
    """Return the predicted work and least time of every kernel and of whole passes."""
    rows = []
    for dim, value_dim, chunk in ((64, 64, 64), (64, 64, 32), (64, 64, 16), (128, 128, 32), (256, 256, 16)):
        for form in FORMS:
            kernels = cost.kernel_work(cost.Setting(ROWS, dim, value_dim, chunk, form == "low-rank"))
            parts = {name: [work] for name, work in kernels.items()}
            parts |= {
                name: [kernels[kernel] for kernel in order]
                for name, order in (("forward", cost.FORWARD), ("backward", cost.BACKWARD), ("both", kernels))
            }
            for name, works in parts.items():
                compared = name == "both" and form == "low-rank" and dim == 64
                rows.append(
                    {
                        "dims": f"{dim}/{value_dim}",
                        "chunk": chunk,
                        "form": form,
                        "kernel": name,
                        "bytes_per_row": sum(work.bytes for work in works) / ROWS,
                        "designed": DESIGNED[chunk] if compared else "",
                        "kflop_per_row": sum(work.flops for work in works) / ROWS / 1e3,
                        "h200_floor_ms": sum(work.seconds for work in works) * 1e3,
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print both tables, and return 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m longmix_kernels.delta.report", description="Compile without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=launch.ARCHITECTURES, default=launch.ARCHITECTURES)
    parser.add_argument("--dims", nargs="+", default=[f"{a}/{b}" for a, b in DIMS], help="head dimensions, as 64/64")
    parser.add_argument("--decay", nargs="+", choices=DECAYS, default=DECAYS)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=("low-rank",), help="of transitions")
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--cost-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="write the records here too")
    options = parser.parse_args(arguments)
    dims = pairs(parser, "--dims", options.dims, "64/64", (256, 256))
    rows = []
    if not options.cost_only:
        builds = table_builds(options.arch, dims, options.decay, options.feature, options.form, options.dtype)
        rows = [as_row(build, compile_kernel(build)) for build in builds]
        print(as_table(rows), end="\n\n")
    costs = cost_rows()
    print(as_table(costs))
    print(
        f"\nEstimates, not measurements: a row is a token of a head, and times are for {ROWS} of them at an H200's "
        "peak rates, each tensor once per kernel; a pass is the sum of its kernels. The column `designed` counts one "
        f"kernel for all gradients of a chunk; by the same count, flash-linear-attention moves {OTHERS} bytes at 64."
    )
    return concluded(rows, options.json, {"kernels": rows, "costs": costs})


if __name__ == "__main__":
    sys.exit(main())
