"""Mixers' states are pytrees of tensors: saved, forked and counted leaf by leaf, whoever wrote the mixer.

Tuples, lists, dicts and named tuples are pytrees already. A dataclass becomes one with `mixer_state`, which also says
which of its fields are bookkeeping, or with `torch.export.register_dataclass`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    GetAttrKey,
    KeyEntry,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

from longmix.caches.cache import Cache
from longmix.errors import ConfigError
from longmix.pytrees import Kind, register_fields


class BookkeepingKey(GetAttrKey):
    """The name of a field that says where a row is and what is valid, and nothing of the tokens."""


def mixer_state(*, bookkeeping: Iterable[str] = ()) -> Callable[[Kind], Kind]:
    """Make a dataclass a state of a mixer; use it as a decorator above `@dataclass`.

    Args:
        bookkeeping: fields that say where a row is and what is valid, of a few bytes a row or token.
            `Mixer.state_bytes` counts what is remembered of the tokens and not these.
    """
    kept = frozenset(bookkeeping)

    def register(kind: Kind) -> Kind:
        names = [field.name for field in fields(kind)]
        keys: list[KeyEntry] = [BookkeepingKey(name) if name in kept else GetAttrKey(name) for name in names]
        if unknown := kept.difference(names):
            raise TypeError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")

        return register_fields(kind, keys)

    return register


def mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state with `change` applied to every tensor in it."""
    return tree_map_only(Tensor, change, state)


def caches(state: Any) -> list[Cache]:
    """The caches of keys and values in a state, first layer first."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Cache)]


def forked(state: Any, count: int) -> Any:
    """A state with every row `count` times, rows of one text behind each other; both go on independently."""
    return _changed(state, lambda cache: cache.fork(count), lambda x: x.repeat_interleave(count, 0))


def with_rows(state: Any, rows: Tensor) -> Any:
    """A state of these rows, int64 [n], each any number of times; both go on independently."""
    return _changed(state, lambda cache: cache.keep(rows), lambda x: x.index_select(0, rows.to(x.device)))


def looking_ahead(state: Any, count: int) -> Any:
    """A fork that reads `count` tokens which may come; see `Cache.looking_ahead`."""
    return _changed(state, lambda cache: cache.looking_ahead(count), lambda x: x.clone())


def joined(states: Sequence[Any]) -> Any:
    """The state of the rows of several states, whose rows may have seen different numbers of tokens.

    Raises:
        ConfigError: a mixer remembers tokens in their order, outside caches.
    """
    leaves, structures = zip(*(tree_flatten(state) for state in states), strict=True)
    found: list[Any] = []
    for parts in zip(*leaves, strict=True):
        if isinstance(parts[0], Cache):
            found.append(type(parts[0]).joined(parts))
        elif not isinstance(parts[0], Tensor) or any(x.shape[1:] != parts[0].shape[1:] for x in parts):
            if any(isinstance(x, Tensor) or x != parts[0] for x in parts):
                raise ConfigError(
                    "these prompts have different lengths, are read apart, and cannot be put together: a layer holds "
                    "their tokens outside a cache. Give prompts of one length, or one prompt."
                )
            found.append(parts[0])
        else:
            found.append(torch.cat(parts))
    return tree_unflatten(found, structures[0])


def _changed(state: Any, cache: Callable[[Cache], Cache], tensor: Callable[[Tensor], Tensor]) -> Any:
    def change(leaf: Any) -> Any:
        if isinstance(leaf, Cache):
            return cache(leaf)
        return tensor(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(change, state)


def total_bytes(state: Any) -> int:
    """Bytes of a state over all rows, bookkeeping included and spare room of caches left out."""
    held, kept = held_bytes(state)
    return held + kept


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves of a state by name, such as `[0].mixer.key`; None where nothing is remembered yet.

    A node of a pytree that was registered without names has its leaves numbered, and so have all others then.
    """
    return dict(leaves_with_names(state))


def leaves_with_names(state: Any) -> list[tuple[str, Any]]:
    """The names and leaves of `named_leaves`, in order."""
    try:
        return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(state)[0]]
    except ValueError:
        return [(str(number), leaf) for number, leaf in enumerate(tree_leaves(state))]


def held_bytes(state: Any) -> tuple[int, int]:
    """Bytes of the tensors of a state over all rows: what it remembers of the tokens, and its bookkeeping."""
    held = kept = 0
    try:
        leaves = tree_flatten_with_path(state)[0]
    except ValueError:  # a node without names cannot tell which leaves are bookkeeping
        leaves = [((), leaf) for leaf in tree_leaves(state)]
    for path, leaf in leaves:
        if isinstance(leaf, Cache):
            held += leaf.held_bytes() + (0 if leaf.carried is None else leaf.carried.nbytes)
            kept += leaf.bookkeeping_bytes()
        elif isinstance(leaf, Tensor):
            bookkeeping = any(isinstance(key, BookkeepingKey) for key in path)
            kept, held = kept + leaf.nbytes * bookkeeping, held + leaf.nbytes * (not bookkeeping)
    return held, kept


def check_state(state: Any, mixer: str, batch: int) -> None:
    """Refuse a state before the first token that could not be forked, saved or counted.

    Args:
        state: what the mixer's `init_state` returned.
        mixer: the name of its class.
        batch: rows.

    Raises:
        ConfigError: it holds an object that is no pytree, or a tensor that does not begin with the rows.
    """
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            if leaf.ndim < 1 or leaf.shape[0] != batch:
                raise ConfigError(
                    f"{mixer}.init_state({batch}) holds a tensor of shape {list(leaf.shape)}; the first axis of every "
                    f"tensor of a state is the row, of which there are {batch} here."
                )
        elif leaf is not None and not isinstance(leaf, int | float | str):
            raise ConfigError(
                f"{mixer}.init_state({batch}) holds a {type(leaf).__name__}, which is no pytree: it cannot be forked "
                "or saved. Use tuples, or put @longmix.mixers.parts.states.mixer_state() above its @dataclass."
            )
