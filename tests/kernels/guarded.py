"""What kernels in the interpreter read and write, laid into NaN, so that a step beside it shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

GUARD = 64


_patching = InterpretedFunction.__call__
_patched: set[InterpretedFunction] = set()


def _called(function: InterpretedFunction, *given: Any, **named: Any) -> Any:
    if function in _patched:
        return function.rewrite()(*given, **named)
    _patched.add(function)
    return _patching(function, *given, **named)


@contextmanager
def guarded_buffers(monkeypatch: pytest.MonkeyPatch, least: int, complete: bool = True) -> Iterator[None]:
    """Give out new tensors that are NaN and lie between NaN; afterwards all of them, and nothing beside, was written.

    At least so many of them must have been asked for. Unless they are `complete`, some of what is given out may be left
    as it was.

    Meanwhile a function that kernels call patches Triton's language the first time only, which lasts: every time, that
    would be half of the interpreter's time.
    """
    monkeypatch.setattr(InterpretedFunction, "__call__", _called)
    buffers: list[tuple[torch.Tensor, int]] = []
    original = torch.Tensor.new_empty

    def new_empty(self, *size, dtype=None, **options):
        if options:
            return original(self, *size, dtype=dtype, **options)  # the interpreter's own
        size = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        buffer = torch.full((size.numel() + 2 * GUARD,), torch.nan, dtype=dtype or self.dtype)
        buffers.append((buffer, size.numel()))
        return buffer[GUARD : GUARD + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert len(buffers) >= least
    for buffer, size in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[GUARD + size :].isnan().all()
        assert not (complete and buffer[GUARD : GUARD + size].isnan().any())


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """What comes per token [B, T, H, ...] as a view into NaN, with other strides.

    It begins where kernels read it in place (`longmix_kernels.tensors`): a copy would have no NaN beside it.
    """
    *outer, last = x.shape
    sizes = *(size + 3 for size in outer), 2 * GUARD + last - last % GUARD
    buffer = torch.full(sizes, torch.nan, dtype=x.dtype)
    inner = (*(slice(1, size + 1) for size in outer), slice(GUARD, GUARD + last))
    return buffer[inner].copy_(x.detach()).requires_grad_()


def beside(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, contiguous, as a view into NaN."""
    room = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
    return room[GUARD : GUARD + x.numel()].view(x.shape).copy_(x.detach()).requires_grad_()
