"""The plots of longmix in one style: SVG on pages, PNG everywhere else."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Formatter, LogLocator, NullLocator

from longmix.files import replace_file
from longmix.printable import printable
from longmix.reporting.labels import EndNames, short
from longmix.reporting.style import INK, PAPER, RULE, SOFT, Style, nth_style

Curve = tuple[Sequence[float], Sequence[float]]

WIDTH, HEIGHT = 400, 280
"""Width and height of a panel in points."""

CELL, AROUND = 30, 80
"""Height in points of a cell, and of everything above and below the axes."""

PAD = 6
"""Space around a panel in points."""

DPI = 144
"""Pixels of a PNG for each 72 points."""

TITLE_LETTERS = 48
"""The most letters of a line of a panel's title."""

MANY_POINTS = 24
"""The most points of a line that all have markers; on longer lines only the last has one."""

MOST_TICKS, MOST_CHARACTERS = 9, 24
"""The most ticks on an axis that doubles, and of their labels, each with the space behind it."""

UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
"""Units of ticks and the size from which each is used; thousands begin at ten thousand."""

LIGHT_CELL = 0.4
"""Luminance from which on the number in a cell is written dark."""

SETTINGS: Any = {
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.scale_dashes": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "longmix",  # the same picture has the same ids
} | {f"axes.spines.{side}": False for side in ("left", "top", "right")}


@contextmanager
def drawing() -> Iterator[None]:
    """The settings in which figures are made, drawn and saved; also a decorator. Others' figures keep theirs."""
    with matplotlib.rc_context(SETTINGS):
        yield


def plain(text: str) -> str:
    """Text of a picture: control characters, and letters that no XML may hold, are shown."""
    return "".join(letter if letter not in "\ufffe\uffff" else "\ufffd" for letter in printable(text))


