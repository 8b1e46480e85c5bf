"""The results of `task=cache_quality`: read with care, and laid out as panels of quality over bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longmix.reporting.panels import Panel, Series, file_word

EXACT = "exact"
"""The kind of cache that forgets nothing, and of what models remember without caches."""

DIFFERENT = 0.01
"""Relative difference from which on the losses of two models with `EXACT` are called different."""

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
    numbers = {name: _number(cell, name, most) for name, most in limits.items()}
    found = None if cell["found"] is None else _number(cell, "found", 1.0)
    whole = {name: int(_number(cell, name, LARGEST)) for name in ("context", "held_bytes", "read_bytes")}
    words = {name: cell[name] for name in ("cache", "kind", "settings", "question", "told")}
    return CacheCell(**words, **numbers, **whole, found=found)


def _number(cell: Mapping[str, Any], name: str, most: float) -> float:
    value = cell[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"the {name} of a cell is no number")
    if not -1e-6 <= value <= most:  # a divergence may be rounded below 0
        raise ValueError(f"the {name} of a cell is {value}, which cannot be")
    return float(value)


@dataclass(frozen=True)
class Measured:
    """The cells of one model on one set of rows.

    Attributes:
        name: of the run, "" where there is one alone.
        mixer: of the run.
        cells: by place and cache, each once.
        rows: what they were measured on, where that is not the run's own data.
    """

    name: str
    mixer: str
    cells: list[CacheCell]
    rows: str = ""

    def exact(self, place: tuple[int, str | None]) -> CacheCell | None:
        """The cell of the exact cache."""
        found = (cell for cell in self.cells if cell.place == place and cell.cache == EXACT)
        return next(found, None)

    @property
    def alone(self) -> bool:
        """Whether nothing but the exact cache was measured, as of mixers that take no other."""
        return all(cell.kind == EXACT for cell in self.cells)


def places(measured: Iterable[Measured]) -> list[tuple[int, str | None]]:
    """Contexts and places of questions, in order."""
    found = {cell.place for one in measured for cell in one.cells}
    return sorted(found, key=lambda place: (place[0], place[1] or ""))


def cache_panels(measured: Sequence[Measured]) -> list[Panel]:
    """Share found and loss over the bytes held, and over those read, for each context and place of the question.

    A kind of cache is a line through its budgets; the exact one is a dashed line across. Models without other caches
    are points.
    """
    panels = []
    for place in places(measured):
        here = [one for one in measured if any(cell.place == place for cell in one.cells)]
        for measure, unit in MEASURES.items():
            for axis, label in AXES.items():
                series = [line for one in here for line in _series(one, place, measure, axis, len(here) > 1)]
                if series:
                    panels.append(_panel(here[0], place, measure, axis, (label, unit), series))
    return panels


def _panel(
    one: Measured,
    place: tuple[int, str | None],
    measure: str,
    axis: Axis,
    labels: tuple[str, str],
    series: list[Series],
) -> Panel:
    context, question = place
    word = "held" if axis == "held_bytes" else "read"
    return Panel(
        file_word(f"caches_{measure}_{word}_{question or 'rows'}_{context}_{one.rows}"),
        "What caches lose",
        f"{words_of(place)}{f', {one.rows}' if one.rows else ''}",
        *labels,
        series,
        log_x=True,
        from_zero=measure == "found",
    )


def words_of(place: tuple[int, str | None]) -> str:
    """A place in words."""
    context, question = place
    return f"{context:,} tokens" + ("" if question is None else f", question read {question} compression")


def _series(one: Measured, place: tuple[int, str | None], measure: str, axis: Axis, several: bool) -> list[Series]:
    cells = [cell for cell in one.cells if cell.place == place and cell.quality(measure) is not None]
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        quality = cell.quality(measure)
        assert quality is not None
        name = curve_name(cell, cells)
        lines.setdefault(name, []).append((float(max(1, getattr(cell, axis))), quality))
    if not lines:
        return []
    if one.alone:
        return [Series(one.name or one.mixer, one.mixer, [x], [y]) for x, y in lines[EXACT][:1]]
    every = [x for points in lines.values() for x, _ in points]
    found = []
    for name, points in lines.items():
        x, y = (list(values) for values in zip(*sorted(points), strict=True))
        if name == EXACT:
            x, y = [min(every), max(every)], [y[0], y[0]]
        shown = f"{one.name} {name}" if several and one.name else name
        found.append(Series(shown, name.partition(" ")[0] if name == EXACT else name, x, y))
    return found


def curve_name(cell: CacheCell, cells: Sequence[CacheCell]) -> str:
    """The kind, and those of its settings that are no numbers and differ: budgets make a curve, choices another."""
    alike = [other.settings for other in cells if other.kind == cell.kind]
    told = {
        name: value
        for name, value in cell.settings.items()
        if (not isinstance(value, int | float) or isinstance(value, bool))
        and any(other.get(name) != value for other in alike)
    }
    return " ".join([cell.kind, *(f"{name}={_word(value)}" for name, value in told.items())])


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def different_models(measured: Sequence[Measured]) -> list[str]:
    """A sentence for each place at which models that are drawn together differ without any loss by caches."""
    found = []
    for place in places(measured):
        exact = {one.name or one.mixer: cell for one in measured if (cell := one.exact(place)) is not None}
        losses = [cell.loss for cell in exact.values()]
        if len(losses) > 1 and max(losses) - min(losses) > DIFFERENT * max(losses):
            listed = ", ".join(f"{name} {cell.loss:.4g}" for name, cell in exact.items())
            found.append(
                f"{words_of(place)}: the models themselves differ, in nats a target with the exact cache: {listed}. A "
                "cache is to be judged by its distance from the exact one of the same model."
            )
    return found
