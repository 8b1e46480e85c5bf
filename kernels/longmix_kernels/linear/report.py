"""What the linear-attention kernels compile to, and what a call costs: see `longmix_kernels.report`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.columns import cover, dim_constants
from longmix_kernels.cost import pass_rows
from longmix_kernels.linear import cost, launch
from longmix_kernels.report import read_pairs

DIMS = ((64, 64), (64, 128), (128, 256), (256, 512))
"""Head dimensions of keys and values."""

GATES = ("exp", "sig")
"""mLSTM-exp, which is normalised, and mLSTM-sig, which is not."""

FEATURES = ("plain", "documents", "state", "documents-state")
"""What a call has besides; "state" is an initial state, and with documents a carried one too."""

# Milliseconds on an H100 SXM (3.35 TB/s), forward and forward with backward, as published with the kernels
# (NX-AI/mlstm_kernels, TFLA paper; 65536 tokens at T = 8192), by heads, dims, chunk and gate.
PUBLISHED = {
    (16, 128, 256, 128, "exp"): (6.37, 15.2),
    (16, 128, 256, 128, "sig"): (4.39, 12.8),
    (8, 256, 512, 128, "exp"): (8.24, 21.1),
    (8, 256, 512, 128, "sig"): (6.38, 19.0),
    (8, 256, 512, 256, "sig"): (6.30, 18.9),
}
TOKENS = 65536
"""Of the setting in which costs are given."""

NOTE = (
    f"A row is a token of a head, and times are for {TOKENS} tokens. Published times were measured by others on an "
    "H100; of the backward they are the difference between both passes and the forward."
)

_CARRIED = ("carried_memory", "carried_normalizer", "carried_log_scale", "grad_carried", "grad_carried_normalizer")
_OF_STATES = ("memory", "normalizer", "normalizers", "final_memory", "final_normalizer", "log_scale", "final_log_scale")
_GRADS_OF_STATES = ("grad_memory", "grad_normalizer", "grad_normalizers", "grad_initial", "grad_initial_normalizer")
_OF_GATES = ("log_decay", "log_input", "grad_log_decay", "grad_log_input", "read", "write", "grad_read", "grad_rest")
_OF_ROWS = ("row_whole", "row_rest", "column_whole", "column_rest", "row_log_scale", "denominator", "delta")
_SUMS = ("query_sum", "key_sum", "final_sum")


@dataclass(frozen=True)
class Build(aot.Build):
    """One kernel to compile.

    Attributes:
        dim, value_dim: of keys and of values.
        gate: one of `GATES`.
        feature: one of `FEATURES`.
        states: Triton's name of the type in which states are stored.
        part: "key" or "value" for the gradients of one of them alone; "" for both or for what the table says.
        config: None for that of the launch table.
    """

    dim: int
    value_dim: int
    gate: str = "exp"
    feature: str = "plain"
    chunk: int = 128
    states: str = "fp32"
    part: str = ""
    config: launch.LaunchConfig | None = None

    FUNCTIONS: ClassVar = {
        kernel: f"longmix_kernels.linear.triton_{module}.{kernel}_kernel"
        for module, kernels in {
            "gates": ("scales", "gates", "grad_gates"),
            "states": ("states", "grad_states"),
            "forward": ("output",),
            "backward": ("grad_rows",),
            "grad_query": ("grad_query",),
            "grad_key_value": ("grad_key_value",),
            "step": ("step",),
        }.items()
        for kernel in kernels
    }
    TYPES: ClassVar = {
        **dict.fromkeys(("length", "heads"), "i32"),
        "scale": "fp32",
        "document_ids": "*i32",
        **dict.fromkeys((*_OF_STATES, *_CARRIED, *_GRADS_OF_STATES, *_OF_GATES, *_OF_ROWS, *_SUMS), "*fp32"),
    }

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        return f"*{self.states}" if name in ("states", "grad_states") else super().type_of(name)

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        sizes = self.architecture, aot.DTYPES[self.dtype], self.dim, self.value_dim
        entry = launch.table_entry(self.kernel, *sizes, self.feature.startswith("documents"))
        return (self.config or entry).within(self.kernel, self.chunk, self.dim, self.value_dim)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has."""
        normalize, state = self.gate == "exp", self.feature.endswith("state")
        absent: list[str] = []
        if not normalize:
            absent += ["row_log_scale", "denominator", "normalizers", "grad_normalizers", "delta", "final_normalizer"]
            absent += ["grad_normalizer", "final_log_scale"]
        if not self.feature.startswith("documents"):
            absent += ["document_ids"]
        carried = self.feature == "documents-state"
        if not state:
            absent += ["memory", "grad_initial"]
        if not carried:
            absent += _CARRIED
        elif not normalize:
            absent += [name for name in _CARRIED if name not in ("carried_memory", "grad_carried")]
        if not state or not normalize:
            absent += ["normalizer", "grad_initial_normalizer", "log_scale"]
        absent += {"key": ["grad_value"], "value": ["grad_key", "key_sum"], "": []}[self.part]
        return {
            "NORMALIZE": normalize,
            "INITIAL": state,
            "CARRIED": carried,
            "CHUNK": self.chunk,
            "COVER": cover(self.dim),
            "UPCAST": False,
            **dim_constants(self.dim, self.value_dim),
            **self.launch_config().tiles(),
            **dict.fromkeys(absent),
        }

    def columns(self) -> dict[str, Any]:
        """Return what a report says of it."""
        dims = f"{self.dim}/{self.value_dim}"
        return {"dims": dims, "gate": self.gate, "feature": self.feature, "part": self.part}

    def wants_wgmma(self) -> bool:
        """Say whether it multiplies tiles."""
        return self.kernel in launch.TILED


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[tuple[int, int]],
    gates: Sequence[str] = GATES,
    features: Sequence[str] = ("plain",),
    dtype: str = "bf16",
    states: str = "fp32",
) -> list[Build]:
    """Return every kernel for every combination."""
    found = []
    for architecture in architectures:
        for dim, value_dim in dims:
            for gate in gates:
                for feature in features:
                    for kernel in launch.KERNELS:
                        if gate == "sig" and kernel in ("scales", "grad_rows"):
                            continue
                        common = (kernel, architecture, dtype, dim, value_dim, gate, feature)
                        build = Build(*common, states=states)
                        if kernel == "grad_key_value" and not build.launch_config().fused:
                            found += [Build(*common, states=states, part=part) for part in ("key", "value")]
                        else:
                            found.append(build)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what is compiled."""
    parser.add_argument("--dims", nargs="+", default=[f"{a}/{b}" for a, b in DIMS], help="head dimensions, as 128/256")
    parser.add_argument("--gate", nargs="+", choices=GATES, default=GATES)
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")
    parser.add_argument("--states", choices=("fp32", "bf16"), default="fp32", help="how states are stored")


def builds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Build]:
    """Return the kernels that the options ask for; the parser ends the command where they make no sense."""
    dims = read_pairs(parser, "--dims", options.dims, "128/256", (512, 512))
    return table_builds(options.arch, dims, options.gate, options.feature, options.dtype, options.states)


def costs(options: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Return the work of every kernel and of whole passes, in the setting of published times."""
    state_size = aot.DTYPES[options.states] if options else 4
    rows = []
    for heads, dim, value_dim in ((16, 128, 256), (8, 256, 512)):
        for chunk in (128, 256):
            for gate in GATES:
                setting = cost.Setting(TOKENS * heads, dim, value_dim, chunk, gate == "exp", state_size=state_size)
                times = PUBLISHED.get((heads, dim, value_dim, chunk, gate))
                published = {"forward": times[0], "backward": times[1] - times[0]} if times else {}
                passes = pass_rows(cost.kernel_work(setting), cost.FORWARD, cost.BACKWARD, setting.rows)
                head = {"heads": heads, "dims": f"{dim}/{value_dim}", "chunk": chunk, "gate": gate}
                rows += [
                    {**head, "kernel": kernel, **columns, "published_h100_ms": published.get(kernel, "")}
                    for kernel, columns in passes.items()
                ]
    return rows
