"""What every launch configuration compiles to, found without a GPU: `python -m longmix_kernels.report`.

Each kernel is compiled ahead of time for each architecture of the launch table. Registers, spills and stack come from
`ptxas --verbose`, tensor-core instructions from the PTX, shared memory from Triton. A kernel that spills, uses stack,
wants more shared memory than there is, or misses `wgmma` on sm_90 for 16-bit inputs makes the command exit with 1.

The roofline is an *estimate*, not a measurement: the operations, bytes and exponentials that the mathematics asks for,
against the peak rates of an H200. Columns per tile count one step of the inner loop; the time floor is for a whole
causal call, in which every tensor is read or written once and all else stays on the chip.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmix_kernels.attention import launch
from longmix_kernels.compiling import DTYPES, Compiled, as_table, compile_for, concluded
from longmix_kernels.launching import dim_constants, is_padded

FEATURES = ("plain", "permuted", "alibi", "blocks")
MODES = ("full", "causal", "window", "documents", "bounds")
BLOCK = 128
"""Rows of a block where a kernel is compiled for a block list."""

# NVIDIA H200 SXM: dense bf16 tensor cores, HBM3e, and 16 exponentials per cycle and multiprocessor (132 at 1.83 GHz).
# Products of float32 are not rounded to TF32 and run outside the tensor cores.
PEAK_FLOPS = {2: 989e12, 4: 67e12}
PEAK_BYTES = 4.8e12
PEAK_EXPONENTIALS = 3.9e12

_INTEGERS = ("queries", "keys", "heads", "group", "window")
_FLOATS = ("scale", "scale_log2")
_LISTS = ("row_offsets", "row_blocks", "key_offsets", "key_blocks")
_INT32 = ("lo", "hi", "first_row", "end_row", "query_order", "key_order", *_LISTS)
_FLOAT32 = ("logsumexp", "grad_logsumexp", "shift", "minus_delta", "alibi_slopes")


@dataclass(frozen=True)
class Build:
    """One kernel to compile."""

    kernel: str
    architecture: int
    dtype: str
    dim: int
    value_dim: int
    mode: str = "causal"
    feature: str = "plain"
    config: launch.LaunchConfig | None = None

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile, that of the launch table unless another was given."""
        width = max(self.dim, self.value_dim)
        size = DTYPES[self.dtype]
        features = [self.feature] if self.feature != "plain" else []
        if is_padded(self.dim) or is_padded(self.value_dim):
            features.append("padded")
        config = self.config or launch.table_entry(self.kernel, self.architecture, size, width, features)
        return config.within(BLOCK if self.feature == "blocks" else 0)


def _kernel(name: str) -> Any:
    module = importlib.import_module(f"longmix_kernels.attention.triton_{name}")
    return getattr(module, f"{name}_kernel")


def compile_kernel(build: Build) -> Compiled:
    """Compile a kernel as the launcher would for aligned tensors, and read what ptxas says about it."""
    kernel, config = _kernel(build.kernel), build.launch_config()
    constants: dict[str, Any] = {
        "MODE": build.mode,
        "BLOCK": BLOCK if build.feature == "blocks" else 0,
        "GATHER_QUERY": build.feature == "permuted",
        "GATHER_KEY": build.feature == "permuted",
        "NEGATIVE_SCALE": False,
        **dim_constants(build.dim, build.value_dim),
        **config.tiles(),
        "UPCAST": False,
        "FOLD": config.fold,
    }
    if build.mode != "bounds":
        constants |= dict.fromkeys(("hi", "first_row"))
    if build.mode not in ("bounds", "documents"):
        constants |= dict.fromkeys(("lo", "end_row"))
    absent = {"permuted": ("query_order", "key_order"), "alibi": ("alibi_slopes",), "blocks": _LISTS}
    for feature, names in absent.items():
        if feature != build.feature:
            constants |= dict.fromkeys(names)

    def type_of(name: str) -> str:
        if name in _INTEGERS:
            return "i32"
        if name in _FLOATS:
            return "fp32"
        return "*i32" if name in _INT32 else "*fp32" if name in _FLOAT32 else f"*{build.dtype}"

    return compile_for(kernel, type_of, constants, build.architecture, config.options())


@dataclass(frozen=True)
class Roofline:
    """Estimated work of a kernel: of one step of its inner loop, and of a whole causal call on an H200.

    Attributes:
        tile_flops: operations of the products of one [rows, keys] tile.
        tile_bytes: bytes that the tile loads.
        tile_exponentials: one per score.
        call_bytes: bytes that a whole call reads and writes.
        before_bytes: the same if permuted rows are put in order by copies around the kernel, instead of in its loads;
            the arithmetic of their indices is not counted. None where no rows are permuted.
        flop_seconds, byte_seconds, exponential_seconds: of a whole call, each at its peak rate.
    """

    tile_flops: int
    tile_bytes: int
    tile_exponentials: int
    call_bytes: int
    before_bytes: int | None
    flop_seconds: float
    byte_seconds: float
    exponential_seconds: float

    @property
    def floor_seconds(self) -> float:
        """The longest of the three times: none of the work can be done faster."""
        return max(self.flop_seconds, self.byte_seconds, self.exponential_seconds)

    @property
    def limit(self) -> str:
        """What takes the longest."""
        times = {"products": self.flop_seconds, "bytes": self.byte_seconds, "exp": self.exponential_seconds}
        return max(times, key=lambda name: times[name])


