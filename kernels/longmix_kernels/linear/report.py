"""What every launch configuration compiles to, and what a call costs: `python -m longmix_kernels.linear.report`.

Nothing runs and no GPU is needed. Each kernel is compiled ahead of time for each architecture of the launch table; one
that spills, uses stack, wants more shared memory than there is, or misses `wgmma` on sm_90 makes the command exit with
1. The costs are *estimates*, not measurements: the operations and bytes of `cost`, each tensor read or written once per
kernel, and the least time that they take at the peak rates of an H200.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longmix_kernels.compiling import DTYPES, Compiled, as_table, compile_for, concluded, pairs
from longmix_kernels.launching import dim_constants
from longmix_kernels.linear import cost, launch

DIMS = ((64, 64), (64, 128), (128, 256), (256, 512))
"""Head dimensions of keys and values."""

GATES = ("exp", "sig")
"""mLSTM-exp, which is normalised, and mLSTM-sig, which is not."""

FEATURES = ("plain", "documents", "state", "documents-state")
"""What a call has besides; "state" is an initial state."""

KERNELS = (*launch.TILED, *launch.OTHERS)

_MODULES = {
    **{"output": "forward", "grad_states": "states", "grad_rows": "backward"},
    **dict.fromkeys(("scales", "gates", "grad_gates"), "gates"),
}
_INTEGERS = ("length", "heads")
_FLOAT32 = (
    *("memory", "normalizer", "normalizers", "final_memory", "final_normalizer", "grad_memory", "grad_normalizer"),
    *(
        "grad_normalizers",
        "grad_initial",
        "grad_initial_normalizer",
        "read",
        "write",
        "grad_read",
        "grad_rest",
        "delta",
    ),
    *("row_whole", "row_rest", "column_whole", "column_rest", "row_log_scale", "denominator", "query_sum", "key_sum"),
    *("log_decay", "log_input", "log_scale", "final_log_scale", "final_sum", "grad_log_decay", "grad_log_input"),
)


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Attributes:
        kernel: one of `KERNELS`.
        gate: one of `GATES`.
        states: Triton's name of the type in which states are stored.
        part: "key" or "value" for the gradients of one of them alone; "" for both or for what the table says.
        config: None for that of the launch table.
    """

    kernel: str
    architecture: int
    dtype: str
    dim: int
    value_dim: int
    gate: str = "exp"
    feature: str = "plain"
    chunk: int = 128
    states: str = "fp32"
    part: str = ""
    config: launch.LaunchConfig | None = None

    def launch_config(self) -> launch.LaunchConfig:
        """Return the configuration to compile."""
        size = DTYPES[self.dtype]
        documents = self.feature.startswith("documents")
        config = self.config or launch.table_entry(
            self.kernel, self.architecture, size, self.dim, self.value_dim, documents
        )
        if self.kernel in launch.OTHERS:
            return config
        return config.within(self.kernel, self.chunk, self.dim, self.value_dim)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has."""
        config, normalize = self.launch_config(), self.gate == "exp"
        documents, state = self.feature.startswith("documents"), self.feature.endswith("state")
        carries = self.kernel in ("states", "grad_states")
        constants: dict[str, Any] = {
            "NORMALIZE": normalize,
            "INITIAL": state,
            "CHUNK": self.chunk,
            **dim_constants(self.dim, self.value_dim),
            "UPCAST": False,
            **(config.blocks() if carries else config.tiles()),
        }
        absent: list[str] = []
        if not normalize:
            absent += ["row_log_scale", "denominator", "normalizers", "grad_normalizers", "delta", "final_normalizer"]
            absent += ["grad_normalizer"]
        if not documents:
            absent += ["document_ids"]
        if not state:
            absent += ["memory", "grad_initial"]
        if not state or not normalize:
            absent += ["normalizer", "grad_initial_normalizer", "log_scale"]
        absent += {"key": ["grad_value"], "value": ["grad_key", "key_sum"], "": []}[self.part]
        return constants | dict.fromkeys(absent)

    def faults(self, compiled: Compiled) -> list[str]:
        """Name what must not be."""
        return compiled.faults(self, with_wgmma=self.kernel in launch.TILED)


def _kernel(name: str) -> Any:
    module = importlib.import_module(f"longmix_kernels.linear.triton_{_MODULES.get(name, name)}")
    return getattr(module, f"{name}_kernel")


def compile_kernel(build: Build) -> Compiled:
    """Compile a kernel as the launcher would for aligned tensors, and read what ptxas says about it."""
    kernel, config = _kernel(build.kernel), build.launch_config()

    def type_of(name: str) -> str:
        if name in _INTEGERS:
            return "i32"
        if name == "scale":
            return "fp32"
        if name in ("states", "grad_states"):
            return f"*{build.states}"
        return "*i32" if name == "document_ids" else "*fp32" if name in _FLOAT32 else f"*{build.dtype}"

    return compile_for(kernel, type_of, build.constants(), build.architecture, config.options())


def table_builds(
    architectures: Sequence[int],
    dims: Sequence[tuple[int, int]],
    gates: Sequence[str],
    features: Sequence[str] = ("plain",),
    dtype: str = "bf16",
    states: str = "fp32",
) -> list[Build]:
    """Return every kernel for every combination."""
    builds = []
    for architecture in architectures:
        for dim, value_dim in dims:
            for gate in gates:
                for feature in features:
                    for kernel in KERNELS:
                        if gate == "sig" and kernel in ("scales", "grad_rows"):
                            continue
                        common = (kernel, architecture, dtype, dim, value_dim, gate, feature)
                        build = Build(*common, states=states)
                        if kernel == "grad_key_value" and not build.launch_config().fused:
                            builds += [Build(*common, states=states, part=part) for part in ("key", "value")]
                        else:
                            builds.append(build)
    return builds


def as_row(build: Build, compiled: Compiled) -> dict[str, Any]:
    """Return everything known about a kernel as one flat record."""
    return {
        "kernel": "-".join(filter(None, (build.kernel, build.part))),
        "arch": f"sm_{build.architecture}",
        "dtype": build.dtype,
        "dims": f"{build.dim}/{build.value_dim}",
        "gate": build.gate,
        "feature": build.feature,
        **asdict(build.launch_config()),
        **compiled.columns(),
        "faults": ", ".join(build.faults(compiled)),
    }


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


def cost_rows(state_size: int = 4) -> list[dict[str, Any]]:
    """Return the predicted work and least time of every kernel and of whole passes, in the published setting."""
    rows = []
    for heads, dim, value_dim in ((16, 128, 256), (8, 256, 512)):
        for chunk in (128, 256):
            for gate in GATES:
                setting = cost.Setting(TOKENS * heads, dim, value_dim, chunk, gate == "exp", state_size=state_size)
                kernels = cost.kernel_work(setting)
                published = PUBLISHED.get((heads, dim, value_dim, chunk, gate))
                passes = {"forward": cost.FORWARD, "backward": cost.BACKWARD}
                parts: list[tuple[str, list[cost.Work], float | None]] = []
                parts += [(name, [work], None) for name, work in kernels.items()]
                for index, (name, order) in enumerate(passes.items()):
                    time = published and (published[0] if index == 0 else published[1] - published[0])
                    parts.append((name, [kernels[kernel] for kernel in order if kernel in kernels], time))
                for name, works, time in parts:
                    rows.append(
                        {
                            "heads": heads,
                            "dims": f"{dim}/{value_dim}",
                            "chunk": chunk,
                            "gate": gate,
                            "kernel": name,
                            "tflop": sum(work.flops for work in works) / 1e12,
                            "gbyte": sum(work.bytes for work in works) / 1e9,
                            "h200_floor_ms": sum(work.seconds for work in works) * 1e3,
                            "published_h100_ms": "" if time is None else time,
                        }
                    )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print both tables, and return 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m longmix_kernels.linear.report", description="Compile without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=launch.ARCHITECTURES, default=launch.ARCHITECTURES)
    parser.add_argument("--dims", nargs="+", default=[f"{a}/{b}" for a, b in DIMS], help="head dimensions, as 128/256")
    parser.add_argument("--gate", nargs="+", choices=GATES, default=GATES)
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=("plain",), help="what a call has besides")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--states", choices=("fp32", "bf16"), default="fp32", help="how states are stored")
    parser.add_argument("--cost-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="write the records here too")
    options = parser.parse_args(arguments)
    dims = pairs(parser, "--dims", options.dims, "128/256", (512, 512))
    rows = []
    if not options.cost_only:
        builds = table_builds(options.arch, dims, options.gate, options.feature, options.dtype, options.states)
        rows = [as_row(build, compile_kernel(build)) for build in builds]
        print(as_table(rows), end="\n\n")
    costs = cost_rows(DTYPES[options.states])
    print(as_table(costs))
    print(
        f"\nEstimates, not measurements: {TOKENS} tokens at an H200's peak rates, each tensor once per kernel; a pass "
        "is the sum of its kernels. Published times were measured by others on an H100; of the backward they are the "
        "difference between both passes and the forward."
    )
    return concluded(rows, options.json, {"kernels": rows, "costs": costs})


if __name__ == "__main__":
    sys.exit(main())
