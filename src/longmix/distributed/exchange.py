"""The one exchange that context parallelism needs: rows of other processes' slices, and gradients on the way back.

All processes of a group must call it, in one order; and so must the backward pass, which autograd does if every process
uses the result, also where that has no rows. Nothing else is sent than the rows that are asked for.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Ranges = list[tuple[int, int]]
"""First row and one past the last, for each process."""


def rows_before(x: Tensor, limit: int | None, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of earlier slices, in order: one slice per process of the group, by rank.

    Args:
        x: [B, T, ...], this process's slice; of one shape and dtype in all processes.
        limit: how many rows, the latest; None for all.
        group: the processes; None for all there are.

    Returns:
        [B, n, ...], n the smaller of `limit` and the rows there are; see `exchanged`.
    """
    rank, size, length = dist.get_rank(group), dist.get_world_size(group), x.shape[1]
    limit = size * length if limit is None else limit
    if limit == 0 or size == 1:
        return x[:, :0]
    sent = [min(length, max(0, limit - (other - rank - 1) * length)) if other > rank else 0 for other in range(size)]
    got = [min(length, max(0, limit - (rank - other - 1) * length)) if other < rank else 0 for other in range(size)]
    return exchanged(x, [(length - count, length) for count in sent], got, group)


@torch.compiler.disable
def exchanged(x: Tensor, sent: Ranges, got: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all processes of a group.

    Args:
        x: [B, T, ...], of one shape and dtype in all processes.
        sent: which rows go to each process.
        got: how many come from each.
        group: the processes; None for all there are.

    Returns:
        [B, sum of `got`, ...], in order of rank. The gradient of a row is the sum over all processes that got it, added
        up in order of rank, in float32 or better.
    """
    rows: Tensor = _Exchange.apply(x, sent, got, group)
    return rows


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Ranges, got: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.counts, ctx.got, ctx.group, ctx.shape = sent, [b - a for a, b in sent], got, group, x.shape
        rows = x.transpose(0, 1)
        return _all_to_all(torch.cat([rows[start:stop] for start, stop in sent]), ctx.counts, got, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received = _all_to_all(grad.transpose(0, 1), ctx.got, ctx.counts, ctx.group)
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for (start, stop), part in zip(ctx.sent, received.split(ctx.counts, 1), strict=True):
            total[:, start:stop] += part
        return total.to(grad.dtype), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
    """Send a number of rows [n, B, ...] to each process, and return the rows that arrive, [B, m, ...]."""
    received = rows.new_empty(sum(got), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), got, sent, group=group)
    return received.transpose(0, 1)


@torch.compiler.disable
def mean_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of `x` over the processes of the group, for a loss that is a mean over them too."""
    mean: Tensor = _Mean.apply(x, group)
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _mean(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean(grad, ctx.group), None


def _mean(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
