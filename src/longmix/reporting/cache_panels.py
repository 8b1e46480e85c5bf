"""What caches lose, as panels of quality over bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longmix.reporting.cache_cells import AXES, EXACT, MEASURES, Axis, CacheCell
from longmix.reporting.panels import Panel, Series, file_word

SIZES = frozenset({"budget", "recent", "start", "bits", "high_share", "quantile"})
"""Settings of caches along which a curve goes."""

DIFFERENT = 0.01
"""Relative difference from which on the losses of two models with `EXACT` are called different."""


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
    found: list[Series] = []
    for name, points in lines.items():
        x, y = (list(values) for values in zip(*sorted(points), strict=True))
        if name == EXACT:
            x, y = [min(every), max(every)], [y[0], y[0]]
        shown = f"{one.name} {name}" if several and one.name else name
        kind = name.partition(" ")[0]
        first = not any(series.mixer == kind for series in found)  # a kind's other curves look otherwise
        found.append(Series(shown, kind if first else name, x, y))
    return found


def curve_name(cell: CacheCell, cells: Sequence[CacheCell]) -> str:
    """The kind, and its settings besides `SIZES` that are not those of its first cell, which make another curve."""
    first = next(other.settings for other in cells if other.kind == cell.kind)
    told = {name: value for name, value in cell.settings.items() if name not in SIZES and first.get(name) != value}
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
