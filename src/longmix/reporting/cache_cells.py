"""The results of `task=cache_quality`, read with care: any file may be damaged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

EXACT = "exact"
"""The kind of cache that forgets nothing, and of what models remember without caches."""

LARGEST = 1e15

Axis = Literal["held_bytes", "read_bytes"]
AXES: dict[Axis, str] = {"held_bytes": "bytes held of a row", "read_bytes": "bytes read for a token"}
MEASURES = {"found": "share found", "loss": "nats a target"}


@dataclass(frozen=True)
class CacheCell:
    """What a cache gave in one place.

    Attributes:
        cache: the word that was given, such as `h2o:budget=0.25`.
        kind: its name.
        settings: all of them.
        context: tokens of a row.
        question: "after" the prompt was compressed, "before", or None for rows without one.
        told: what the cache knew beyond the prompt; None for nothing.
        loss, kl: nats a target.
        found: share of values or targets; None of windows of text.
        token_accuracy: share of tokens.
        held_bytes, read_bytes: of a row.
        milliseconds: of a step.
    """

    cache: str
    kind: str
    settings: dict[str, Any]
    context: int
    question: str | None
    told: str | None
    loss: float
    kl: float
    found: float | None
    token_accuracy: float
    held_bytes: int
    read_bytes: int
    milliseconds: float

    @property
    def place(self) -> tuple[int, str | None]:
        """What cells must share to be compared."""
        return self.context, self.question

    def quality(self, measure: str) -> float | None:
        """A measure of `MEASURES`."""
        return self.found if measure == "found" else self.loss


def front(cells: Sequence[CacheCell], axis: Axis = "held_bytes") -> list[bool]:
    """Of each cell, whether no other one has as few bytes and better quality, or fewer bytes and as good quality.

    Quality is the share found where there is one, else the loss.
    """
    points = [(getattr(cell, axis), -cell.loss if cell.found is None else cell.found) for cell in cells]
    return [
        not any(
            other[0] <= own[0] and other[1] >= own[1] and other != own  # better in one, no worse in the other
            for other in points
        )
        for own in points
    ]


def checked_cells(report: Mapping[str, Any]) -> list[CacheCell]:
    """The cells of a report that anybody may have written.

    Raises:
        KeyError, TypeError, ValueError: it is no such report.
    """
    cells = report["cells"]
    if not isinstance(cells, list) or not cells:
        raise ValueError("its cells are no list of results")
    return [_checked(cell) for cell in cells]


def _checked(cell: Mapping[str, Any]) -> CacheCell:
    for name in ("cache", "kind"):
        if not isinstance(cell[name], str) or not cell[name]:
            raise ValueError(f"the {name} of a cell is no name")
    for name in ("question", "told"):
        if not isinstance(cell[name], str | None):
            raise ValueError(f"the {name} of a cell is no word")
    if not isinstance(cell["settings"], dict):
        raise ValueError("the settings of a cell are no object")
    limits = {"loss": LARGEST, "kl": LARGEST, "token_accuracy": 1.0, "milliseconds": LARGEST}
    numbers: dict[str, Any] = {name: _number(cell, name, most) for name, most in limits.items()}
    found = None if cell["found"] is None else _number(cell, "found", 1.0)
    counts = "context", "held_bytes", "read_bytes"
    whole: dict[str, Any] = {name: int(_number(cell, name, LARGEST)) for name in counts}
    words: dict[str, Any] = {name: cell[name] for name in ("cache", "kind", "settings", "question", "told")}
    return CacheCell(**words, **numbers, **whole, found=found)


def _number(cell: Mapping[str, Any], name: str, most: float) -> float:
    value = cell[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"the {name} of a cell is no number")
    if not -1e-6 <= value <= most:  # a divergence may be rounded below 0
        raise ValueError(f"the {name} of a cell is {value}, which cannot be")
    return float(value)
