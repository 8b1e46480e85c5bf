"""The tensors of a state by name, apart from the rest of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Name = str
"""The keys on the way to a tensor, with slashes between: `optimizers/0/state/head.weight/exp_avg`."""

TRAINED = ("model", "optimizers")
"""The entries of a state that training changes step by step."""

AVERAGED = "ema"
"""The entry of a state for the averages of the weights, by name; see `longmix.training.averaging`."""

IN_TENSORS = (*TRAINED, "carried", AVERAGED)
"""The entries of a state whose tensors may be divided over processes."""


def split(state: Any) -> tuple[dict[Name, Tensor], Any]:
    """The tensors of nested dicts and lists by name, and the same dicts and lists without them."""
    tensors: dict[Name, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            items = {key: (value, f"{path}/{key}" if path else str(key)) for key, value in node.items()}
            tensors.update({name: value for value, name in items.values() if isinstance(value, Tensor)})
            return {key: walk(value, name) for key, (value, name) in items.items() if not isinstance(value, Tensor)}
        if isinstance(node, list):
            return [walk(value, f"{path}/{index}") for index, value in enumerate(node)]
        return node

    return tensors, walk(state, "")


def join(tensors: dict[Name, Tensor], rest: Any) -> Any:
    """Undo `split`. Keys above tensors must be texts; `rest` is changed."""
    for name, tensor in tensors.items():
        *parents, key = name.split("/")
        node = rest
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        node[key] = tensor
    return rest


def without_aliases(tensors: dict[Name, Tensor]) -> tuple[dict[Name, Tensor], dict[Name, Name]]:
    """Keep one name for each memory, as tied weights have several; also maps each name left out to the one kept."""
    first: dict[Any, Name] = {}
    kept: dict[Name, Tensor] = {}
    aliases: dict[Name, Name] = {}
    for name, tensor in tensors.items():
        memory = own_part(tensor)
        where = (memory.data_ptr(), memory.device, memory.dtype, memory.shape, memory.stride())
        if memory.numel() and first.setdefault(where, name) != name:
            aliases[name] = first[where]
        else:
            kept[name] = tensor
    return kept, aliases


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without the import of its module, which takes a second."""
    return hasattr(tensor, "full_tensor")


def is_copy(tensor: Any) -> bool:
    """Whether a process before this one has the same part of a tensor that is divided over others."""
    place = tensor.device_mesh.get_coordinate() or ()
    return any(kind.is_replicate() and at > 0 for kind, at in zip(tensor.placements, place, strict=False))


def own_part(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.detach().to_local() if is_divided(tensor) else tensor.detach()


def own_slice(tensor: Any) -> tuple[slice, ...]:
    """Where this process's part lies in the whole tensor, a slice for each axis."""
    if not is_divided(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # as torch.distributed.checkpoint asks
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def whole(tensor: Any) -> Tensor:
    """Gather a tensor that is divided over processes, whole on each; all processes must call it."""
    return tensor.detach().full_tensor() if is_divided(tensor) else tensor.detach()


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that this process writes.

    Attributes:
        part: its memory.
        start: where it begins in the whole tensor.
        shape: of the whole tensor.
    """

    part: Tensor
    start: tuple[int, ...]
    shape: torch.Size


def pieces(tensors: dict[Name, Tensor], rank: int, size: int) -> dict[Name, Piece]:
    """The pieces that process `rank` of `size` writes; together the processes write everything once.

    Each has its part of what is divided; of what all have alike, the largest goes to whoever has least so far.
    """
    found: dict[Name, Piece] = {}
    for name, tensor in tensors.items():
        if is_divided(tensor) and not is_copy(tensor):
            found[name] = Piece(own_part(tensor), tuple(part.start for part in own_slice(tensor)), tensor.shape)
    for name in _share(tensors, rank, size):
        found[name] = Piece(tensors[name], (0,) * tensors[name].dim(), tensors[name].shape)
    return found


def _share(tensors: dict[Name, Tensor], rank: int, size: int) -> Iterator[Name]:
    loads = [0] * size
    alike = [name for name, tensor in tensors.items() if not is_divided(tensor)]
    for name in sorted(alike, key=lambda name: (-tensors[name].nbytes, name)):
        owner = loads.index(min(loads))
        loads[owner] += tensors[name].nbytes
        if owner == rank:
            yield name
