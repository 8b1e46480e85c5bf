"""Dataclasses whose fields torch finds: what passes a module is walked leaf by leaf, and an unknown class is one leaf.

FSDP hangs its hooks on the tensors of what a block returns. Before torch 2.12 it finds them with `tree_leaves`, and
tensors in a class that is not registered are not found: their block's weights are missing in the backward pass.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch.utils._pytree import GetAttrKey, KeyEntry, register_pytree_node

Kind = TypeVar("Kind", bound=type)


def pytree(kind: Kind) -> Kind:
    """Make a dataclass a pytree of its fields; use it as a decorator above `@dataclass`."""
    return register_fields(kind, [GetAttrKey(field.name) for field in fields(kind)])


def register_fields(kind: Kind, keys: Sequence[KeyEntry]) -> Kind:
    """Make a dataclass a pytree whose fields have these keys in paths, in the order of the fields."""
    names = [field.name for field in fields(kind)]

    def parts(node: Any) -> list[Any]:
        return [getattr(node, name) for name in names]

    register_pytree_node(
        kind,
        lambda node: (parts(node), None),
        lambda values, _: kind(*values),
        flatten_with_keys_fn=lambda node: (list(zip(keys, parts(node), strict=True)), None),
    )
    return kind
