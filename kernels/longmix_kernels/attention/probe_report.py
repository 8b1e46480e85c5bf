"""Report what the kernels of attention with a probe compile to, and what a causal call costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.attention import launch, probe_cost, probe_launch, report
from longmix_kernels.columns import is_padded
from longmix_kernels.cost import pass_rows

FEATURES = ("plain", "permuted", "alibi")
"""The features that a call may have besides bounds; block lists are not among them."""


@dataclass(frozen=True)
class Build(report.Build):
    """One kernel to compile, with the attributes of `report.Build`."""

    FUNCTIONS: ClassVar = {
        kernel: f"longmix_kernels.attention.triton_{function}.{function}_kernel"
        for kernel, function in (
            *((kernel, kernel) for kernel in probe_launch.KERNELS if kernel != "probe_split"),
            ("probe_split", "probe_forward"),
        )
    }
    TYPES: ClassVar = {
        **report.Build.TYPES,
        **dict.fromkeys(("batches", "splits"), "i32"),
        "own_order": "*i32",
        **dict.fromkeys(("expected", "minus_level", "minus_base", "rest"), "*fp32"),
    }

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        # The parts of divided keys are merged from float32.
        return "*fp32" if self.kernel == "probe_split" and name in ("output", "plain") else super().type_of(name)

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        features = [self.feature] if self.feature != "plain" else []
        if is_padded(self.dim) or is_padded(self.value_dim):
            features.append("padded")
        width, size = max(self.dim, self.value_dim), aot.DTYPES[self.dtype]
        return self.config or probe_launch.table_entry(self.kernel, self.architecture, size, width, features)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""
        absent = {} if self.feature == "permuted" else {"own_order": None}
        return {**super().constants(), **absent}

    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it, with the work of one step of its inner loop."""
        kernel = "probe_forward" if self.kernel == "probe_split" else self.kernel
        tile = probe_cost.tile_work(kernel, self.launch_config(), self.setting())
        return {
            "dim": self.dim,
            "mode": self.mode,
            "feature": self.feature,
            "tile_mflop": tile.flops / 1e6,
            "tile_kib": tile.bytes / 1024,
            "tile_kexp": tile.exponentials / 1e3,
        }

    def wants_wgmma(self) -> bool:
        """Say whether its tiles are large enough for `wgmma`; those of few queries are not."""
        return self.kernel != "probe_split"


def builds(
    architectures: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str] = ("bf16",),
    modes: Sequence[str] = ("causal",),
    features: Sequence[str] = ("plain",),
) -> list[Build]:
    """Return every kernel for every combination of the arguments.

    Args:
        architectures, dims, dtypes, modes, features: as in `report.table_builds`; larger head dimensions than the
            kernels cover, and block lists, are left out.
    """
    return [
        Build(kernel, architecture, dtype, dim, dim, mode, feature)
        for architecture in architectures
        for dtype in dtypes
        for dim in dims
        if dim <= max(probe_launch.WIDTHS)
        for kernel in probe_launch.KERNELS
        for mode in modes
        for feature in features
        if feature in FEATURES
    ]


def costs() -> list[dict[str, Any]]:
    """Return the work of every kernel and of whole passes at head dimensions 64 and 128, a record each."""
    rows = []
    for dim in (64, 128):
        setting = report.setting_of(dim, dim)
        kernels = probe_cost.kernel_work(setting)
        for kernel, columns in pass_rows(kernels, probe_cost.FORWARD, probe_cost.BACKWARD, setting.rows).items():
            name = kernel if kernel.startswith("probe_") else f"probe {kernel}"
            limit = kernels[kernel].limit if kernel in kernels else ""
            head = {"dim": dim, "rows": "in order", "kernel": name}
            rows.append({**head, **columns, "copied_bytes_per_row": "", "limit": limit})
    return rows
