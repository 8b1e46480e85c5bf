"""The pictures of a report: every panel and map is drawn here once, for the page and for the files beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from longmix.reporting.labels import PointNames
from longmix.reporting.markup import Markup
from longmix.reporting.panels import Panel, names_of
from longmix.reporting.plots import (
    AROUND,
    CELL,
    HEIGHT,
    WIDTH,
    balanced,
    draw_borders,
    draw_curves,
    draw_legend,
    draw_needles,
    drawing,
    legend_columns,
    new_figure,
    plain,
)
from longmix.reporting.results import NEEDLE, NeedleMap
from longmix.reporting.runs import Run
from longmix.reporting.style import SOFT, style_of
from longmix.reporting.svg import mark_id, svg

COLUMNS = 3
"""The most panels side by side."""

NAME_HEIGHT, LEGEND_ROW = 15, 18
"""Height in points of a name at the end of a line, and of a line of the legend."""

MAP_WIDTH = 300
"""Width of a map of needles in points."""


class Found(NamedTuple):
    """A map of needles, of which run and measure."""

    name: str
    run: Run
    needles: NeedleMap
    measure: str

    @property
    def title(self) -> str:
        """The name, and of other data than the run's own the measure."""
        return self.name if self.measure == NEEDLE else f"{self.name}: {self.measure}"


def found_needles(runs: list[Run]) -> list[Found]:
    """All maps of needles, by measure and then in the order of the runs."""
    names = names_of(runs)
    measures = list(dict.fromkeys(measure for run in runs for measure in run.evaluations.needles))
    return [
        Found(names[run.folder], run, run.evaluations.needles[measure], measure)
        for measure in measures
        for run in runs
        if measure in run.evaluations.needles
    ]


def _height(panels: Sequence[Panel]) -> float:
    """The height in points that holds the names of all lines."""
    most = max((len(panel.series) for panel in panels if panel.kind == "lines"), default=0)
    return max(HEIGHT, NAME_HEIGHT * most + AROUND)


@drawing()
def panel_picture(panel: Panel, width: float = WIDTH) -> Figure:
    """One panel, with its title."""
    figure, (axes,) = new_figure(1, width=width, height=_height([panel]))
    draw_panel(axes, panel, {}, title=f"{panel.section}\n{panel.title}")
    return figure


@drawing()
def panel_svg(panel: Panel, key: str, colours: dict[str, int]) -> Markup:
    """One panel for the page, without the title, which the page writes."""
    figure, (axes,) = new_figure(1, height=_height([panel]))
    told = draw_panel(axes, panel, colours)
    return svg(figure, f"{panel.section}, {panel.title}: {panel.y_label} over {panel.x_label}", key, told)


@drawing()
def overview(panels: Sequence[Panel], columns: int = COLUMNS) -> Figure:
    """All panels, and one legend where there are several."""
    if not panels:
        figure, (axes,) = new_figure(1)
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was logged that could be drawn", ha="center", va="center")
        return figure
    styles = {mixer: style_of(mixer) for panel in panels for mixer in (series.mixer for series in panel.series)}
    across = max(balanced(len(panels), columns)) * WIDTH
    rows = -(-len(styles) // legend_columns(styles, across))
    footer = LEGEND_ROW * rows + 6 if len(styles) > 1 and len(panels) > 1 else 0
    figure, panel_axes = new_figure(len(panels), columns, height=_height(panels), footer=footer)
    for axes, panel in zip(panel_axes, panels, strict=True):
        draw_panel(axes, panel, {}, title=f"{panel.section}\n{panel.title}")
    if footer:
        draw_legend(figure.subfigs[-1], styles, across)
    return figure


def draw_panel(axes: Axes, panel: Panel, colours: dict[str, int], title: str = "") -> dict[str, list[str]]:
    """Draw a panel; returns what the points of each line tell, by the line's id."""
    styles = [style_of(series.mixer) for series in panel.series]
    marks = [mark_id(colours.get(series.mixer, 0), index) for index, series in enumerate(panel.series)]
    names = [series.name for series in panel.series]
    counted = [  # equal names get a number, so that no line is lost
        f"{name} ({names[:index].count(name) + 1})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
    lines = draw_curves(
        axes,
        {name: (series.x, series.y) for name, series in zip(counted, panel.series, strict=True)},
        title=title,
        x_label=panel.x_label,
        y_label=panel.y_label,
        log_x=panel.log_x,
        styles=styles,
        marks=marks,
        names=panel.kind == "lines",
    )
    draw_borders(axes, panel.borders)
    if panel.kind == "points":
        _draw_points(axes, lines, [plain(name) for name in counted], panel.best)
    if panel.from_zero:
        values = [value for series in panel.series for value in series.y]
        axes.set_ylim(min(0.0, axes.get_ylim()[0]) if min(values) < 0 else 0.0, None if any(values) else 1.0)
    return {mark: _told(panel, line, name) for mark, line, name in zip(marks, lines, counted, strict=True)}


def _told(panel: Panel, line: Line2D, name: str) -> list[str]:
    """The text of each point that has a marker."""
    points = np.asarray(line.get_xydata())
    shown = points if line.get_markevery() == 1 else points[-1:]
    return [f"{name}: {y:,.4g} {panel.y_label}, {x:,.0f} {panel.x_label}" for x, y in shown]


def _draw_points(axes: Axes, lines: list[Line2D], names: list[str], best: str | None) -> None:
    """Points with their names beside them, the best ones joined: no run is both faster and better than those."""
    points = [tuple(np.asarray(line.get_xydata())[-1].tolist()) for line in lines]
    sign = 1 if best == "high" else -1
    front = sorted(p for p in points if not any(o[0] > p[0] and sign * o[1] > sign * p[1] for o in points))
    joined = None
    if best and len(front) > 1:
        (joined,) = axes.plot(*zip(*front, strict=True), color=SOFT, linestyle=(0, (2, 4)), linewidth=1, clip_on=False)
    for line in lines:
        line.set_markersize(8)
    axes.margins(x=0.12, y=0.12)
    PointNames(axes, lines, names, joined)


def _map_height(needles: NeedleMap) -> float:
    return CELL * len(needles.depths) + AROUND


@drawing()
def needles_svg(found: Found, key: str) -> Markup:
    """One map for the page, without the title, which the page writes."""
    needles = found.needles
    figure, (axes,) = new_figure(1, width=MAP_WIDTH, height=_map_height(needles) - 14)
    _draw_map(axes, needles)
    return svg(figure, f"{found.name}: needles found", key, {})


@drawing()
def needles_picture(maps: Sequence[tuple[str, NeedleMap]]) -> Figure:
    """Maps by name side by side."""
    height = max(_map_height(needles) for _, needles in maps)
    figure, axes = new_figure(len(maps), COLUMNS, width=MAP_WIDTH, height=height)
    for own, (name, needles) in zip(axes, maps, strict=True):
        _draw_map(own, needles, f"{name}: share of {needles.needles} found")
    return figure


def _draw_map(axes: Axes, needles: NeedleMap, title: str = "") -> None:
    grid = np.array(needles.accuracy)
    draw_needles(axes, grid, needles.lengths, needles.depths, title=title, trained_seq_len=needles.trained_seq_len)
