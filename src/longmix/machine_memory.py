"""The memory that this process may take: what the machine has free, and what containers and SLURM leave of it.

A container's limit is that of its control group, or of one above it, whichever leaves least. Behind a limit the kernel
kills the process, although the machine has more.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/proc/self/cgroup")
"""The control groups of this process."""

HIERARCHY = Path("/sys/fs/cgroup")
"""Where control groups are mounted: version 2 here or in `unified`, version 1 in `memory`."""

UNLIMITED = 2**60
"""Version 1 writes a number above it where there is no limit."""

MIB = 2**20

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The first argument of glibc's `mallopt`."""


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Meanwhile, let the C library keep memory that is freed, for what is allocated next.

    A step allocates what the one before it has freed. By default glibc gives the kernel back what is free at the top of
    its heap, and every block above 32 MiB, so that each page of a step costs a fault. Other C libraries stay as they
    are.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(M_TRIM_THRESHOLD, -1)
    library.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_TRIM_THRESHOLD, 64 * MIB)  # the most that glibc comes to by itself
        library.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Give the kernel back what the C library keeps of freed memory, where it is glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc, else None."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    known = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    return library if known else None


def free_bytes() -> int | None:
    """Bytes that this process can still take; None if the system does not say."""
    limits = [_left(folder, limit) for folder, limit in _limits()]
    return min(_known(_meminfo("MemAvailable:"), *limits, _of_slurm()), default=None)


def total_bytes() -> int:
    """Bytes that this process can have at most, whoever uses them now."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_known(machine, *(limit for _, limit in _limits()), _of_slurm()))


def _known(*sizes: int | None) -> list[int]:
    return [size for size in sizes if size is not None]


def _meminfo(name: str) -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _limits() -> Iterator[tuple[Path, int]]:
    """The groups that have a limit: this process's and those above it, each with the limit."""
    for folder in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < UNLIMITED:
                yield folder, limit


def _groups() -> Iterator[Path]:
    """The folders of this process's control groups, each with those above it as far as they are mounted."""
    try:
        lines = GROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in [HIERARCHY / "memory"] if controllers else [HIERARCHY, HIERARCHY / "unified"]:
            inside = mount / path.lstrip("/")
            if ".." in inside.parts or not inside.is_dir():
                inside = mount  # a container sees its own group as the root
            while inside != mount.parent:
                yield inside
                inside = inside.parent


def _left(group: Path, limit: int) -> int:
    """Bytes below a group's limit; file contents that the kernel keeps there give way."""
    used = _known(*(_number(group / name) for name in ("memory.current", "memory.usage_in_bytes")))
    if not used:
        return limit
    try:
        lines = [line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()]
        stat = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    except (OSError, ValueError):
        stat = {}
    kinds = ("inactive_file", "active_file")
    files = sum(stat.get(f"total_{kind}", stat.get(kind, 0)) for kind in kinds)
    return max(0, limit - max(0, used[0] - files))


def _number(file: Path) -> int | None:
    """The number in a file; None if it holds none, as where there is no limit."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _of_slurm() -> int | None:
    """Bytes that SLURM gives a job on this machine, as it says in MiB; 0 there means all."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    whole = _from_environment("SLURM_MEM_PER_NODE")
    if whole is not None:
        return whole * MIB or None
    for each, count in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        size, number = _from_environment(each), _from_environment(count)
        if size and number:
            return size * number * MIB
    return None


def _from_environment(name: str) -> int | None:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None
