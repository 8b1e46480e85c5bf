"""A panel as SVG: lines that carry their own names at their ends, or points that do. Colours come from the page.

Every mark has the class of its mixer's colour and `data-mixer`, by which the page dims the others.
"""

from itertools import pairwise

from longmix.reporting.axes import Axis, tick_labels
from longmix.reporting.markup import Attribute, Markup, joined, tag
from longmix.reporting.panels import Panel, Series

WIDTH, HEIGHT = 560, 320
LEFT, TOP, BOTTOM = 58, 16, 46
MARGIN = 28
"""Right of the last value; names stand there too, where they end lines."""
NAME_GAP = 14
"""Pixels between the baselines of two names."""
LETTER = 7.0
"""About the width of one in a name."""
RADIUS = 6
"""Of a point."""
LONGEST_NAME = 32
"""Letters of a name in a panel."""


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart and as near to the wanted ones as that allows, from `low` to `high` if they fit.

    Neighbours that would touch form a group, which stands around the mean of what its members want.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[int]] = []

    def first_place(group: list[int]) -> float:
        height = gap * (len(group) - 1)
        return max(low, min(sum(wanted[index] for index in group) / len(group) - height / 2, high - height))

    for index in order:
        groups.append([index])
        while len(groups) > 1 and first_place(groups[-2]) + gap * len(groups[-2]) > first_place(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    found = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            found[index] = first_place(group) + gap * rank
    return found


def draw(panel: Panel, colours: dict[str, int]) -> Markup:
    """The panel as an `<svg>` element."""
    xs = [value for series in panel.series for value in series.x]
    ys = [value for series in panel.series for value in series.y]
    x = Axis(xs, LEFT, WIDTH - _right(panel), log=panel.log_x and min(xs) > 0)
    y = Axis(ys, HEIGHT - BOTTOM, TOP, from_zero=panel.from_zero)
    marks = _points(panel, colours, x, y) if panel.kind == "points" else _lines(panel, colours, x, y)
    label = f"{panel.section}, {panel.title}: {panel.y_label} over {panel.x_label}"
    place = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria_label": label}
    return tag("svg", "\n", joined([*_grid(panel, x, y), *marks]), "\n", **place)


def _right(panel: Panel) -> float:
    """Space right of the axes."""
    longest = max(len(_shown(series.name)) for series in panel.series)
    return MARGIN if panel.kind == "points" else min(MARGIN + LETTER * longest, WIDTH / 2)


def _shown(name: str) -> str:
    """A name as a panel has room for it; the whole of it is told where it is pointed at."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\u2026"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", class_=kind, x1=f"{x1:.1f}", x2=f"{x2:.1f}", y1=f"{y1:.1f}", y2=f"{y2:.1f}")


def _text(kind: str, x: float, y: float, words: str, anchor: str | None = None, transform: str | None = None) -> Markup:
    return tag("text", words, class_=kind, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, transform=transform)


def _grid(panel: Panel, x: Axis, y: Axis) -> list[Markup]:
    right, bottom = x.last, HEIGHT - BOTTOM
    parts = []
    for tick, words in zip(y.ticks, tick_labels(y.ticks), strict=True):
        parts.append(_line("grid", LEFT, y(tick), right, y(tick)))
        parts.append(_text("tick", LEFT - 8, y(tick) + 4, words, "end"))
    for tick, words in zip(x.ticks, tick_labels(x.ticks), strict=True):
        parts.append(_line("stroke", x(tick), bottom, x(tick), bottom + 4))
        parts.append(_text("tick", x(tick), bottom + 18, words, "middle"))
    middle = (TOP + bottom) / 2
    parts.append(_line("stroke", LEFT, bottom, right, bottom))
    parts.append(_text("axis", (LEFT + right) / 2, HEIGHT - 6, panel.x_label))
    parts.append(_text("axis", 12, middle, panel.y_label, transform=f"rotate(-90 12 {middle})"))
    return parts


def _mark(series: Series, colours: dict[str, int], parts: list[Markup]) -> Markup:
    return tag("g", *parts, class_=f"mark c{colours[series.mixer]}", data_mixer=series.mixer)


def _dot(panel: Panel, series: Series, x: Axis, y: Axis, index: int, radius: float) -> Markup:
    """A marker that tells its values when it is pointed at."""
    values = series.x[index], series.y[index]
    words = f"{series.name}: {values[1]:,.4g} {panel.y_label}, {values[0]:,.0f} {panel.x_label}"
    place: dict[str, Attribute] = {"cx": f"{x(values[0]):.1f}", "cy": f"{y(values[1]):.1f}", "r": radius}
    return tag("circle", tag("title", words), **place)


def _lines(panel: Panel, colours: dict[str, int], x: Axis, y: Axis) -> list[Markup]:
    ends = [y(series.y[-1]) for series in panel.series]
    names = spread(ends, NAME_GAP, TOP + 4, HEIGHT - BOTTOM)
    column = x.last + 16
    found = []
    for series, end, name in zip(panel.series, ends, names, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(series.x, series.y, strict=True))
        parts = [tag("polyline", points=path)]
        few = len(series.x) <= 24
        shown = range(len(series.x)) if few else range(len(series.x) - 1, len(series.x))
        parts += [_dot(panel, series, x, y, index, 2.6) for index in shown]
        parts.append(_line("leader", x(series.x[-1]) + 4, end, column - 3, name))
        parts.append(_text("name", column, name + 4, _shown(series.name)))
        found.append(_mark(series, colours, parts))
    return found


def _points(panel: Panel, colours: dict[str, int], x: Axis, y: Axis) -> list[Markup]:
    """Points with their names beside them, the best ones joined: no run is both faster and better than those."""
    places = [(x(series.x[0]), y(series.y[0])) for series in panel.series]
    sign = -1 if panel.up else 1  # pixels count downward: the best is low, or high where more is better
    beaten = [any(o[0] > p[0] and sign * o[1] > sign * p[1] for o in places) for p in places]
    front = sorted(place for place, is_beaten in zip(places, beaten, strict=True) if not is_beaten)
    strokes = list(pairwise(front))
    found = [_line("front", *a, *b) for a, b in strokes]
    taken = [(a - RADIUS, b - RADIUS, a + RADIUS, b + RADIUS) for a, b in places]
    for series, place in sorted(zip(panel.series, places, strict=True), key=lambda pair: pair[1][1]):
        box = free_box(place, LETTER * len(_shown(series.name)), taken, strokes)
        taken.append(box)
        left, anchor = _anchored(box, place)
        name = _text("name", left, (box[1] + box[3]) / 2 + 4, _shown(series.name), anchor)
        found.append(_mark(series, colours, [_dot(panel, series, x, y, 0, RADIUS), name]))
    return found


Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def free_box(place: Point, width: float, taken: list[Box], strokes: list[tuple[Point, Point]]) -> Box:
    """Where a name of that width touches neither names, points nor lines, as near to its point as there is room."""
    across, along = RADIUS + 5 + width / 2, NAME_GAP + 1.0
    beside = [(across, 0.0), (-across, 0.0), (0.0, -along), (0.0, along)]
    corners = [(side * across, down * along * far) for far in (1, 2, 3, 4) for down in (-1, 1) for side in (1, -1)]
    boxes = []
    for right, down in (*beside, *corners):
        middle = place[0] + right, place[1] + down
        box = (middle[0] - width / 2, middle[1] - NAME_GAP / 2, middle[0] + width / 2, middle[1] + NAME_GAP / 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        touched = any(_overlap(box, other) for other in taken) or any(crosses(box, *stroke) for stroke in strokes)
        if inside and not touched:
            return box
        boxes.append(box)
    return boxes[0]


def crosses(box: Box, start: Point, end: Point) -> bool:
    """Whether a straight line passes through a box (clipped to it side by side, after Liang and Barsky)."""
    first, last = 0.0, 1.0
    for axis in (0, 1):
        length = end[axis] - start[axis]
        if length == 0:
            if not box[axis] < start[axis] < box[axis + 2]:
                return False
            continue
        near, far = sorted(((box[axis] - start[axis]) / length, (box[axis + 2] - start[axis]) / length))
        first, last = max(first, near), min(last, far)
    return first < last


def _anchored(box: Box, place: Point) -> tuple[float, str]:
    """The text's x and anchor: its near side stays where it is, however wide its letters turn out."""
    if box[0] > place[0]:
        return box[0], "start"
    return (box[2], "end") if box[2] < place[0] else (place[0], "middle")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
