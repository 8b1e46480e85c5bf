"""FSDP's gathering of weights, where some travel in a shorter dtype than they have.

FSDP knows one dtype for all weights of a module, in which they are used too. Here each process gets float32 weights, of
which some were rounded on the way: autocast rounds these before every use, so that rounding them once more changes
nothing. Half of their bytes are sent. Groups of modules with a dtype of their own would do it without the copies, but
each module of a group has hooks, at each of which a compiled block breaks.
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
    """What `FSDPModule.set_custom_all_gather` takes for one module whose weights are float32.

    Args:
        module: divided by `fully_shard`, over more than one process.
        rounded: the weights that travel rounded.
        dtype: in which, of two bytes.

    Attributes:
        exact, rounded: first number and one past the last, for each run of either kind in a process's part.
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
        """Memory for the whole weights."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather the weights' own parts, one after the other in `input_tensor`, into as many rows as processes.

        It returns when the work is queued on the current stream, also if `async_op` allows it to return before.
        """
        if self._weights is not None:
            _check_order(self._weights, input_tensor)
            self._weights = None
        processes, length = group.size(), input_tensor.numel()
        exact, rounded = ([stop - start for start, stop in runs] for runs in (self.exact, self.rounded))
        # Numbers of two bytes each; an even count of them, so that rows of others can be seen as float32.
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
    """A module's weights without those of parts that are divided by themselves, in FSDP's order."""
    found: list[nn.Parameter] = []
    for part in _parts(module):
        for weight in part.parameters(recurse=False):
            if not any(weight is other for other in found):
                found.append(weight)
    return found


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Modules behind those they consist of."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _parts(child)
    yield module


def _piece_size(weight: Tensor) -> int:
    """Numbers that each process contributes, with those that fill up the last ones' rows."""
    assert isinstance(weight, DTensor)
    each = -(-weight.shape[0] // weight.device_mesh.size())
    return each * weight.shape[1:].numel()


def _check_order(weights: list[nn.Parameter], given: Tensor) -> None:
    """Make sure, once, that FSDP gives the weights in the order that they are taken for."""
    sizes = [_piece_size(weight) for weight in weights]
    right = sum(sizes) == given.numel() and given.dtype == torch.float32
    if right:
        for weight, piece in zip(weights, given.split(sizes), strict=True):
            assert isinstance(weight, DTensor)
            own = weight.to_local().detach().flatten()
            right = right and torch.equal(own.view(torch.int32), piece[: own.numel()].view(torch.int32))  # NaN too
    if not right:
        raise RuntimeError(f"torch {torch.__version__} gathers weights in an order that longmix does not know")
