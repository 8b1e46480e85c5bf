"""How analyses look into a mixer: through its engine calls, or the layers between which it mixes values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class EngineCall:
    """One call of the engine of a mixer.

    Attributes:
        engine: the function.
        query, key, value: what it was given, [B, T, H, .].
        options: its other arguments by name, the gates among them.
        output: [B, T, H, V], what it returned first.
    """

    engine: Callable[..., tuple[Tensor, Any]]
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class ValuePath:
    """The layers between which a mixer is linear in its values, given everything else.

    Attributes:
        enter: the layer whose output is the values, [B, T, value_heads * W].
        leave: the layer that is given the heads mixed of them, [B, T, heads * W].
        value_heads, heads: how many there are; `value_heads` divides `heads`.
    """

    enter: nn.Module
    leave: nn.Module
    value_heads: int
    heads: int
