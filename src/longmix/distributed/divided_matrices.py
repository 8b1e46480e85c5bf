"""Compute functions of whole matrices where each process has some rows of every matrix.

Each process takes some whole matrices. Two exchanges are enough, however many matrices there are: one brings the rows
of each matrix to the process that takes it, the other brings the rows of the results back.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, int]
"""Rows and columns of a whole matrix."""


class DividedMatrices:
    """Matrices whose rows are divided over processes, as FSDP divides them.

    All processes must make and use it in the same way, since they exchange rows.

    Args:
        shapes: the shapes of the whole matrices.
        group: the processes; the process of rank r has the part r of the rows, as `torch.chunk` cuts them.
        like: a tensor with the dtype and device that the rows are to have.

    Attributes:
        shapes, group: as given.
        rows: for each matrix, memory for this process's rows of it; the caller writes them before `apply`.
    """

    def __init__(self, shapes: Sequence[Shape], group: dist.ProcessGroup, like: Tensor) -> None:
        self.shapes, self.group = shapes, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        takers = takers_of(shapes, self._size)
        by_taker = sorted(range(len(shapes)), key=takers.__getitem__)
        self._taken = [index for index in by_taker if takers[index] == self._rank]
        own = [self._numbers(index, self._rank) for index in by_taker]
        self._sent = like.new_empty(sum(own))
        self._counts = [0] * self._size
        pieces: list[Tensor] = [self._sent] * len(shapes)
        for index, piece in zip(by_taker, self._sent.split(own), strict=True):
            self._counts[takers[index]] += piece.numel()
            pieces[index] = piece.view(-1, shapes[index][1])
        self.rows = pieces

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace `rows` by those of the function's results. All processes must call it.

        Args:
            function: maps stacked matrices [N, rows, columns] of one shape to results of the same shape.
        """
        lengths = [self._numbers(index, other) for other in range(self._size) for index in self._taken]
        counts = [sum(self._numbers(index, other) for index in self._taken) for other in range(self._size)]
        received = self._sent.new_empty(sum(counts))
        dist.all_to_all_single(received, self._sent, counts, self._counts, group=self.group)
        pieces = list(received.split(lengths)) if lengths else []
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for number, index in enumerate(self._taken):
            by_shape[self.shapes[index]].append(number)
        for shape, numbers in by_shape.items():
            stack = received.new_empty(len(numbers), *shape)
            of_stack = [pieces[other * len(self._taken) + number] for number in numbers for other in range(self._size)]
            copy_each(self._cut(stack), of_stack)
            copy_each(of_stack, self._cut(function(stack)))
        dist.all_to_all_single(self._sent, received, self._counts, counts, group=self.group)

    def _range(self, index: int, process: int) -> tuple[int, int]:
        """Return the first row of a matrix that a process has, and one past the last."""
        rows = self.shapes[index][0]
        each = math.ceil(rows / self._size)
        return min(process * each, rows), min((process + 1) * each, rows)

    def _numbers(self, index: int, process: int) -> int:
        first, end = self._range(index, process)
        return (end - first) * self.shapes[index][1]

    def _cut(self, stack: Tensor) -> list[Tensor]:
        """Return flat views of the rows of each process, for one matrix of a stack after the other."""
        each = math.ceil(stack.shape[1] / self._size) * stack.shape[2]
        flat = stack.flatten(1)
        return [matrix[other * each : (other + 1) * each] for matrix in flat.unbind() for other in range(self._size)]


def takers_of(shapes: Sequence[Shape], size: int) -> list[int]:
    """Return the rank of the process that takes each matrix, so that all have about as much to do.

    The most costly matrix comes first, and each goes to the process that has the least so far. The cost is that of
    products of a matrix with its transpose: the smaller side squared times the larger one.

    Args:
        shapes: the shapes of the whole matrices.
        size: how many processes there are.
    """
    costs = [min(shape) * math.prod(shape) for shape in shapes]
    loads, takers = [0] * size, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        takers[index] = min(range(size), key=loads.__getitem__)
        loads[takers[index]] += costs[index]
    return takers


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, all in one launch; their dtypes may differ."""
    pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target.numel()]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
