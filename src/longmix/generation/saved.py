"""The states of a model in files of saved generations: tensors and numbers by name, and what they become again.

Classes that a file names are never looked up: the structure is that of the model's own state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_structure, tree_unflatten

from longmix.caches.cache import Cache, CacheKind
from longmix.mixers.parts.attention_state import AttentionState
from longmix.mixers.parts.states import leaves_with_names, named_leaves
from longmix.model.backbone import LanguageModel

FORMAT, WITHOUT_CACHES, WITH_CLASSES, WITHOUT_DIGEST = 4, 3, 2, 1
"""Format 4 has what caches hold, as they hold it, behind the name of the cache. Format 3 has the leaves of a state by
name; earlier ones have nested lists and objects with the names of classes."""


def saved_state(state: Any) -> dict[str, Any]:
    """The leaves of a state by name, and those of caches behind the names of these."""
    found: dict[str, Any] = {}
    for name, leaf in leaves_with_names(state):
        if isinstance(leaf, Cache):
            found |= {f"{name}.{part}": x for part, x in leaf.trimmed().items()}
        else:
            found[name] = leaf
    return found


def restored_state(content: dict[str, Any], model: LanguageModel, batch: int, kind: CacheKind) -> Any:
    """The state that a file of any format holds.

    Args:
        content: of the file.
        model: whose state it is.
        batch: rows.
        kind: of its caches.

    Raises:
        ValueError: there is no such state in it.
    """
    found = content["state"] if content["format"] >= WITHOUT_CACHES else _by_name(content["state"])
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} in the place of a state")
    begun = model.decoding_state(batch, kind)
    if content["format"] < FORMAT:
        return _adopted(_restored(found, model.init_state(batch), batch), begun, content["length"])
    rest = dict(found)
    for name, leaf in leaves_with_names(begun):
        if isinstance(leaf, Cache):
            parts = {key: rest.pop(key) for key in found if isinstance(key, str) and key.startswith(f"{name}.")}
            leaf.restore({key.removeprefix(f"{name}."): x for key, x in parts.items()}, name)
            rest[name] = leaf
    return _restored(rest, begun, batch)


def _adopted(earlier: Any, begun: Any, length: int) -> Any:
    """The state `begun`, whose caches take over the keys and values of an earlier one."""

    def is_whole(node: Any) -> bool:
        return isinstance(node, AttentionState | Cache)

    # a mixer's own state has as many leaves in both; a cache is one, and so is what it takes over
    before, _ = tree_flatten(earlier, is_leaf=is_whole)
    after, structure = tree_flatten(begun, is_leaf=is_whole)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if isinstance(new, Cache):
            new.adopt(old, length)
        else:
            after[number] = old
    return tree_unflatten(after, structure)


def _restored(found: dict[str, Any], begun: Any, batch: int) -> Any:
    """The state with the leaves that a file holds by name, in the structure of the empty state.

    Raises:
        ValueError: they are not the leaves of such a state.
    """
    known, structure = named_leaves(begun), tree_structure(begun)
    if stranger := next((name for name in found if name not in known), None):
        raise ValueError(f"it holds {stranger!r}, which is in no state of this model")
    leaves = []
    for name, like in known.items():
        if name not in found and like is not None:
            raise ValueError(f"it lacks {name}, which every state of this model has")
        leaf = found.get(name)
        if isinstance(leaf, Tensor):
            _check_tensor(leaf, like, batch)
        elif like is not None and type(leaf) is not type(like):
            raise ValueError(f"it holds {leaf!r} in the place of a {type(like).__name__}")
        elif like is None and leaf is not None:
            raise ValueError(f"it holds {leaf!r} in the place of a tensor")
        leaves.append(leaf)
    return tree_unflatten(leaves, structure)


def _check_tensor(found: Tensor, like: Any, batch: int) -> None:
    wrong = found.layout != torch.strided or found.is_meta or found.is_quantized
    wrong = wrong or found.ndim < 1 or found.shape[0] != batch or not isinstance(like, Tensor | None)
    if isinstance(like, Tensor):
        wrong = wrong or found.ndim != like.ndim or found.is_floating_point() != like.is_floating_point()
    if wrong:
        raise ValueError(f"it holds a tensor of shape {list(found.shape)} that is no state of this model")


def _by_name(nested: Any, path: str = "") -> dict[str, Any]:
    """The leaves by name of a state as files of format 2 hold it: lists, and the fields of objects by name."""
    if isinstance(nested, list):
        parts = [_by_name(part, f"{path}[{number}]") for number, part in enumerate(nested)]
    elif isinstance(nested, dict):
        parts = [_by_name(part, f"{path}.{name}") for name, part in nested["fields"].items()]
    else:
        return {path: nested}
    return {name: leaf for part in parts for name, leaf in part.items()}
