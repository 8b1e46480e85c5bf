"""Counts the bytes that tensors hold while code runs, of fake tensors as of real ones."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "convolution", "convolution_backward"}
"""Operators that multiply matrices; their time is counted in operations, that of others in bytes."""


class Ledger(TorchDispatchMode):
    """Counts the storages that operators allocate while it is active; views of one storage count once.

    What an operator allocates and frees within itself is not seen. Fake tensors have storages of the right size and no
    memory, so a model of any size can be accounted for anywhere.

    Args:
        known: tensors that exist already and are not to be counted.

    Attributes:
        live: bytes held now.
        peak: the most that were held since `mark`.
        moved: bytes read and written by operators other than products of matrices and our engines since `mark`.
        flops: operations of products and engines since `mark`, as torch counts them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._held = {x.untyped_storage()._cdata for x in known}
        self.live = self.peak = self.moved = self.flops = 0

    def mark(self) -> int:
        """Reset peak, traffic and operations; returns the bytes held now."""
        self.peak, self.moved, self.flops = self.live, 0, 0
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count the storages that it made."""
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        new = [self._enter(x) for x in made]
        self.peak = max(self.peak, self.live)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        changes = func._schema.is_mutable
        if (any(new) or changes) and func.namespace == "aten" and func._overloadpacket.__name__ not in PRODUCTS:
            read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in [*read, *made])
        return result

    def _enter(self, x: Tensor) -> bool:
        """Count a tensor's storage once; returns whether it is new."""
        storage = x.untyped_storage()
        if storage._cdata in self._held:
            return False
        key, size = storage._cdata, storage.nbytes()
        self._held.add(key)
        self.live += size
        weakref.finalize(storage, self._leave, key, size)
        return True

    def _leave(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the tensors' values."""
    return sum(x.numel() * x.element_size() for x in tensors)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape on the CPU, fake in a fake mode; floating-point numbers in `dtype` if it is given."""
    dtype = dtype if dtype is not None and x.is_floating_point() else x.dtype
    return torch.empty(x.shape, dtype=dtype, device="cpu")
