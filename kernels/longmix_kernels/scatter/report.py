"""What every launch configuration compiles to, and what a call costs: `python -m longmix_kernels.scatter.report`.

Nothing runs and no GPU is needed. Each kernel is compiled ahead of time for each architecture of the launch table; one
that spills, uses stack, wants more shared memory than there is, or misses `wgmma` on sm_90 where its tiles have 64 rows
makes the command exit with 1. The costs are *estimates*, not measurements: the operations and bytes of `cost`, and the
least time that they take at the peak rates of an H200.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longmix_kernels.compiling import DTYPES, Compiled, as_table, compile_for, concluded, pairs
from longmix_kernels.scatter import cost, launch

SIZES = ((64, 64), (128, 64), (256, 64), (64, 128), (128, 128), (256, 128))
"""Features, and head dimension of values."""

BLOCKS = (64, 128, 256)
"""Tokens of a block; past the rows of a tile, they are compiled for once."""

_INPUTS = ("rows", "value", "output", "grad_output", "grad_value")
_OF_QUERIES = ("logsumexp", "delta", "deltas")
_STATE = ("memory", "normalizer", "log_scale", "grad_memory", "grad_normalizer", "grad_log_scale")
_INTEGERS = ("row_tiles", "block_size", "slots", "heads", "group", "length", "queries", "keys", "stride_blocks")


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Attributes:
        kernel: one of `launch.KERNELS`.
        with_state: whether there is an initial state; the other kernels do not know of it.
        config: None for that of the launch table.
    """

    kernel: str
    architecture: int
    dtype: str
    features: int
    value_dim: int
    block_size: int = 128
    with_state: bool = True
    config: launch.LaunchConfig | None = None

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        config = self.config or launch.table_entry(self.kernel, self.architecture, DTYPES[self.dtype])
        return config.within(self.block_size, self.features, self.value_dim)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has."""
        absent: list[str] = [] if self.with_state else [*_STATE]
        if self.kernel == "sums":
            absent += _OF_QUERIES
        sizes = {"FEATURES": self.features, "VALUE_DIM": self.value_dim, "UPCAST": False}
        return {**sizes, **self.launch_config().tiles(), **dict.fromkeys(absent)}

    def faults(self, compiled: Compiled) -> list[str]:
        """Name what must not be; the scans multiply no matrices, and `sums` has features for rows."""
        config = self.launch_config()
        height = config.features if self.kernel in ("sums", "grad_sums") else config.rows
        return compiled.faults(self, with_wgmma=bool(height >= 64 and config.rows))


def _kernel(name: str) -> Any:
    file, function = {"grad_sums": ("sums", "sums"), "grad_scan": ("scan", "grad_scan")}.get(name, (name, name))
    return getattr(importlib.import_module(f"longmix_kernels.scatter.triton_{file}"), f"{function}_kernel")


def compile_kernel(build: Build) -> Compiled:
    """Compile a kernel as the launcher would for aligned tensors, and read what ptxas says about it."""
    kernel, config = _kernel(build.kernel), build.launch_config()

    def type_of(name: str) -> str:
        if name in _INTEGERS:
            return "i32"
        return "*i32" if name == "blocks" else f"*{build.dtype}" if name in _INPUTS else "*fp32"

    return compile_for(kernel, type_of, build.constants(), build.architecture, config.options())


def table_builds(
    architectures: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    block_sizes: Sequence[int] = BLOCKS[1:2],
    dtype: str = "bf16",
) -> list[Build]:
    """Return every kernel for every combination that is not the same code as one before it."""
    builds: dict[tuple, Build] = {}
    for architecture in architectures:
        for features, value_dim in sizes:
            for block_size in block_sizes:
                for kernel in launch.KERNELS:
                    build = Build(kernel, architecture, dtype, features, value_dim, block_size)
                    builds.setdefault((kernel, architecture, features, value_dim, build.launch_config()), build)
    return list(builds.values())


def as_row(build: Build, compiled: Compiled) -> dict[str, Any]:
    """Return everything known about a kernel as one flat record."""
    return {
        "kernel": build.kernel,
        "arch": f"sm_{build.architecture}",
        "dtype": build.dtype,
        "features": build.features,
        "value_dim": build.value_dim,
        "block": build.block_size,
        **{
            f"tile_{name}" if name in ("features", "values") else name: x
            for name, x in asdict(build.launch_config()).items()
        },
        **compiled.columns(),
        "faults": ", ".join(build.faults(compiled)),
    }


ROWS = 16 * 65536
"""Tokens times heads of the setting in which costs are given."""


def cost_rows() -> list[dict[str, Any]]:
    """Return the predicted work and least time of every kernel, of passes, and of the same passes in torch."""
    rows = []
    for features, dim, block_size in ((64, 64, 128), (128, 128, 128), (256, 64, 256)):
        setting = cost.Setting(ROWS, dim, dim, features, block_size)
        kernels, blocked = cost.kernel_work(setting), cost.blocked_work(setting)
        parts = {name: [work] for name, work in kernels.items()}
        for name, order in (("forward", cost.FORWARD), ("backward", cost.BACKWARD)):
            parts[name] = [kernels[kernel] for kernel in order]
            parts[f"{name}, far"] = [kernels[kernel] for kernel in order if not kernel.startswith("exact")]
            parts[f"{name}, far, blocked"] = [blocked[name]]
        for name, works in parts.items():
            rows.append(
                {
                    "features": features,
                    "dim": dim,
                    "block": block_size,
                    "kernel": name,
                    "bytes_per_row": sum(work.bytes for work in works) / ROWS,
                    "kflop_per_row": sum(work.flops for work in works) / ROWS / 1e3,
                    "h200_floor_ms": sum(work.seconds for work in works) * 1e3,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print both tables, and return 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m longmix_kernels.scatter.report", description="Compile without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=launch.ARCHITECTURES, default=launch.ARCHITECTURES)
    default = [f"{a}/{b}" for a, b in SIZES]
    parser.add_argument("--sizes", nargs="+", default=default, help="features and head dimensions of values, as 64/64")
    parser.add_argument("--block", type=int, nargs="+", default=BLOCKS, help="tokens of a block")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--cost-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="write the records here too")
    options = parser.parse_args(arguments)
    sizes = pairs(parser, "--sizes", options.sizes, "64/64", (0, 256))
    if min(options.block) < 1:
        parser.error(f"--block got {options.block}; allowed are at least 1")
    rows = []
    if not options.cost_only:
        builds = table_builds(options.arch, sizes, options.block, options.dtype)
        rows = [as_row(build, compile_kernel(build)) for build in builds]
        print(as_table(rows), end="\n\n")
    costs = cost_rows()
    print(as_table(costs))
    print(
        f"\nEstimates, not measurements: a row is a token of a head, and times are for {ROWS} of them at an H200's "
        "peak rates, each tensor once per kernel; a pass is the sum of its kernels. The far part `blocked` is that of "
        "torch operations, counted by what each of them reads and writes."
    )
    return concluded(rows, options.json, {"kernels": rows, "costs": costs})


if __name__ == "__main__":
    sys.exit(main())
