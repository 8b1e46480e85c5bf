"""Make tensors such that one compiled kernel serves every length and batch size: aligned, with strides Triton knows."""

from typing import Any, NamedTuple

import torch


class Strided(NamedTuple):
    """A tensor [B, T, H, ...] as one argument of a kernel: its address, and its strides, 0 for a size of 1."""

    pointer: Any
    stride_batch: Any
    stride_row: Any
    stride_head: Any


class PerRow(NamedTuple):
    """A contiguous tensor [B or 1, H or 1, T] as one argument of a kernel.

    Strides are in sixteenths of T, and 0 for a size of 1. So they are multiples of 16 for every length and batch size,
    and Triton compiles one kernel; it would compile others for multiples of T, and a tuple has no exceptions from that.
    """

    pointer: Any
    stride_batch: Any
    stride_head: Any


def strided(*tensors: torch.Tensor) -> list[Strided]:
    """Return tensors [B, T, H, ...] as kernels take them."""
    return [Strided(x, *strides(x)) for x in tensors]


def per_row(*tensors: torch.Tensor | None) -> list[PerRow | None]:
    """Return tensors [B or 1, H or 1, T] as kernels take them, None for None."""
    return [None if x is None else _per_row(x) for x in tensors]


def _per_row(x: torch.Tensor) -> PerRow:
    for axis in (0, 1):
        if x.stride(axis) == 0:  # one row for all, expanded
            x = x.narrow(axis, 0, 1)
    batch, heads, _ = x.shape
    return PerRow(aligned(x.contiguous()), 16 * heads if batch > 1 else 0, 16 if heads > 1 else 0)


def strides(*tensors: torch.Tensor | None) -> list[int]:
    """Return the strides of batch, row and head of tensors [B, T, H, ...], 0 for None.

    A single batch row gets stride 0. Its stride is not used, but Triton would compile a kernel anew for another value.
    """
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else (_batch_stride(x), *x.stride()[1:3]))]


def _batch_stride(x: torch.Tensor) -> int:
    return 0 if x.shape[0] == 1 else x.stride(0)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if it begins at a multiple of 16 bytes, else a copy.

    Triton compiles another kernel for other pointers, and that kernel loads less at once.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if it is `aligned` and its last axis has unit stride, else a copy that is."""
    return aligned(x if x.stride(-1) == 1 else x.contiguous())


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return the tensors as contiguous and `aligned` ones, None for None."""
    return [None if x is None else aligned(x.contiguous()) for x in tensors]


def gate(x: torch.Tensor) -> torch.Tensor:
    """Return a gate [B, T, H, ...] whose batch rows begin at multiples of 16 numbers: itself or a copy.

    Otherwise Triton would compile a kernel anew for lengths whose rows begin elsewhere.
    """
    if _batch_stride(x) % 16 == 0:
        return aligned(x)
    length = x.shape[1]
    return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), 0, -length % 16))[:, :length]


def vectors(like: torch.Tensor, count: int, *shape: int) -> list[torch.Tensor]:
    """Return `count` uninitialised float32 tensors of this shape, on the device of `like`.

    Each has memory of its own, so that it begins where Triton takes it for `aligned`. The parts of one common tensor
    could begin anywhere.
    """
    return [like.new_empty(shape, dtype=torch.float32) for _ in range(count)]


def given(like: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return the tensors, with an empty one in place of each None: operators return tensors only."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def small_ids(document_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Return document ids [B, T] as contiguous int32.

    Ids of int64 may be too large, so they are numbered anew from 0 in each row: only changes matter.
    """
    if document_ids is None or document_ids.dtype == torch.int32:
        return None if document_ids is None else aligned(document_ids.contiguous())
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.nn.functional.pad(changes.cumsum(1), (1, 0)).int()
