"""Offloading: what the backward pass needs waits in the host's memory, on its way while the GPU computes.

A layer's tensors leave while the next layer computes, and come back while the layer after it is in its backward pass.
So a device holds what two layers save, however many there are. What the last layer saves stays, as it is needed at
once. So do weights, tensors that layers share, and small ones. With activation checkpointing a layer saves its input
alone. The design is that of torchtune's `OffloadActivations` (streams of their own, pinned memory), with two changes:
a storage that several operators save travels once, and what is on its way counts by layers instead of tensors.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

LEAST_BYTES = 2**20
"""Smaller storages stay: starting their copies takes longer than the copies."""


class Lane(Protocol):
    """The way between a device and the host. Copies do not make the computation wait, unless `wait` says so."""

    def send(self, storage: torch.UntypedStorage) -> tuple[Any, Any]:
        """Begin to copy a storage as it is once the work so far is done; returns the copy, and what to wait for.

        The storage must last until somebody has waited.
        """
        ...

    def fetch(self, sent: Any, there: Any) -> tuple[torch.UntypedStorage, Any]:
        """Begin to copy back what `send` returned; returns the storage, and what to wait for before it is read."""
        ...

    def wait(self, done: Any) -> None:
        """Let the device's work from here on wait for a copy."""
        ...


class CudaLane:
    """A stream for each direction, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.away, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, storage: torch.UntypedStorage) -> tuple[Tensor, torch.cuda.Event]:
        """See `Lane`."""
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
        self.away.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.away):
            host.copy_(_flat(storage), non_blocking=True)
        return host, self.away.record_event()

    def fetch(self, sent: Tensor, there: torch.cuda.Event) -> tuple[torch.UntypedStorage, torch.cuda.Event]:
        """See `Lane`. The memory is that of the computing stream, whose earlier work may still be using it."""
        here = torch.empty(sent.shape, dtype=torch.uint8, device=self.device)
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        self.back.wait_event(there)
        with torch.cuda.stream(self.back):
            here.copy_(sent, non_blocking=True)
        return here.untyped_storage(), self.back.record_event()

    def wait(self, done: torch.cuda.Event) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self.device).wait_event(done)


@functools.cache
def lane_of(device: torch.device) -> Lane | None:
    """The lane between a device and its host; None for a CPU, which is the host."""
    return CudaLane(device) if device.type == "cuda" else None


class Offload:
    """The offloading of one forward pass and its backward pass.

    Args:
        lane: of the device.
        layers: how many layers there are.
        least: bytes of the smallest storage that leaves.
    """

    def __init__(self, lane: Lane, layers: int, least: int = LEAST_BYTES) -> None:
        self.lane, self.layers, self.least = lane, layers, least
        self._group: _Group | None = None

    @contextlib.contextmanager
    def layer(self, index: int, block: nn.Module, shared: Any) -> Iterator[None]:
        """Offload what the code within saves for the backward pass.

        Args:
            index: of the layer, from 0; each is entered once, in order.
            block: its weights stay.
            shared: tensors, in containers or not, that others hold as well; they stay.
        """
        before = self._group
        if index == self.layers - 1:
            yield
        else:
            self._group = group = _Group(self.lane, before)
            staying = _Staying(block, shared, self.least)
            with saved_tensors_hooks(lambda x: x if staying.has(x) else group.packed(x), _unpacked):
                yield
        if before is not None:
            before.let_go()


class _Staying:
    """Tells which tensors stay on the device."""

    def __init__(self, block: nn.Module, shared: Any, least: int) -> None:
        self.least = least
        self.shared = {StorageWeakRef(x.untyped_storage()).cdata for x in _tensors(tree_leaves(shared))}
        # Known by shape: rounded copies of weights are other tensors, and FSDP takes the memory of gathered ones away.
        self.shapes = {shape for weight in block.parameters() for shape in (weight.shape, weight.shape[::-1])}

    def has(self, x: Tensor) -> bool:
        """Whether a tensor stays."""
        small = x.untyped_storage().nbytes() < self.least
        known = isinstance(x, nn.Parameter) or x.shape in self.shapes
        return small or known or StorageWeakRef(x.untyped_storage()).cdata in self.shared


@dataclass
class _Packed:
    """What autograd keeps instead of a tensor: its place in a storage that is away."""

    away: "_Away"
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Away:
    """A storage in the host's memory.

    Attributes:
        readers: how many saved tensors have yet to be read from it in this backward pass.
    """

    def __init__(self, group: "_Group", storage: torch.UntypedStorage) -> None:
        self.group = group
        self._back: tuple[torch.UntypedStorage, Any] | None = None
        self.sent, self.there = group.lane.send(storage)
        self.packs = self.readers = 0

    def fetch(self) -> None:
        """Begin to copy it back, unless that has begun."""
        if self._back is None:
            self._back = self.group.lane.fetch(self.sent, self.there)

    def read(self) -> torch.UntypedStorage:
        """The storage on the device; after the last reader it is theirs alone."""
        self.fetch()
        assert self._back is not None
        storage, here = self._back
        self.group.lane.wait(here)
        self.readers -= 1
        if self.readers <= 0:  # a backward pass over a retained graph reads all of it again
            self._back, self.readers = None, self.packs
        return storage

    def __del__(self) -> None:
        """Nobody has read it, as after an error: later work must not get memory that is still being written."""
        if self._back is not None:
            self.group.lane.wait(self._back[1])


class _Group:
    """What one layer has sent away."""

    def __init__(self, lane: Lane, before: "_Group | None") -> None:
        self.lane, self.before = lane, before
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._leaving: list[tuple[torch.UntypedStorage, Any]] = []
        self._fetches = False

    def packed(self, x: Tensor) -> _Packed:
        """Send a tensor's storage away, unless it is on its way as it is now."""
        storage = x.untyped_storage()
        mark = StorageWeakRef(storage)  # as long as there is one, no other storage gets this number
        key = mark.cdata, x._version
        known = self._known.get(key)
        away = None if known is None else known[1]()
        if away is None:
            away = _Away(self, storage)
            self._known[key] = mark, weakref.ref(away)
            self._leaving.append((storage, away.there))
        away.packs += 1
        away.readers += 1
        return _Packed(away, x.device, x.dtype, x.size(), x.stride(), x.storage_offset())

    def let_go(self) -> None:
        """Give up the device's memory; what follows waits for the copies."""
        if self._leaving:
            self.lane.wait(self._leaving[-1][1])  # copies end in their order
            self._leaving.clear()

    def fetch(self) -> None:
        """Begin to copy everything back; once, as each storage that is read once more fetches itself."""
        if self._fetches:
            return
        self._fetches = True
        for _, reference in self._known.values():
            away = reference()
            if away is not None:
                away.fetch()


def _unpacked(packed: Tensor | _Packed) -> Tensor:
    """The tensor that was saved. The first one of a layer brings the whole layer, then the one before it."""
    if isinstance(packed, Tensor):
        return packed
    group = packed.away.group
    group.fetch()
    if group.before is not None:
        group.before.fetch()
    storage = packed.away.read()
    empty = torch.empty(0, dtype=packed.dtype, device=packed.device)
    return empty.set_(storage, packed.offset, packed.size, packed.stride)


def _flat(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(leaves: Iterable[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
