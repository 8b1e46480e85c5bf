"""Report what the attention kernels compile to, and what a causal call costs, for `longmix_kernels.report`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.attention import cost, launch
from longmix_kernels.columns import Columns, is_padded
from longmix_kernels.cost import pass_rows

FEATURES = ("plain", "permuted", "alibi", "blocks", "ragged")
"""The features that a call may have besides bounds. "ragged" is for decoding alone: rows read runs of their own."""

MODES = ("full", "causal", "window", "documents", "bounds")
"""Where bounds may come from; `triton_walk` says what each means."""

BLOCK = 128
"""How many rows a block has where a kernel is compiled for a block list."""

HEADS, LENGTH = 16, 16384
"""The heads and the tokens of the call that costs are for, with batch 1."""

NOTE = (
    f"Costs are for causal calls with batch 1, {HEADS} heads and T = {LENGTH}. Permuted rows are taken in their order "
    "by the kernels' loads; `copied` has copies around the kernels put them in order. Tiles are those of one step of "
    "the inner loop."
)

_LISTS = ("row_offsets", "row_blocks", "key_offsets", "key_blocks")
_FEATURE_TENSORS = {"permuted": ("query_order", "key_order"), "alibi": ("alibi_slopes",), "blocks": _LISTS}


@dataclass(frozen=True)
class Build(aot.Build):
    """One kernel to compile.

    Attributes:
        dim, value_dim: the head dimensions of keys and of values.
        mode: where bounds come from, one of `MODES`.
        feature: what the call has besides, one of `FEATURES`.
        config: the configuration; None for that of the launch table.
    """

    dim: int
    value_dim: int
    mode: str = "causal"
    feature: str = "plain"
    config: launch.LaunchConfig | None = None

    FUNCTIONS: ClassVar = {
        kernel: f"longmix_kernels.attention.triton_{kernel}.{kernel}_kernel" for kernel in launch.KERNELS
    }
    TYPES: ClassVar = {
        **dict.fromkeys(("queries", "keys", "heads", "group", "window"), "i32"),
        **dict.fromkeys(("scale", "scale_log2"), "fp32"),
        **dict.fromkeys(("lo", "hi", "first_row", "end_row", "query_order", "key_order", *_LISTS), "*i32"),
        **dict.fromkeys(("logsumexp", "grad_logsumexp", "shift", "minus_delta", "alibi_slopes"), "*fp32"),
    }

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        columns = {"key_steps": self.dim, "value_steps": self.value_dim}.get(name)
        if columns is None:
            return super().type_of(name)
        return f"tensordesc<{self.dtype}[1, {self.launch_config().keys}, 1, {columns}]>"

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        features = [self.feature] if self.feature != "plain" else []
        if is_padded(self.dim) or is_padded(self.value_dim):
            features.append("padded")
        width = max(self.dim, self.value_dim)
        entry = launch.table_entry(self.kernel, self.architecture, aot.DTYPES[self.dtype], width, features)
        return (self.config or entry).within(BLOCK if self.feature == "blocks" else 0)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""
        absent = [name for feature, names in _FEATURE_TENSORS.items() if feature != self.feature for name in names]
        if self.mode != "bounds":
            absent += ["hi", "first_row"]
        if self.mode not in ("bounds", "documents"):
            absent += ["lo", "end_row"]
        if not self.launch_config().descriptors:
            absent += ["key_steps", "value_steps"]
        return {
            "MODE": self.mode,
            "BLOCK": BLOCK if self.feature == "blocks" else 0,
            "GATHER_QUERY": self.feature == "permuted",
            "GATHER_KEY": self.feature == "permuted",
            "NEGATIVE_SCALE": False,
            "UPCAST": False,
            "DIM": Columns.of(self.dim),
            "VALUE_DIM": Columns.of(self.value_dim),
            **self.launch_config().tiles(),
            **dict.fromkeys(absent),
        }

    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it, with the work of one step of its inner loop."""
        tile = cost.tile_work(self.kernel, self.launch_config(), self.setting())
        return {
            "dim": self.dim,
            "mode": self.mode,
            "feature": self.feature,
            "tile_mflop": tile.flops / 1e6,
            "tile_kib": tile.bytes / 1024,
            "tile_kexp": tile.exponentials / 1e3,
        }

    def setting(self) -> cost.Setting:
        """Return the sizes of the call that costs are for."""
        return setting_of(self.dim, self.value_dim, aot.DTYPES[self.dtype], self.feature == "permuted")


def setting_of(dim: int, value_dim: int, size: int = 2, permuted: bool = False) -> cost.Setting:
    """Return the sizes of the call that costs are for, at these head dimensions."""
    return cost.Setting(HEADS * LENGTH, LENGTH, dim, value_dim, size, permuted)


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str] = ("bf16",),
    modes: Sequence[str] = ("causal",),
    features: Sequence[str] = ("plain",),
) -> list[Build]:
    """Return every kernel for every combination of the arguments.

    Args:
        architectures: compute capabilities, times ten.
        dims: head dimensions, of keys and of values alike.
        dtypes: element types, of `aot.DTYPES`.
        modes: of `MODES`.
        features: of `FEATURES`.
    """
    return [
        Build(kernel, architecture, dtype, dim, dim, mode, feature)
        for architecture in architectures
        for dtype in dtypes
        for dim in dims
        for kernel in launch.KERNELS
        for mode in modes
        for feature in features
        if feature != "ragged"
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options that decide what is compiled."""
    parser.add_argument("--dim", type=int, nargs="+", default=launch.WIDTHS, help="head dimensions, 1 to 256")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=("causal",), help="where bounds come from")
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")


def builds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[aot.Build]:
    """Return the kernels that the options ask for.

    Args:
        parser: the command's parser; it ends the command if an option makes no sense.
        options: the parsed options.
    """
    if not all(1 <= dim <= max(launch.WIDTHS) for dim in options.dim):
        parser.error(f"--dim got {options.dim}; allowed are 1 to {max(launch.WIDTHS)}")
    # imported here, since they import this module
    from longmix_kernels.attention import decode_report, probe_report, split_report

    chosen = options.arch, options.dim, (options.dtype,), options.mode, options.feature
    steps = decode_report.builds(options.arch, options.dim, (options.dtype,), options.feature)
    return [*table_builds(*chosen), *split_report.builds(*chosen), *probe_report.builds(*chosen), *steps]


def costs(options: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Return the work of every kernel and of whole passes at head dimensions 64 and 128, a record each.

    Args:
        options: not used; costs have one setting.
    """
    from longmix_kernels.attention import probe_report

    passes = {"forward": cost.FORWARD, "backward": cost.BACKWARD, "both": (*cost.FORWARD, *cost.BACKWARD)}
    rows = []
    for dim in (64, 128):
        for permuted in (False, True):
            setting = setting_of(dim, dim, permuted=permuted)
            kernels = cost.kernel_work(setting)
            for kernel, columns in pass_rows(kernels, cost.FORWARD, cost.BACKWARD, setting.rows).items():
                of_pass = passes.get(kernel, (kernel,))
                copied = sum(cost.copying_bytes(name, setting) for name in of_pass) / setting.rows if permuted else ""
                limit = kernels[kernel].limit if kernel in kernels else ""
                head = {"dim": dim, "rows": "permuted" if permuted else "in order", "kernel": kernel}
                rows.append({**head, **columns, "copied_bytes_per_row": copied, "limit": limit})
    return [*rows, *probe_report.costs()]
