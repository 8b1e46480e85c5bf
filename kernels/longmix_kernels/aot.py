"""Compile kernels ahead of time, for GPUs that this machine need not have, and say what came of it.

Registers, spills and stack come from `ptxas --verbose`, tensor-core instructions from the PTX, and shared memory from
Triton.
"""

import importlib
import re
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from longmix_kernels.accelerators import SHARED_MEMORY
from longmix_kernels.launch import LaunchConfig
from longmix_kernels.races import in_place, unordered_stores

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's names of the element types, and their bytes."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    Attributes:
        registers: registers of a thread.
        spills: bytes that a thread stores and loads again for want of registers.
        stack: bytes of a thread's stack.
        shared: bytes of a program's shared memory.
        tensor_cores: how many tensor-core instructions the PTX has, by "mma" (mma.sync), "wgmma" and "tcgen05".
        serialized: whether ptxas makes the kernel wait after every wgmma.
        unordered: arguments that one warp may store to before another has loaded from them; `races` finds them.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_cores: dict[str, int]
    serialized: bool
    unordered: tuple[str, ...] = ()

    def columns(self) -> dict[str, int]:
        """Return the report's columns for it, by name."""
        sizes = {"registers": self.registers, "spills": self.spills, "stack": self.stack, "shared": self.shared}
        return {**sizes, **self.tensor_cores}


@dataclass(frozen=True)
class Build(ABC):
    """One kernel to compile. Each engine adds the other choices that decide about the kernel's code.

    Attributes:
        kernel: its name in the engine's launch table.
        architecture: the compute capability, times ten.
        dtype: the element type of the inputs, one of `DTYPES`.
    """

    kernel: str
    architecture: int
    dtype: str

    FUNCTIONS: ClassVar[Mapping[str, str]]
    """The module and name of every kernel's function."""

    TYPES: ClassVar[Mapping[str, str]]
    """Triton's type of each argument by name, with "*" for a pointer. Arguments left out are pointers to `dtype`."""

    @abstractmethod
    def launch_config(self) -> LaunchConfig:
        """Return the configuration to compile."""

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it, besides kernel, architecture, dtype and configuration."""

    def wants_wgmma(self) -> bool:
        """Say whether its tiles are large enough for `wgmma`; without that instruction on sm_90 it then has a fault."""
        return True

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        return "i32" if name.startswith("stride_") else self.TYPES.get(name, f"*{self.dtype}")

    def compile(self) -> Compiled:
        """Compile the kernel as the launcher would for aligned tensors, and read what ptxas says about it."""
        return _compile(self.function(), self)

    def shared(self) -> int:
        """Return the bytes of shared memory of a program. This takes about half as long as `compile`."""
        return self._lowered("llir")[1]["shared"]

    def loaded_and_stored(self) -> list[str]:
        """Return the pointers through which the kernel both loads and stores."""
        return self._names(in_place(self._lowered("ptx")[0]))

    def unordered(self) -> list[str]:
        """Return the pointers that one warp may store to before another has loaded from them.

        This takes less time than `compile`.
        """
        return self._names(unordered_stores(self._lowered("ptx")[0]))

    def _lowered(self, last: str) -> tuple[Any, dict[str, Any]]:
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", self.architecture, 32)
        return lowered(_source(self.function(), self), target, self.launch_config().options(), last)

    def _names(self, places: Sequence[int]) -> list[str]:
        """Return the names at these places among the arguments that are no compile-time constants."""
        names: list[str] = []
        constants = self.constants()
        _signature(self.function(), constants, lambda name, _: None if name in constants else names.append(name))
        return [names[place] for place in places]

    def function(self) -> Any:
        """Return the kernel, as `triton.jit` made it."""
        module, _, name = self.FUNCTIONS[self.name()].rpartition(".")
        return getattr(importlib.import_module(module), name)

    def name(self) -> str:
        """Return the key in `FUNCTIONS` of the function to compile."""
        return self.kernel

    def faults(self, compiled: Compiled) -> list[str]:
        """Return what must not be in a compiled kernel, one phrase for each fault; an empty list if there is none."""
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
        """Return everything known about a kernel as one flat record, a row of the report."""
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
    """Run the compiler up to one of its stages, and return that stage's result and the metadata so far.

    Args:
        source: a kernel as `triton.compile` takes it.
        target: the GPU.
        options: the compiler's options.
        last: the last stage to run: "llir", from which on the metadata have the shared memory, or "ptx".
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


def _signature(kernel: Any, constants: Collection[str], leaf: Callable[[str, tuple[int, ...]], Any]) -> dict[str, Any]:
    """Return by argument what `leaf` says of it; for named tuples, which annotations name, such tuples of their fields.

    Fields are as arguments by their names, but "pointer" stands for the argument that it is a field of.

    Args:
        kernel: the kernel, as `triton.jit` made it.
        constants: the names of compile-time arguments; a tuple among them, such as an absent tensor, has no fields.
        leaf: called with the name and the path of each; that is its place among arguments, then in tuples.
    """

    def each(kind: Any, name: str, path: tuple[int, ...]) -> Any:
        kind = next((found for found in (kind, *get_args(kind)) if hasattr(found, "_fields")), None)
        if name in constants or kind is None:
            return leaf(name, path)
        named = [(kinds, name if field == "pointer" else field) for field, kinds in kind.__annotations__.items()]
        return kind(*(each(*pair, (*path, place)) for place, pair in enumerate(named)))

    kinds = {name: parameter.annotation for name, parameter in kernel.signature.parameters.items()}
    return {name: each(kinds[name], name, (place,)) for place, name in enumerate(kernel.arg_names)}


def _source(kernel: Any, build: Build) -> Any:
    """Return the kernel as `triton.compile` takes it, specialised as the launcher does it for aligned tensors."""
    from triton.compiler import ASTSource

    constants = build.constants()
    given: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(name: str, path: tuple[int, ...]) -> str:
        if name in constants:
            given[path] = constants[name]
            return "constexpr"
        kind, specialized = build.type_of(name), not kernel.params[path[0]].do_not_specialize
        if specialized and (name.startswith("stride_") or kind.startswith("*")):
            aligned[path] = [["tt.divisibility", 16]]
        return kind

    return ASTSource(kernel, _signature(kernel, constants, type_of), given, aligned)


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
