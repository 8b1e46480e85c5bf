"""Compiling kernels ahead of time, for GPUs that need not be there, and what came of it.

Registers, spills and stack come from `ptxas --verbose`, tensor-core instructions from the PTX, and shared memory from
Triton.
"""

import importlib
import re
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longmix_kernels.accelerators import SHARED_MEMORY
from longmix_kernels.launch import LaunchConfig
from longmix_kernels.races import in_place, unordered_stores

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's names of the element types, and their bytes."""


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: per thread.
        spills: bytes stored and loaded again for want of registers, per thread.
        stack: bytes of stack, per thread.
        shared: bytes of shared memory, per program.
        tensor_cores: tensor-core instructions in the PTX: mma.sync, wgmma or tcgen05.mma.
        serialized: whether ptxas had to wait after every wgmma.
        unordered: arguments that one warp may store to before another has loaded from them, see `races`.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_cores: dict[str, int]
    serialized: bool
    unordered: tuple[str, ...] = ()

    def columns(self) -> dict[str, int]:
        """Return what a report says of it."""
        sizes = {"registers": self.registers, "spills": self.spills, "stack": self.stack, "shared": self.shared}
        return {**sizes, **self.tensor_cores}


@dataclass(frozen=True)
class Build(ABC):
    """One kernel to compile; each engine adds what else decides about its code.

    Attributes:
        kernel: its name in the engine's launch table.
        architecture: compute capability, times ten.
        dtype: of the inputs, one of `DTYPES`.
    """

    kernel: str
    architecture: int
    dtype: str

    FUNCTIONS: ClassVar[Mapping[str, str]]
    """The module and name of every kernel's function."""

    TYPES: ClassVar[Mapping[str, str]]
    """Triton's names of the types of arguments, "*" before a pointer's; pointers to the `dtype` are left out."""

    @abstractmethod
    def launch_config(self) -> LaunchConfig:
        """Return the configuration to compile."""

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None for tensors left out."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Return what a report says of it besides kernel, architecture, dtype and configuration."""

    def wants_wgmma(self) -> bool:
        """Say whether its tiles are such that it should have that instruction on sm_90."""
        return True

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        return "i32" if name.startswith("stride_") else self.TYPES.get(name, f"*{self.dtype}")

    def compile(self) -> Compiled:
        """Compile as the launcher would for aligned tensors, and read what ptxas says about it."""
        return _compile(self.function(), self)

    def shared(self) -> int:
        """Return the bytes of shared memory of a program; takes about half as long as `compile`."""
        return self._lowered("llir")[1]["shared"]

    def loaded_and_stored(self) -> list[str]:
        """Return the pointers through which the kernel both loads and stores."""
        return self._names(in_place(self._lowered("ptx")[0]))

    def unordered(self) -> list[str]:
        """Return those that one warp may store to before another has loaded from them; takes less than `compile`."""
        return self._names(unordered_stores(self._lowered("ptx")[0]))

    def _lowered(self, last: str) -> tuple[Any, dict[str, Any]]:
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", self.architecture, 32)
        return lowered(_source(self.function(), self), target, self.launch_config().options(), last)

    def _names(self, places: Sequence[int]) -> list[str]:
        """The arguments at these places of those that are no compile-time constants."""
        given = [name for name in self.function().arg_names if name not in self.constants()]
        return [given[place] for place in places]

    def function(self) -> Any:
        """Return the kernel."""
        module, _, name = self.FUNCTIONS[self.name()].rpartition(".")
        return getattr(importlib.import_module(module), name)

    def name(self) -> str:
        """Return which of `FUNCTIONS` is compiled."""
        return self.kernel

    def faults(self, compiled: Compiled) -> list[str]:
        """Name what must not be."""
        found = []
        if compiled.spills:
            found.append(f"spills {compiled.spills} bytes")
        if compiled.stack:
            found.append(f"uses {compiled.stack} bytes of stack")
        wgmma = self.architecture == 90 and DTYPES[self.dtype] == 2 and self.wants_wgmma()
        if wgmma and not compiled.tensor_cores["wgmma"]:
            found.append("has no wgmma")
        if compiled.shared > SHARED_MEMORY[self.architecture]:
            found.append(f"wants {compiled.shared} bytes of shared memory")
        if compiled.serialized:
            found.append("serializes wgmma")
        if compiled.unordered:
            found.append(f"stores to {' and '.join(compiled.unordered)} without a barrier after loading")
        return found

    def row(self, compiled: Compiled) -> dict[str, Any]:
        """Return everything known about a kernel as one flat record."""
        return {
            "kernel": self.kernel,
            "arch": f"sm_{self.architecture}",
            "dtype": self.dtype,
            **self.columns(),
            **vars(self.launch_config()),
            **compiled.columns(),
            "faults": ", ".join(self.faults(compiled)),
        }


def lowered(source: Any, target: Any, options: Mapping[str, Any], last: str) -> tuple[Any, dict[str, Any]]:
    """Return what one of the compiler's stages gives, and what is known by then, without the later ones.

    Args:
        source: a kernel as `triton.compile` takes it.
        target: the GPU.
        options: of the compiler.
        last: the stage: "llir", from which on shared memory is known, or "ptx".
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    functions = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, *functions, context)
    metadata = {"target": target, **vars(parsed)}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == last:
            break
    return module, metadata


def _source(kernel: Any, build: Build) -> Any:
    """The kernel as `triton.compile` takes it, specialised as the launcher does for aligned tensors."""
    from triton.compiler import ASTSource

    constants = {name: constant for name, constant in build.constants().items() if name in kernel.arg_names}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else build.type_of(name)
        specialized = not kernel.params[index].do_not_specialize
        if name not in constants and specialized and (name.startswith("stride_") or signature[name].startswith("*")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, aligned)


def _compile(kernel: Any, build: Build) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = build.architecture
    target, source = GPUTarget("cuda", architecture, 32), _source(kernel, build)
    compiled = triton.compile(source, target, build.launch_config().options())
    ptx = compiled.asm["ptx"]
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(architecture).path, "--verbose", f"--gpu-name={arch[1]}", path, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    return Compiled(
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=compiled.metadata.shared,
        tensor_cores={
            "mma": len(re.findall(r"\bmma\.sync", ptx)),
            "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
            "tcgen05": len(re.findall(r"\btcgen05\.mma", ptx)),
        },
        serialized="wgmma.mma_async instructions are serialized" in log,
        unordered=tuple(build._names(unordered_stores(ptx))),
    )
