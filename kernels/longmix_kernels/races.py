"""Find out from a kernel's PTX whether one warp may overwrite what another warp has yet to load.

Warps run independently between barriers, and Triton lets several warps load an element that one of them stores. So all
warps must meet at `bar.sync` between a load and a store through one pointer argument. A copy to shared memory
(cp.async) must also have been waited for before they meet. Addresses are not compared: a kernel that overwrites other
elements than it loads, through one argument and without a barrier, is found as well.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_ARGUMENT = re.compile(r"ld\.param\.\w+ (%rd\d+), \[\w+_param_(\d+)\]")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_REGISTER = re.compile(r"%rd\d+")


class _Access(NamedTuple):
    """A load that some warp may not have finished.

    Attributes:
        argument: the place of the pointer argument.
        copied: whether the load is a copy to shared memory that has not been waited for.
    """

    argument: int
    copied: bool


@dataclass
class _Block:
    """Instructions without a jump between them, and the blocks that may come next.

    Attributes:
        instructions: in the order of the code.
        targets: labels that the block may jump to.
        falls: whether the next block of the code may follow.
    """

    instructions: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls: bool = True


def unordered_stores(ptx: str) -> list[int]:
    """Return the places of pointer arguments that one warp may store to before another has loaded from them.

    Args:
        ptx: the code of one kernel.
    """
    blocks = _blocks(ptx)
    origins = _origins(ptx)
    names = list(blocks)
    entering: dict[str, frozenset[_Access] | None] = dict.fromkeys(names)
    entering[names[0]] = frozenset()
    found: set[int] = set()
    waiting = [names[0]]
    while waiting:
        name = waiting.pop()
        before = entering[name]
        assert before is not None
        after = _through(blocks[name], before, origins, found)
        following = names[names.index(name) + 1 :][: blocks[name].falls]
        for target in (*blocks[name].targets, *following):
            known = entering[target]
            if known is None or not after <= known:
                entering[target] = after | (known or frozenset())
                waiting.append(target)
    return sorted(found)


def in_place(ptx: str) -> list[int]:
    """Return the places of pointer arguments that a kernel both loads from and stores to.

    Args:
        ptx: the code of one kernel.
    """
    origins = _origins(ptx)
    accesses: dict[bool, set[int]] = {True: set(), False: set()}
    for instruction in _instructions(ptx):
        stores = re.search(r"\bst\.global\b", instruction) is not None
        if stores or re.search(r"\b(ld\.global|cp\.async\.c[ag])\b", instruction):
            accesses[stores] |= _arguments(instruction, origins)
    return sorted(accesses[True] & accesses[False])


def _through(
    block: _Block, before: frozenset[_Access], origins: dict[str, set[int]], found: set[int]
) -> frozenset[_Access]:
    """Return the loads that may be unfinished after a block; add to `found` the arguments that it stores to too early.

    Args:
        block: the block.
        before: the loads that may be unfinished before it.
        origins: the arguments that each register comes from.
        found: the arguments found so far.
    """
    pending = set(before)
    for instruction in block.instructions:
        if re.search(r"\b(bar|barrier)\.sync\b", instruction):
            pending = {access for access in pending if access.copied}
        elif re.search(r"\bcp\.async\.wait", instruction):
            pending = {_Access(access.argument, False) for access in pending}
        elif re.search(r"\bcp\.async\.c[ag]\b", instruction):
            pending |= {_Access(argument, True) for argument in _arguments(instruction, origins)}
        elif re.search(r"\bld\.global\b", instruction):
            pending |= {_Access(argument, False) for argument in _arguments(instruction, origins)}
        elif re.search(r"\bst\.global\b", instruction):
            found |= _arguments(instruction, origins) & {access.argument for access in pending}
    return frozenset(pending)


def _arguments(instruction: str, origins: dict[str, set[int]]) -> set[int]:
    """Return the places of the arguments that an instruction's address in global memory comes from.

    A copy to shared memory has two addresses; the last one is in global memory.
    """
    return set().union(*(origins.get(register, set()) for register in _ADDRESS.findall(instruction)[-1:]))


def _origins(ptx: str) -> dict[str, set[int]]:
    """Return for each 64-bit register the places of the arguments that it is computed from, on any path."""
    origins: dict[str, set[int]] = {}
    sources: list[tuple[str, list[str]]] = []
    for instruction in _instructions(ptx):
        argument = _ARGUMENT.search(instruction)
        if argument is not None:
            origins[argument[1]] = {int(argument[2])}
        elif "[" not in instruction:
            registers = _REGISTER.findall(instruction)
            if len(registers) > 1:
                sources.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for target, used in sources:
            known = origins.get(target, set())
            both = known.union(*(origins.get(register, set()) for register in used))
            if len(both) > len(known):
                origins[target], changed = both, True
    return origins


def _blocks(ptx: str) -> dict[str, _Block]:
    """Return the kernel's blocks by label, in the order of the code."""
    blocks = {"": _Block()}
    block, split = blocks[""], 0
    for instruction in _instructions(ptx):
        if instruction.endswith(":"):
            block = blocks[instruction[:-1]] = _Block()
            continue
        if not block.falls or block.targets:
            split += 1
            block = blocks[f"after jump {split}"] = _Block()
        jump = re.match(r"(@!?%p\d+ )?bra(?:\.uni)? (\$\w+)$", instruction)
        if jump is not None:
            block.targets.append(jump[2])
            block.falls = jump[1] is not None
        elif re.match(r"(ret|exit|trap)\b", instruction):
            block.falls = False
        else:
            block.instructions.append(instruction)
    return blocks


def _instructions(ptx: str) -> Iterator[str]:
    """Yield labels with a colon, and instructions with one space between words and no semicolon."""
    for line in re.sub(r"//.*|/\*.*?\*/", "", ptx).splitlines():
        for part in line.split(";"):
            instruction = " ".join(part.split()).strip("{} ") if part.strip() in "{}" else " ".join(part.split())
            if instruction.startswith("$") and ":" in instruction:
                label, _, instruction = instruction.partition(":")
                yield f"{label}:"
            if instruction.strip():
                yield instruction.strip()
