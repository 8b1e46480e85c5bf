"""Gather the weights of FSDP's modules so that some of them travel in a shorter dtype than they have.

FSDP has one dtype for all weights of a module, in which they travel and are used. Here each process gets float32
weights, some of which were rounded on the way. Autocast rounds these before every use, so rounding them earlier changes
nothing, and only half of their bytes are sent. Groups of modules with a dtype of their own would need no copies, but
each module of a group has hooks, and a compiled block breaks at each hook.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longmix.distributed.divided_matrices import copy_each


class RoundedGather:
    """The gather of one module whose weights are float32, for `FSDPModule.set_custom_all_gather`.

    Args:
        module: a module that `fully_shard` divides over more than one process.
        rounded: the weights that travel rounded.
        dtype: the dtype in which these travel, of two bytes.

    Attributes:
        dtype: as given.
        exact, rounded: the runs of numbers of either kind in a process's part; each is the place of the first number,
            and one past the last.
    """

    def __init__(self, module: nn.Module, rounded: Collection[nn.Parameter], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._weights: list[nn.Parameter] | None = _own_weights(module)
        sizes = [_piece_size(weight) for weight in self._weights]
        self.exact: list[tuple[int, int]] = []
        self.rounded: list[tuple[int, int]] = []
        start = 0
        kinds = [any(weight is other for other in rounded) for weight in self._weights]
        for is_rounded, pieces in groupby(zip(kinds, sizes, strict=True), key=lambda pair: pair[0]):
            stop = start + sum(size for _, size in pieces)
            (self.rounded if is_rounded else self.exact).append((start, stop))
            start = stop

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of this size for the whole weights."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather each process's part of the weights into one row of the output.

        It returns when the work is queued on the current stream, also if `async_op` allows it to return before.

        Args:
            output_tensor: float32, as many numbers as the parts of all processes have; is written.
            input_tensor: float32, this process's part: its pieces of the weights, one after the other.
            group: the processes.
            async_op: has no effect.

        Raises:
            RuntimeError: at the first call, the part does not have the weights in the order of the module.
        """
        if self._weights is not None:
            _check_order(self._weights, input_tensor)
            self._weights = None
        processes, length = group.size(), input_tensor.numel()
        exact, rounded = ([stop - start for start, stop in runs] for runs in (self.exact, self.rounded))
        # `border` and `width` count numbers of two bytes. The width is even, so that the exact part of each row can be
        # viewed as float32.
        border = 2 * sum(exact)
        width = border + -(-sum(rounded) // 2) * 2
        sent = input_tensor.new_empty(width, dtype=self.dtype)
        received = input_tensor.new_empty(processes, width, dtype=self.dtype)
        pieces = [*sent[:border].view(torch.float32).split(exact), *sent[border : border + sum(rounded)].split(rounded)]
        copy_each(pieces, [input_tensor[start:stop] for start, stop in (*self.exact, *self.rounded)])
        dist.all_gather_into_tensor(received.view(-1), sent, group=group)
        whole = output_tensor.view(processes, length)
        columns = received[:, :border].view(torch.float32).split(exact, 1)
        columns += received[:, border : border + sum(rounded)].split(rounded, 1)
        for (start, stop), column in zip((*self.exact, *self.rounded), columns, strict=True):
            whole[:, start:stop].copy_(column)


def _own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's weights in FSDP's order, without those of parts that `fully_shard` divides on their own."""
    found: list[nn.Parameter] = []
    for part in _parts(module):
        for weight in part.parameters(recurse=False):
            if not any(weight is other for other in found):
                found.append(weight)
    return found


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module's parts, each after its own parts, and last the module itself."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _parts(child)
    yield module


def _piece_size(weight: Tensor) -> int:
    """Return how many numbers each process contributes, padding of the last processes included."""
    assert isinstance(weight, DTensor)
    each = -(-weight.shape[0] // weight.device_mesh.size())
    return each * weight.shape[1:].numel()


def _check_order(weights: list[nn.Parameter], given: Tensor) -> None:
    """Check that FSDP gives this process's weights in the order that is assumed.

    Raises:
        RuntimeError: it does not.
    """
    sizes = [_piece_size(weight) for weight in weights]
    right = sum(sizes) == given.numel() and given.dtype == torch.float32
    if right:
        for weight, piece in zip(weights, given.split(sizes), strict=True):
            assert isinstance(weight, DTensor)
            own = weight.to_local().detach().flatten()
            right = right and torch.equal(own.view(torch.int32), piece[: own.numel()].view(torch.int32))  # NaN too
    if not right:
        raise RuntimeError(f"torch {torch.__version__} gathers weights in an order that longmix does not know")
