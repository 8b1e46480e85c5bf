"""Exchanges of several processes on a CPU whose memory the profiler sees whole.

The profiler notes what the thread that it profiles allocates and frees. Gloo's threads hold the tensors of an exchange
too, and the thread that lets go last frees them. Left alone, that is one of gloo's now and then, and nobody notes it.
Here gloo lets go first: a group has one thread, which does one exchange after the other. So once a later exchange is
done, the thread has let go of the earlier one.
"""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

KINDS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_to_all_single",
    "allgather",
    "allreduce",
    "alltoall_base",
    "barrier",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_single",
)
"""Methods of a process group that start an exchange; their names differ between releases of torch."""


def note_all_frees() -> None:
    """Make this process free what exchanges hold in the thread that asks for them; call it before there is a group.

    Each exchange then ends before the call returns, also where a caller would wait later. Exchanges that torch itself
    starts, without Python, stay as they are: those of DDP, whose buffers last, and those of divided numbers, which are
    a few bytes each.
    """
    distributed_c10d.ProcessGroupGloo = _OneThread  # type: ignore[misc]
    for kind in KINDS:
        if hasattr(dist.ProcessGroup, kind):
            setattr(dist.ProcessGroup, kind, _ended(getattr(dist.ProcessGroup, kind)))


_Gloo: Any = distributed_c10d.ProcessGroupGloo


class _OneThread(distributed_c10d.ProcessGroupGloo):
    """Gloo with one thread instead of two."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = _Gloo._Options()
        options._devices = [_Gloo.create_default_device()]
        options._timeout, options._threads = timeout, 1
        super().__init__(store, rank, size, options)


class _Done:
    """What a caller gets instead of an exchange that may go on."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """There is nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


_EMPTY = torch.zeros(1)
_start_sum = dist.ProcessGroup.allreduce


def _ended(exchange: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(exchange)
    def ended(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
        work = exchange(group, *arguments, **options)
        work.wait()
        _start_sum(group, [_EMPTY]).wait()  # gloo's thread has let go of `work`, which is freed here at the return
        return _Done()

    return ended
