"""Compiling kernels without a GPU, and what the reports of all engines share."""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's names of the element types, and their bytes."""

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most bytes of shared memory that a program may have, per architecture."""


class Target(Protocol):
    """What a kernel is compiled for."""

    @property
    def architecture(self) -> int:
        """Compute capability, times ten."""
        ...

    @property
    def dtype(self) -> str:
        """Of the inputs, one of `DTYPES`."""
        ...


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
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_cores: dict[str, int]
    serialized: bool

    def columns(self) -> dict[str, int]:
        """Return what a report says of it."""
        sizes = {"registers": self.registers, "spills": self.spills, "stack": self.stack, "shared": self.shared}
        return {**sizes, **self.tensor_cores}

    def faults(self, build: Target, with_wgmma: bool = True) -> list[str]:
        """Name what must not be.

        Args:
            build: what it was compiled for.
            with_wgmma: whether its tiles are such that it should have that instruction on sm_90.
        """
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.stack:
            found.append(f"uses {self.stack} bytes of stack")
        if with_wgmma and build.architecture == 90 and DTYPES[build.dtype] == 2 and not self.tensor_cores["wgmma"]:
            found.append("has no wgmma")
        if self.shared > SHARED_LIMIT[build.architecture]:
            found.append(f"wants {self.shared} bytes of shared memory")
        if self.serialized:
            found.append("serializes wgmma")
        return found


def compile_for(
    kernel: Any,
    type_of: Callable[[str], str],
    constants: Mapping[str, Any],
    architecture: int,
    options: dict[str, int | bool],
) -> Compiled:
    """Compile a kernel as a launcher would for aligned tensors, and read what ptxas says about it.

    Args:
        kernel: a function under `triton.jit`.
        type_of: Triton's name of the type of an argument that is neither constant nor a stride, "*" before a pointer's.
        constants: compile-time arguments, of which the kernel takes those it has.
        architecture: compute capability, times ten.
        options: of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    constants = {name: constant for name, constant in constants.items() if name in kernel.arg_names}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name.startswith("stride_") else type_of(name)
        if name.startswith("stride_") or signature[name].startswith("*"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", architecture, 32)
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target, options)
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
    )


def pairs(
    parser: argparse.ArgumentParser, option: str, given: Sequence[str], example: str, most: tuple[int, int]
) -> list[tuple[int, int]]:
    """Read the pairs of an option, such as "64/128", as pairs of numbers; anything else ends the command.

    Args:
        parser: of the command.
        option: the option's name.
        given: its words.
        example: a pair for the message.
        most: the largest of both numbers; 0 for any.
    """
    found = [re.fullmatch(r"(\d+)/(\d+)", pair) for pair in given]
    read = [(int(pair[1]), int(pair[2])) for pair in found if pair is not None]
    allowed = [[1 <= x <= (limit or x) for x, limit in zip(pair, most, strict=True)] for pair in read]
    if len(read) < len(given) or not all(map(all, allowed)):
        limits = f"each 1 to {most[0]}" if most[0] else f"the second 1 to {most[1]}"
        parser.error(f"{option} got {list(given)}; allowed are pairs such as {example}, {limits}")
    return read


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay records out in aligned columns, under their names."""

    def text(x: Any) -> str:
        if isinstance(x, bool):
            return "yes" if x else "-"
        return f"{x:.2f}" if isinstance(x, float) else str(x) or "-"

    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def concluded(rows: Sequence[dict[str, Any]], path: Path | None, written: Any) -> int:
    """End a report: write `written` as JSON where a path is given, and return 1 if a kernel of `rows` has a fault."""
    if path is not None:
        path.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(row["faults"] for row in rows))
