"""Report what the scatter kernels compile to, and what a call costs, for `longmix_kernels.report`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.cost import pass_rows
from longmix_kernels.report import read_pairs
from longmix_kernels.scatter import cost, launch

SIZES = ((64, 64), (128, 64), (256, 64), (64, 128), (128, 128), (256, 128))
"""Pairs of features and head dimension of values, for which kernels are compiled."""

BLOCKS = (64, 128, 256)
"""Tokens of a block for which kernels are compiled. Blocks larger than a tile's rows all have the same kernels."""

ROWS = 16 * 65536
"""Tokens times heads of the call that costs are for."""

NOTE = (
    f"A row is a token of a head, and times are for {ROWS} of them. `far` is without the exact part, which is the "
    "attention engine's; `blocked` is the far part in torch operations, counted by what each of them reads and writes."
)

_OF_QUERIES = {"sums": ("logsumexp", "delta", "deltas"), **dict.fromkeys(("scan", "merge", "grad_query"), ("deltas",))}
"""What is absent in sums over keys, by kernel."""
_STATE = ("memory", "normalizer", "log_scale", "grad_memory", "grad_normalizer", "grad_log_scale")
_INTEGERS = ("row_tiles", "block_size", "slots", "heads", "group", "length", "queries", "keys")
_FUNCTIONS = {"grad_sums": "sums.sums", "grad_scan": "scan.grad_scan"}


@dataclass(frozen=True)
class Build(aot.Build):
    """One kernel to compile.

    Attributes:
        features: how many features there are, m.
        value_dim: the head dimension of values.
        block_size: tokens of a block.
        with_state: whether there is an initial state; only the scans have a use for it.
        config: the configuration; None for that of the launch table.
    """

    features: int
    value_dim: int
    block_size: int = 128
    with_state: bool = True
    config: launch.LaunchConfig | None = None

    FUNCTIONS: ClassVar = {
        kernel: f"longmix_kernels.scatter.triton_{_FUNCTIONS.get(kernel, f'{kernel}.{kernel}')}_kernel"
        for kernel in launch.KERNELS
    }
    TYPES: ClassVar = {**dict.fromkeys(_INTEGERS, "i32"), "blocks": "*i32"}

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant: all tensors but rows are float32."""
        found = super().type_of(name)
        rows = ("rows", "value", "output", "grad_output", "grad_value")
        return found if name in rows or found[-3:] == "i32" else "*fp32"

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        sizes = self.architecture, aot.DTYPES[self.dtype], self.value_dim
        config = self.config or launch.table_entry(self.kernel, *sizes)
        return config.within(self.block_size, self.features, self.value_dim)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""
        absent = (*(() if self.with_state else _STATE), *_OF_QUERIES.get(self.kernel, ()))
        sizes = {"FEATURES": self.features, "VALUE_DIM": self.value_dim, "UPCAST": False}
        return {**sizes, **self.launch_config().tiles(), **dict.fromkeys(absent)}

    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it."""
        return {"sizes": f"{self.features}/{self.value_dim}", "block": self.block_size}

    def wants_wgmma(self) -> bool:
        """Say whether its tiles have 64 rows. The scans multiply no matrices; the rows of sums are features."""
        config = self.launch_config()
        height = config.features if self.kernel in ("sums", "grad_sums") else config.rows
        return height >= 64 and config.rows > 0


def table_builds(
    architectures: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    block_sizes: Sequence[int] = BLOCKS[1:2],
    dtype: str = "bf16",
) -> list[Build]:
    """Return every kernel for every combination of the arguments, but the same code only once.

    Args:
        architectures: compute capabilities, times ten.
        sizes: pairs of features and head dimension of values.
        block_sizes: tokens of a block.
        dtype: the element type, of `aot.DTYPES`.
    """
    found: dict[tuple, Build] = {}
    for architecture in architectures:
        for features, value_dim in sizes:
            for block_size in block_sizes:
                for kernel in launch.KERNELS:
                    build = Build(kernel, architecture, dtype, features, value_dim, block_size)
                    found.setdefault((kernel, architecture, features, value_dim, build.launch_config()), build)
    return list(found.values())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that decide what is compiled."""
    default = [f"{a}/{b}" for a, b in SIZES]
    parser.add_argument("--sizes", nargs="+", default=default, help="features and head dimensions of values, as 64/64")
    parser.add_argument("--block", type=int, nargs="+", default=BLOCKS, help="tokens of a block")


def builds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Build]:
    """Return the kernels that the options ask for.

    Args:
        parser: the command's parser; it ends the command if an option makes no sense.
        options: the parsed options.
    """
    sizes = read_pairs(parser, "--sizes", options.sizes, "64/64", (0, 256))
    if min(options.block) < 1:
        parser.error(f"--block got {options.block}; allowed are at least 1")
    return table_builds(options.arch, sizes, options.block, options.dtype)


def costs(options: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Return the work of every kernel, of passes, and of the far part of passes, also in torch; a record each.

    Args:
        options: not used; costs have fixed settings.
    """
    rows = []
    for features, dim, block_size in ((64, 64, 128), (128, 128, 128), (256, 64, 256)):
        setting = cost.Setting(ROWS, dim, dim, features, block_size)
        kernels = cost.kernel_work(setting)
        passes = pass_rows(kernels, cost.FORWARD, cost.BACKWARD, ROWS)
        forward, backward = ([name for name in order if name[:5] != "exact"] for order in (cost.FORWARD, cost.BACKWARD))
        far = pass_rows(kernels, forward, backward, ROWS)
        blocked = pass_rows(cost.blocked_work(setting), ("forward",), ("backward",), ROWS)
        for name in ("forward", "backward", "both"):
            passes |= {f"{name}, far": far[name], f"{name}, far, blocked": blocked[name]}
        head = {"features": features, "dim": dim, "block": block_size}
        rows += [{**head, "kernel": kernel, **columns} for kernel, columns in passes.items()]
    return rows
