"""Stand-ins for dry runs: GPU kernels that keep less memory than a CPU's, and what other processes send."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.mixers.parts import rms_norm
from longmix.model.offload import Offload
from longmix_kernels.launch import replaced


@contextlib.contextmanager
def gpu_functions() -> Iterator[None]:
    """Replace, for fake tensors on a CPU, the functions for which CUDA has a kernel of its own."""
    with replaced(vars(F), "rms_norm", _rms_norm), replaced(vars(rms_norm), "has_own_gradient", lambda *_: False):
        yield


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedRMSNorm.apply(input, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """`aten::_fused_rms_norm`, which keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """An empty output in the shape and dtype of `x`."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Empty gradients."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class HostMemory:
    """Stands for the host's memory: what a layer sends there is counted, and gone from the device.

    Args:
        x: the layer's input, counted apart.

    Attributes:
        held: bytes there.
        held_of_input: those of the input.
    """

    def __init__(self, x: Tensor) -> None:
        self._input = x.untyped_storage()._cdata
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.held = self.held_of_input = 0

    def offloading(self, block: nn.Module, shared: Any) -> contextlib.AbstractContextManager[None]:
        """Offload what a layer saves that is not the last one; all of it has left when the context ends."""
        return self._left(Offload(self, 2), block, shared)

    @contextlib.contextmanager
    def _left(self, made: Offload, block: nn.Module, shared: Any) -> Iterator[None]:
        with made.layer(0, block, shared):
            yield
        with made.layer(1, block, None):
            pass

    def send(self, storage: torch.UntypedStorage) -> tuple[int, None]:
        """Count a storage."""
        size = storage.nbytes()
        self.held += size
        self.held_of_input += size if storage._cdata == self._input else 0
        return size, None

    def fetch(self, sent: int, there: None) -> tuple[torch.UntypedStorage, None]:
        """A storage without memory."""
        return torch.empty(sent, dtype=torch.uint8).untyped_storage(), None

    def wait(self, done: None) -> None:
        """Nothing is on its way."""


class LastSlice(Slices):
    """The last of `size` slices, which receives the most; the processes of the others do not exist.

    Rows are one document, and exact attention does not share its work.
    """

    def __init__(self, size: int, length: int) -> None:
        self.group, self.rank, self.size, self.length = None, size - 1, size, length
        self.balanced = False
        self.whole_ids = self.ids = self.last_id = self.filled = self.carried = None
        self.next_position = torch.tensor([self.start])
        self._received = 0

    def taken(self) -> int:
        """Bytes of all rows handed out since the last call."""
        received, self._received = self._received, 0
        return received

    def before(self, x: Tensor, limit: int | None = None) -> Tensor:
        """Empty rows in place of those that other slices would send."""
        there = self.rank * x.shape[1]
        rows: Tensor = _Received.apply(x, there if limit is None else min(limit, there))
        self._received += rows.nbytes
        return rows

    def whole(self, x: Tensor) -> Tensor:
        """Empty rows for the other slices, followed by these."""
        return torch.cat((self.before(x), x), 1)

    def mean(self, x: Tensor) -> Tensor:
        """`x` itself, as if all slices were alike."""
        return x


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(x.shape[0], count, *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty(ctx.shape), None
