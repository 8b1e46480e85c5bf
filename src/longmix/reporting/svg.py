"""A panel as SVG: lines that carry their own names at their ends, or points that do. Colours come from the page.

Every mark has the class of its mixer's colour and `data-mixer`, by which the page dims the others.
"""

import math
from html import escape
from itertools import pairwise

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
UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
"""From which size ticks are told in which unit; thousands from ten thousand on."""


class Axis:
    """Maps values to pixels.

    Args:
        values: what has to fit.
        first, last: pixels of the smallest and the largest.
        log: the axis doubles; values must be above 0.
        from_zero: the smallest is 0.
    """

    def __init__(self, values: list[float], first: float, last: float, log: bool = False, from_zero: bool = False):
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log2(low), math.log2(high)
            self.ticks = [2.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1)]
            margin = 0.03 * (self.high - self.low)
        elif from_zero and low >= 0 < high:
            self.ticks = nice_ticks(0.0, high)
            step = self.ticks[1] - self.ticks[0]
            if self.ticks[-1] < high:
                self.ticks.append(self.ticks[-1] + step)
            self.low, self.high, margin = 0.0, self.ticks[-1], 0.0
        else:
            self.low, self.high = low, high
            self.ticks = nice_ticks(low, high)
            margin = 0.05 * (high - low)
        self.low, self.high = self.low - margin, self.high + margin
        if self.high == self.low:
            self.low, self.high = self.low - 1, self.high + 1

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        place = math.log2(value) if self.log else value
        return self.first + (place - self.low) / (self.high - self.low) * (self.last - self.first)


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """Ticks in words, all in the same unit but for powers of two, which are 512, 1k, 2k."""
    if all(tick >= 1 and math.log2(tick).is_integer() for tick in ticks):
        return [f"{tick:g}" if tick < 1024 else f"{tick / 1024:g}k" for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    size, letter = next(
        ((min(size, 1e3 if letter == "k" else size), letter) for size, letter in UNITS if largest >= size), (1.0, "")
    )
    return [f"{tick / size:,.10g}{letter if tick else ''}" for tick in ticks]


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


def draw(panel: Panel, colours: dict[str, int]) -> str:
    """The panel as an `<svg>` element."""
    xs = [value for series in panel.series for value in series.x]
    ys = [value for series in panel.series for value in series.y]
    x = Axis(xs, LEFT, WIDTH - _right(panel), log=panel.log_x and min(xs) > 0)
    y = Axis(ys, HEIGHT - BOTTOM, TOP, from_zero=panel.from_zero)
    marks = _points(panel, colours, x, y) if panel.kind == "points" else _lines(panel, colours, x, y)
    label = escape(f"{panel.section}, {panel.title}: {panel.y_label} over {panel.x_label}")
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
            *_grid(panel, x, y),
            *marks,
            "</svg>",
        ]
    )


def _right(panel: Panel) -> float:
    """Space right of the axes."""
    longest = max(len(series.name) for series in panel.series)
    return MARGIN if panel.kind == "points" else min(MARGIN + LETTER * longest, WIDTH / 2)


def _grid(panel: Panel, x: Axis, y: Axis) -> list[str]:
    right, bottom = x.last, HEIGHT - BOTTOM
    parts = []
    for tick, words in zip(y.ticks, tick_labels(y.ticks), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{words}</text>')
    for tick, words in zip(x.ticks, tick_labels(x.ticks), strict=True):
        parts.append(f'<line class="stroke" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{words}</text>')
    parts.append(f'<line class="stroke" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(panel.x_label)}</text>')
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 12 {middle})"'
    parts.append(f'<text class="axis" x="12" y="{middle}" {turned}>{escape(panel.y_label)}</text>')
    return parts


def _open(series: Series, colours: dict[str, int]) -> str:
    return f'<g class="mark c{colours[series.mixer]}" data-mixer="{escape(series.mixer)}">'


def _dot(panel: Panel, series: Series, x: Axis, y: Axis, index: int, radius: float) -> str:
    """A marker that tells its values when it is pointed at."""
    values = series.x[index], series.y[index]
    words = f"{series.name}: {values[1]:,.4g} {panel.y_label}, {values[0]:,.0f} {panel.x_label}"
    place = f'cx="{x(values[0]):.1f}" cy="{y(values[1]):.1f}"'
    return f'<circle {place} r="{radius}"><title>{escape(words)}</title></circle>'


def _lines(panel: Panel, colours: dict[str, int], x: Axis, y: Axis) -> list[str]:
    ends = [y(series.y[-1]) for series in panel.series]
    names = spread(ends, NAME_GAP, TOP + 4, HEIGHT - BOTTOM)
    column = x.last + 16
    parts = []
    for series, end, name in zip(panel.series, ends, names, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(series.x, series.y, strict=True))
        parts.append(_open(series, colours))
        parts.append(f'<polyline points="{path}"/>')
        few = len(series.x) <= 24
        shown = range(len(series.x)) if few else range(len(series.x) - 1, len(series.x))
        parts.extend(_dot(panel, series, x, y, index, 2.6) for index in shown)
        last = x(series.x[-1])
        parts.append(f'<line class="leader" x1="{last + 4:.1f}" y1="{end:.1f}" x2="{column - 3}" y2="{name:.1f}"/>')
        parts.append(f'<text class="name" x="{column}" y="{name + 4:.1f}">{escape(series.name)}</text></g>')
    return parts


def _points(panel: Panel, colours: dict[str, int], x: Axis, y: Axis) -> list[str]:
    """Points with their names beside them, the best ones joined: no run is both faster and better than those."""
    places = [(x(series.x[0]), y(series.y[0])) for series in panel.series]
    front = sorted(place for place in places if not any(o[0] > place[0] and o[1] > place[1] for o in places))
    parts = [
        f'<line class="front" x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"/>'
        for a, b in pairwise(front)
    ]
    taken = [(a - RADIUS, b - RADIUS, a + RADIUS, b + RADIUS) for a, b in places]
    for series, place in sorted(zip(panel.series, places, strict=True), key=lambda pair: pair[1][1]):
        box = _free_box(place, LETTER * len(series.name), taken)
        taken.append(box)
        parts.append(_open(series, colours))
        parts.append(_dot(panel, series, x, y, 0, RADIUS))
        middle = f'x="{_anchored(box, place)[0]:.1f}" y="{(box[1] + box[3]) / 2 + 4:.1f}"'
        middle += f' text-anchor="{_anchored(box, place)[1]}"'
        parts.append(f'<text class="name" {middle}>{escape(series.name)}</text></g>')
    return parts


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _free_box(place: tuple[float, float], width: float, taken: list[Box]) -> Box:
    """Where a name of that width touches nothing: right of its point, left, above, below, or else right of it."""
    across, along = RADIUS + 5 + width / 2, NAME_GAP + 1
    boxes = []
    for right, down in ((across, 0.0), (-across, 0.0), (0.0, -along), (0.0, along), (across, -along), (across, along)):
        middle = place[0] + right, place[1] + down
        box = (middle[0] - width / 2, middle[1] - NAME_GAP / 2, middle[0] + width / 2, middle[1] + NAME_GAP / 2)
        if box[0] >= LEFT and box[2] <= WIDTH and not any(_overlap(box, other) for other in taken):
            return box
        boxes.append(box)
    return boxes[0]


def _anchored(box: Box, place: tuple[float, float]) -> tuple[float, str]:
    """The text's x and anchor: its near side stays where it is, however wide its letters turn out."""
    if box[0] > place[0]:
        return box[0], "start"
    return (box[2], "end") if box[2] < place[0] else (place[0], "middle")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
