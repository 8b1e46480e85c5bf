"""Names inside pictures, at the ends of lines or beside points, without overlap.

They find their places whenever they are drawn, so that they fit any size and any layout.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

LONGEST_NAME = 26
"""The most letters of a name in a picture."""

GAP, LEADER = 3.0, 14.0
"""Points between names, and between the axes and the names of lines."""

RADIUS = 5.0
"""Distance, in points, that names keep from the middle of a data point."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""A box: left, bottom, right, top."""


def short(name: str, most: int = LONGEST_NAME) -> str:
    """A name with at most so many letters: beginning and end, which tell runs of a sweep apart."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2]}\u2026{name[len(name) - (most - 1) // 2 :]}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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
        for number, index in enumerate(group):
            found[index] = first_place(group) + gap * number
    return found


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


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def free_box(
    point: Point, size: Point, clear: float, inside: Box, taken: list[Box], strokes: list[tuple[Point, Point]]
) -> Box:
    """The box of a name nearest to its point that touches no taken box and no stroke.

    Without a free box, the one right of the point.
    """
    width, height = size
    across, along = clear + width / 2, height
    beside = [(across, 0.0), (-across, 0.0), (0.0, along), (0.0, -along), (across + clear, 0.0), (-across - clear, 0.0)]
    corners = [(side * across, up * along * far) for far in range(1, 7) for up in (1, -1) for side in (1, -1, 0)]
    boxes = []
    for right, up in (*beside, *corners):
        x, y = min(max(point[0] + right, inside[0] + width / 2), inside[2] - width / 2), point[1] + up
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        fits = box[1] >= inside[1] and box[3] <= inside[3]
        if fits and not any(overlap(box, b) for b in taken) and not any(crosses(box, *stroke) for stroke in strokes):
            return box
        boxes.append(box)
    return boxes[0]


class _Names(Artist):
    """Texts and the strokes that lead to them, in pixels; subclasses place them."""

    def __init__(self, axes: Axes, lines: Sequence[Line2D], names: Sequence[str]) -> None:
        super().__init__()
        self.home, self.lines = axes, list(lines)
        self.texts = [Text(0, 0, short(name), va="center", weight="bold") for name in names]
        self.strokes = [Line2D([], [], linewidth=0.9, alpha=0.5) for _ in lines]
        axes.add_artist(self)
        self.set_clip_on(False)
        self.set_zorder(4)
        for line, *parts in zip(self.lines, self.texts, self.strokes, strict=True):
            part: Any
            for part in parts:
                part.set_figure(axes.figure)
                part.set_transform(IdentityTransform())
                part.set_color(line.get_color())
                part.set_gid(line.get_gid())

    @property
    def scale(self) -> float:
        """Pixels of a point."""
        return self.home.figure.dpi / 72

    def sizes(self, renderer: Any) -> list[Point]:
        """Width and height of every text in pixels."""
        boxes = [text.get_window_extent(renderer) for text in self.texts]
        return [(box.width, box.height) for box in boxes]

    def pixels(self, line: Line2D) -> list[Point]:
        """The points of a line in pixels."""
        return [(x, y) for x, y in self.home.transData.transform(line.get_xydata()).tolist()]

    def ends(self) -> list[Point]:
        """The last point of every line in pixels."""
        return [self.pixels(line)[-1] for line in self.lines]

    def place(self, renderer: Any) -> None:
        """Set the places of all parts."""
        raise NotImplementedError

    def draw(self, renderer: Any) -> None:
        """Place and draw all parts."""
        self.place(renderer)
        for part in (*self.strokes, *self.texts):
            part.draw(renderer)

    def get_tightbbox(self, renderer: Any = None) -> Bbox:
        """The room that the layout reserves: none, as names stand within the axes."""
        return self.home.bbox


class EndNames(_Names):
    """Names right of the axes, each beside the end of its line."""

    def place(self, renderer: Any) -> None:
        """Names in one column, as near to the heights of the ends as they can be."""
        ends, box, scale = self.ends(), self.home.bbox, self.scale
        height = max(size[1] for size in self.sizes(renderer)) + 2 * scale
        heights = spread([y for _, y in ends], height, box.y0 + height / 2, box.y1)
        column = box.x1 + LEADER * scale
        for text, stroke, (x, y), up in zip(self.texts, self.strokes, ends, heights, strict=True):
            text.set_position((column, up))
            stroke.set_data([x + 4 * scale, column - 2 * scale], [y, up])

    def get_tightbbox(self, renderer: Any = None) -> Bbox:
        """The room that the layout reserves: the width of the names."""
        box, width = self.home.bbox, max(size[0] for size in self.sizes(renderer))
        return Bbox.from_extents(box.x0, box.y0, box.x1 + LEADER * self.scale + width, box.y1)


class PointNames(_Names):
    """Names of lines of one point each, beside the points; `front` joins some of them."""

    def __init__(self, axes: Axes, lines: Sequence[Line2D], names: Sequence[str], front: Line2D | None) -> None:
        super().__init__(axes, lines, names)
        self.front = front

    def place(self, renderer: Any) -> None:
        """Names where there is room, the highest points first; a stroke leads to one that stands far off."""
        ends, clear = self.ends(), RADIUS * self.scale
        front = list(pairwise([] if self.front is None else self.pixels(self.front)))
        taken = [(x - clear, y - clear, x + clear, y + clear) for x, y in ends]
        parts = zip(ends, self.sizes(renderer), self.texts, self.strokes, strict=True)
        for (x, y), size, text, stroke in sorted(parts, key=lambda part: -part[0][1]):
            box = free_box((x, y), size, clear + GAP * self.scale, self.home.bbox.extents, taken, front)
            taken.append(box)
            middle = (box[1] + box[3]) / 2
            side: Any = "left" if box[0] > x else "right" if box[2] < x else "center"
            near = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2}[side]
            text.set_position((near, middle))
            text.set_horizontalalignment(side)  # the near side stays fixed, whatever the width of letters
            stroke.set_data(([x, near], [y, middle]) if abs(middle - y) > 2 * size[1] else ([], []))