def balanced(count: int, most: int) -> list[int]:
    """Sizes of as few rows as hold `count` panels, `most` or fewer in each; no row is more than one shorter."""
    rows = -(-count // most)
    return [count // rows + (row < count % rows) for row in range(rows)] if count else []


def new_figure(
    panels: int, columns: int = 3, width: float = WIDTH, height: float = HEIGHT, title: str = "", footer: float = 0
) -> tuple[Figure, list[Axes]]:
    """A figure of as many panels, of a width and height in points, in rows of at most `columns` without empty cells.

    `footer` is the height below them that stays free for what they share: the last of the figure's `subfigs`.
    """
    sizes = balanced(panels, columns)
    heights = [height] * len(sizes) + [footer] * (footer > 0)
    lines = title.count("\n") + 1 if title else 0
    across = max(sizes) * width
    layout = ConstrainedLayoutEngine(w_pad=PAD / 72, h_pad=PAD / 72)
    figure = Figure(figsize=(across / 72, (sum(heights) + 16 * lines) / 72), layout=layout)
    if title:
        figure.suptitle(_lines(title), fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    if len(set(sizes)) == 1 and not footer:
        return figure, list(figure.subplots(len(sizes), sizes[0], squeeze=False).flat)
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    parts = [row.subplots(1, size, squeeze=False) for row, size in zip(rows, sizes, strict=False)]
    return figure, [axes for part in parts for axes in part.flat]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG in one step, so that no half picture replaces a whole one.

    Raises:
        StorageError: it cannot be written.
    """
    with drawing():
        lay_out(figure)
        words: Any = {"dpi": DPI, "format": "png", "metadata": {"Software": None}}
        replace_file(path, lambda temporary: figure.savefig(temporary, **words))
    return path


def lay_out(figure: Figure) -> None:
    """Lay out a figure once; matplotlib itself would do it twice whenever a figure is saved."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _lines(text: str) -> str:
    return "\n".join(map(plain, text.split("\n")))


def set_title(axes: Axes, title: str) -> None:
    """A title at the left, in lines that stay within the panel."""
    axes.set_title("\n".join(part for line in title.split("\n") for part in textwrap.wrap(plain(line), TITLE_LETTERS)))


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    styles: Sequence[Style] | None = None,
    marks: Sequence[str] | None = None,
    names: bool = True,
) -> list[Line2D]:
    """One line per entry of `curves`, a pair of x and y values, with its name at its end.

    Args:
        axes: where to draw.
        curves: by name; without a point one keeps its place in the order of colours.
        title, x_label, y_label: texts.
        log_x: the horizontal axis doubles.
        log_y: the vertical axis is logarithmic.
        styles: one for each curve; None takes them in their order.
        marks: ids in an SVG, likewise.
        names: write them where there are several.

    Returns:
        the lines.
    """
    lines = []
    for index, (x, y) in enumerate(curves.values()):
        style = nth_style(index) if styles is None else styles[index]
        (line,) = axes.plot(x, y, color=style.light, clip_on=False, gid=None if marks is None else marks[index])
        line.set_linestyle((0, style.dash) if style.dash else "solid")
        line.set_marker(style.marker)
        line.set_markersize(4)
        line.set_markevery(1 if len(x) <= MANY_POINTS else [len(x) - 1])
        lines.append(line)
    shown = [(line, name) for line, name in zip(lines, curves, strict=True) if len(line.get_xdata())]  # type: ignore[arg-type]
    if names and len(curves) > 1 and shown:
        EndNames(axes, [line for line, _ in shown], [plain(name) for _, name in shown])
    if log_x:
        doubling_axis(axes, [value for x, _ in curves.values() for value in x])
    else:
        axes.xaxis.set_major_formatter(Rounded())
    if log_y:
        decimal_axis(axes)
    else:
        axes.yaxis.set_major_formatter(Rounded())
    set_title(axes, title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(plain(y_label))
    return lines


class Rounded(Formatter):
    """Ticks in the same unit, such as 2.5k and 10k."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """One tick by itself."""
        return tick_labels([value])[0]

    def format_ticks(self, values: Any) -> list[str]:
        """All ticks of an axis."""
        return tick_labels([float(value) for value in values])


def doubling_axis(axes: Axes, values: Sequence[float]) -> None:
    """Powers of two on the horizontal axis; values that are not above 0 keep it linear."""
    axes.xaxis.set_major_formatter(Rounded())
    if values and min(values) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(doubling_ticks(values)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(Rounded())


def decimal_axis(axes: Axes) -> None:
    """A logarithmic vertical axis with 1, 2 and 5 where it spans less than three decades, else powers of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    near = high < 1000 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: tick_labels([value])[0])


def decimal_axis_below(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis with few ticks: labels that are side by side need more room than above each other.

    Args:
        axes: where it is.
        values: the positive numbers that are drawn.
    """
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(decimal_ticks(min(values), max(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: tick_labels([value])[0])


def decimal_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 between two, or powers of ten over three decades; without two such, these two, rounded."""
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]
    return ticks if len(ticks) >= 2 else sorted({float(f"{value:.2g}") for value in (low, high)})


def doubling_ticks(values: Sequence[float]) -> list[float]:
    """Powers of two among some values, as many as there is room for; the values where fewer than two lie there."""
    low, high = math.ceil(math.log2(min(values)) - 1e-9), math.floor(math.log2(max(values)) + 1e-9)
    powers = [2.0**power for power in range(low, high + 1)]
    ticks = powers if len(powers) >= 2 else sorted(set(values))
    width = sum(len(label) + 1 for label in tick_labels(ticks))
    return ticks[:: max(-(-len(ticks) // MOST_TICKS), -(-width // MOST_CHARACTERS))]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks as text, all in the same unit but for powers of two, which are 512, 1k, 2k, up to 512k, 1M."""
    if all(tick >= 1 and math.log2(tick).is_integer() for tick in ticks):
        units = ((2**30, "G"), (2**20, "M"), (2**10, "k"), (1, ""))
        return [next(f"{tick / size:g}{letter}" for size, letter in units if tick >= size) for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    size, letter = next(
        ((min(size, 1e3 if letter == "k" else size), letter) for size, letter in UNITS if largest >= size), (1.0, "")
    )
    return [f"{tick / size:,.10g}{letter if tick else ''}".replace("-", "\u2212") for tick in ticks]


def draw_cells(
    axes: Axes,
    grid: np.ndarray,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    limits: tuple[float, float],
    colours: str,
    words: Sequence[Sequence[str]],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Numbers [rows, columns] as coloured cells, the first row at the top, with text in each that can be read there.

    Args:
        axes: where to draw.
        grid: the numbers.
        columns, rows: their names.
        limits: which numbers the first and the last colour stand for.
        colours: name of a colour map that people who see few hues can read, such as viridis or RdBu.
        words: the texts, as the numbers are laid out.
        title, x_label, y_label: texts.
    """
    mesh = axes.pcolormesh(grid, vmin=limits[0], vmax=limits[1], cmap=colours, edgecolors=PAPER, linewidth=1.5)
    mesh.set_clip_on(False)
    for (row, column), number in np.ndenumerate(grid):
        red, green, blue, _ = mesh.cmap(mesh.norm(number))
        dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 >= LIGHT_CELL**2
        text: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": 10.5,
            "color": "#111111" if dark else "#ffffff",
        }
        axes.text(column + 0.5, row + 0.5, words[row][column], **text)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([index + 0.5 for index in range(len(columns))], [_lines(name) for name in columns])
    axes.set_yticks([index + 0.5 for index in range(len(rows))], [plain(short(name)) for name in rows])
    set_title(axes, title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def draw_needles(
    axes: Axes,
    grid: np.ndarray,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    title: str = "",
    limits: tuple[float, float] = (0.0, 1.0),
    colours: str = "viridis",
    trained_seq_len: int,
) -> None:
    """Numbers [depths, lengths] of needles; a line divides lengths trained at from longer ones.

    Args:
        axes: where to draw.
        grid: the numbers.
        lengths: tokens of context, shortest first.
        depths: from the first token of the context, 0, to the last one, 1.
        title: above it.
        limits: which numbers the first and the last colour stand for.
        colours: name of a colour map.
        trained_seq_len: tokens of a training window.
    """
    draw_cells(
        axes,
        grid,
        columns=tick_labels(lengths),
        rows=[f"{depth:g}" for depth in depths],
        limits=limits,
        colours=colours,
        words=[[f"{number:.2f}" for number in row] for row in grid],
        title=title,
        x_label=f"tokens of context; trained at {trained_seq_len:,}",
        y_label="depth",
    )
    border = sum(length <= trained_seq_len for length in lengths)
    axes.axvline(border, color=PAPER, linewidth=5, clip_on=False)
    axes.axvline(border, color=INK, linestyle=(0, (4, 3)), linewidth=1.5, clip_on=False)


def draw_trained(axes: Axes, length: float) -> None:
    """A named vertical line at the trained length."""
    axes.axvline(length, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    height = _free_height(axes, length)
    name = axes.annotate(
        "trained", (length, height), (4, 0), axes.get_xaxis_transform(), "offset points", va="top", color=SOFT
    )
    name.set_bbox({"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.5})


def _free_height(axes: Axes, x: float, width: float = 0.35, height: float = 0.12) -> float:
    """The upper end, in parts of the axes, of the highest room right of `x` that no curve crosses, or the freest one.

    Limits and scales of the axes must be what they will be.
    """
    to_parts = axes.transData + axes.transAxes.inverted()
    left = float(to_parts.transform((x, axes.get_ylim()[0]))[0])
    places = np.linspace(left - 0.02, left + width, 60)
    crossed = [np.array([np.inf])]
    for line in axes.lines:
        points = to_parts.transform(line.get_xydata())
        points = points[np.isfinite(points).all(1)]
        if len(points) > 1 and line.get_transform() == axes.transData:
            inside = places[(places >= points[:, 0].min()) & (places <= points[:, 0].max())]
            crossed.append(np.interp(inside, points[:, 0], points[:, 1]))
    curves = np.concatenate(crossed)
    tops = np.linspace(1, height, 12)
    clearances = [np.abs(curves - (top - height / 2)).min() for top in tops]
    free = [top for top, clearance in zip(tops, clearances, strict=True) if clearance > height / 2]
    return float(free[0] if free else tops[np.argmax(clearances)])


def draw_borders(axes: Axes, places: Sequence[float]) -> None:
    """Vertical lines where stages of a run begin; the first one is named."""
    for number, place in enumerate(places):
        axes.axvline(place, color=SOFT, linestyle=(0, (2, 3)), linewidth=1, zorder=1)
        if number == 0:
            name = axes.annotate(
                "stage", (place, 1), (4, -2), axes.get_xaxis_transform(), "offset points", va="top", color=SOFT
            )
            name.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.5})


def draw_legend(subfigure: SubFigure, names: Mapping[str, Style], width: float) -> None:
    """The one legend of a figure, in rows as wide as it."""
    handles = [
        Line2D([], [], color=style.light, marker=style.marker, markersize=5, linestyle=(0, style.dash or (1, 0)))
        for style in names.values()
    ]
    subfigure.legend(
        handles, [plain(short(name)) for name in names], ncols=legend_columns(names, width), loc="center", borderpad=0
    )


def legend_columns(names: Mapping[str, Style], width: float) -> int:
    """The number of columns for which the longest name leaves room."""
    longest = max((len(short(name)) for name in names), default=1)
    return max(1, min(len(names), int(width / (7 * longest + 50))))
