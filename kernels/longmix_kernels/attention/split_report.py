"""Report what the kernels of `split_launch` compile to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.attention import launch, report, split_launch
from longmix_kernels.columns import cover

FEATURES = ("plain", "permuted", "alibi")
"""The features that a call may have besides bounds; block lists are not among them."""


@dataclass(frozen=True)
class Build(report.Build):
    """One kernel to compile, with the attributes of `report.Build`."""

    FUNCTIONS: ClassVar = {
        kernel: f"longmix_kernels.attention.triton_split.{kernel}_kernel" for kernel in split_launch.KERNELS
    }
    TYPES: ClassVar = {
        **report.Build.TYPES,
        **dict.fromkeys(("batches", "key_heads", "splits", "rows"), "i32"),
        **dict.fromkeys(("partial", "partial_logsumexp"), "*fp32"),
    }

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        width, size = max(self.dim, self.value_dim), aot.DTYPES[self.dtype]
        return self.config or split_launch.TABLE.entry(self.kernel, self.architecture, size, width)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""
        most = max(split_launch.SPLITS)
        return {**super().constants(), "MOST_SPLITS": most, "VALUE_COVER": cover(self.value_dim)}

    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it, with the work of one step of its inner loop."""
        config, merges = self.launch_config(), self.kernel == "split_merge"
        both, scores = self.dim + self.value_dim, config.rows * config.keys
        loaded = self.value_dim * 4 if merges else config.keys * both * aot.DTYPES[self.dtype]
        return {
            "dim": self.dim,
            "mode": self.mode,
            "feature": self.feature,
            "tile_mflop": 0.0 if merges else 2 * scores * both / 1e6,
            "tile_kib": loaded / 1024,
            "tile_kexp": (1 if merges else scores) / 1e3,
        }

    def wants_wgmma(self) -> bool:
        """Return False: tiles of 16 rows are too small for that instruction."""
        return False


def builds(
    architectures: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str] = ("bf16",),
    modes: Sequence[str] = ("causal",),
    features: Sequence[str] = ("plain",),
) -> list[Build]:
    """Return every kernel for every combination of the arguments.

    The merge has neither modes nor features, so it takes the first mode and no feature.

    Args:
        architectures, dims, dtypes, modes, features: as in `report.table_builds`; block lists are left out.
    """
    return [
        Build(kernel, architecture, dtype, dim, dim, mode, feature)
        for architecture in architectures
        for dtype in dtypes
        for dim in dims
        for kernel in split_launch.KERNELS
        for mode in (modes if kernel == "split_forward" else modes[:1])
        for feature in ([name for name in features if name in FEATURES] if kernel == "split_forward" else ("plain",))
    ]
