"""Estimate what work costs: operations, bytes and exponentials, and the least time that they take.

Each engine's `cost` counts the work of its kernels by its mathematics. This module turns a count into seconds at an
H200's peak rates. Nothing here is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longmix_kernels.accelerators import H200, H200_EXPONENTIALS


@dataclass(frozen=True)
class Work:
    """What a kernel has to do.

    Attributes:
        flops: operations of matrix products; a multiply-add counts as two.
        bytes: bytes that have to pass between chip and memory.
        exponentials: one per score of a softmax; 0 where they are not counted.
        size: bytes of a number that is multiplied.
    """

    flops: float
    bytes: float
    exponentials: float = 0
    size: int = 2

    def __add__(self, other: "Work") -> "Work":
        exponentials = self.exponentials + other.exponentials
        return Work(self.flops + other.flops, self.bytes + other.bytes, exponentials, self.size)

    @property
    def limits(self) -> dict[str, float]:
        """Return the seconds that each kind of work takes on an H200 at its peak rate."""
        return {
            "products": self.flops / H200.flops(self.size),
            "bytes": self.bytes / H200.bandwidth,
            "exp": self.exponentials / H200_EXPONENTIALS,
        }

    @property
    def seconds(self) -> float:
        """Return the least seconds on an H200: those of the longest kind, as if the others ran at the same time."""
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        """Return the kind of work that takes the longest."""
        return max(self.limits, key=self.limits.__getitem__)


def per_row(rows: int) -> Callable[[float, float], Work]:
    """Return a function that makes the work of `rows` rows from the operations and bytes of one."""
    return lambda flops, numbers: Work(rows * flops, rows * numbers)


def pass_rows(
    kernels: Mapping[str, Work], forward: Sequence[str], backward: Sequence[str], rows: int
) -> dict[str, dict[str, Any]]:
    """Return a report's columns for every kernel, and for "forward", "backward" and "both" as sums of their kernels.

    Args:
        kernels: the work of every kernel by name.
        forward, backward: the names of the kernels of each pass, in order; one that `kernels` lacks does not run.
        rows: tokens times heads of the call.

    Returns:
        By name the bytes and the thousands of operations for each row, and the least milliseconds on an H200.
    """
    passes = {"forward": forward, "backward": backward, "both": (*forward, *backward)}
    parts = {name: [work] for name, work in kernels.items()}
    parts |= {name: [kernels[kernel] for kernel in order if kernel in kernels] for name, order in passes.items()}
    return {
        name: {
            "bytes_per_row": sum(work.bytes for work in works) / rows,
            "kflop_per_row": sum(work.flops for work in works) / rows / 1e3,
            "h200_floor_ms": sum(work.seconds for work in works) * 1e3,
        }
        for name, works in parts.items()
    }