def roofline(build: Build, *, batch: int = 1, heads: int = 16, length: int = 16384) -> Roofline:
    """Count the work of a kernel, for a causal call [batch, length, heads, dim] with as many key heads.

    Block lists are taken to list every block. ALiBi's bias is neither a product nor read.
    """
    config, size = build.launch_config(), DTYPES[build.dtype]
    dim, value_dim = build.dim, build.value_dim
    # Columns that go through a product per score; matrices of `dim` and of `value_dim` columns, and float32 numbers per
    # row, that a call reads or writes; which of these would be copied to put rows in order; and how much one step of
    # the inner loop loads.
    columns, moved, copied, tile_bytes = {
        "forward": (dim + value_dim, (2, 2, 1), (2, 2, 1), config.keys * (dim + value_dim) * size),
        "grad_query": (2 * dim + value_dim, (3, 3, 4), (3, 3, 2), config.keys * (dim + value_dim) * size),
        "grad_key_value": (
            2 * (dim + value_dim),
            (3, 3, 2),
            (1, 1, 0),
            config.rows * ((dim + value_dim) * size + 8),
        ),
    }[build.kernel]
    rows = batch * heads * length
    call_bytes, copied_bytes = (
        rows * ((matrices * dim + value_matrices * value_dim) * size + 4 * numbers)
        for matrices, value_matrices, numbers in (moved, copied)
    )
    before_bytes = None
    if build.feature == "permuted":
        # A copy reads and writes; in the kernel, every step and every row read the number of a row, an int32.
        before_bytes = call_bytes + 2 * copied_bytes
        tile_bytes += 4 * (config.rows if build.kernel == "grad_key_value" else config.keys)
        call_bytes += rows * 2 * 4
    scores = batch * heads * length * (length + 1) // 2
    return Roofline(
        tile_flops=2 * config.rows * config.keys * columns,
        tile_bytes=tile_bytes,
        tile_exponentials=config.rows * config.keys,
        call_bytes=call_bytes,
        before_bytes=before_bytes,
        flop_seconds=2 * scores * columns / PEAK_FLOPS[size],
        byte_seconds=call_bytes / PEAK_BYTES,
        exponential_seconds=scores / PEAK_EXPONENTIALS,
    )


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    features: Sequence[str] = ("plain",),
) -> list[Build]:
    """Return every kernel for every combination."""
    return [
        Build(kernel, architecture, dtype, dim, dim, mode, feature)
        for architecture in architectures
        for dtype in dtypes
        for dim in dims
        for kernel in launch.KERNELS
        for mode in modes
        for feature in features
    ]


def as_row(build: Build, compiled: Compiled) -> dict[str, Any]:
    """Return everything known about a kernel as one flat record."""
    config, estimate = build.launch_config(), roofline(build)
    return {
        "kernel": build.kernel,
        "arch": f"sm_{build.architecture}",
        "dtype": build.dtype,
        "dim": build.dim,
        "mode": build.mode,
        "feature": build.feature,
        **dataclasses.asdict(config),
        **compiled.columns(),
        "tile_mflop": estimate.tile_flops / 1e6,
        "tile_kib": estimate.tile_bytes / 1024,
        "tile_kexp": estimate.tile_exponentials / 1e3,
        "call_mib": estimate.call_bytes / 2**20,
        "before_mib": "" if estimate.before_bytes is None else estimate.before_bytes / 2**20,
        "h200_floor_ms": estimate.floor_seconds * 1e3,
        "limit": estimate.limit,
        "faults": ", ".join(compiled.faults(build)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m longmix_kernels.report", description="Compile without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", choices=launch.ARCHITECTURES, default=launch.ARCHITECTURES)
    parser.add_argument("--dim", type=int, nargs="+", default=launch.WIDTHS, help="head dimensions, 1 to 256")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("bf16",))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=("causal",), help="where bounds come from")
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")
    parser.add_argument("--json", type=Path, help="write the records here too")
    options = parser.parse_args(arguments)
    if not all(1 <= dim <= max(launch.WIDTHS) for dim in options.dim):
        parser.error(f"--dim got {options.dim}; allowed are 1 to {max(launch.WIDTHS)}")
    builds = table_builds(options.arch, options.dim, options.dtype, options.mode, options.feature)
    rows = [as_row(build, compile_kernel(build)) for build in builds]
    print(as_table(rows))
    print(
        "\nEstimates, not measurements: work per tile, and bytes and least time of a causal call with batch 1, 16 "
        "heads and T = 16384 at an H200's peak rates; before_mib is for permuted rows copied into order beforehand."
    )
    return concluded(rows, options.json, rows)


if __name__ == "__main__":
    sys.exit(main())
