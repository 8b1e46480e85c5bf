"""Needles found by depth and length of context as SVG, a small map for each run; the page lays them side by side.

A cell is the darker in its mixer's colour, the more needles were found there.
"""

from longmix.reporting.evaluations import NEEDLE, NeedleMap
from longmix.reporting.markup import Attribute, Markup, joined, tag
from longmix.reporting.panels import names_of
from longmix.reporting.runs import Run

WIDTH, CELL = 320, 32
LEFT, TOP, RIGHT, BOTTOM = 40, 6, 6, 38
LENGTH_WIDTH = 48
"""Pixels of a length below its column."""
DARK = 0.65
"""From which share on the figure is written in the page's colour."""


def found_needles(runs: list[Run]) -> list[tuple[str, Run, NeedleMap, str]]:
    """Name, run, map and measure of all that `task=needle` found, by measure and then in the order of the runs."""
    names = names_of(runs)
    measures = list(dict.fromkeys(measure for run in runs for measure in run.evaluations.needles))
    return [
        (names[run.folder], run, run.evaluations.needles[measure], measure)
        for measure in measures
        for run in runs
        if measure in run.evaluations.needles
    ]


def section(runs: list[Run], colours: dict[str, int]) -> Markup:
    """The page's section of heat maps; empty where no run has one."""
    maps = found_needles(runs)
    if not maps:
        return Markup("")
    figures = [
        tag(
            "figure",
            tag("h3", name if measure == NEEDLE else f"{name}: {measure}"),
            draw(name, needle),
            class_=f"mark c{colours[run.summary['mixer']]}",
            data_mixer=run.summary["mixer"],
        )
        for name, run, needle, measure in maps
    ]
    words = (
        "Share of hidden facts that are found, by their depth, from the first token (0) to the question (1), and by "
        "the length of the context. The line ends the lengths that were trained."
    )
    return joined(
        [tag("h2", "Needles found"), tag("p", words, class_="soft"), tag("div", joined(figures), class_="maps")]
    )


def draw(name: str, needle: NeedleMap) -> Markup:
    """One map as an `<svg>` element."""
    width = (WIDTH - LEFT - RIGHT) / len(needle.lengths)
    bottom = TOP + CELL * len(needle.depths)
    parts = []
    for row, depth in enumerate(needle.depths):
        middle = TOP + CELL * (row + 0.5) + 4
        parts.append(tag("text", f"{depth:g}", class_="tick", x=LEFT - 8, y=f"{middle:.1f}", text_anchor="end"))
        for column, length in enumerate(needle.lengths):
            share, gain = needle.accuracy[row][column], needle.gain[row][column]
            words = f"{length:,} tokens, depth {depth:g}: {share:.0%} of {needle.needles}, {gain:+.1f} nats"
            place: dict[str, Attribute] = {
                "x": f"{LEFT + width * column:.1f}",
                "y": TOP + CELL * row,
                "width": f"{width:.1f}",
                "height": CELL,
            }
            parts.append(tag("rect", tag("title", words), class_="cell", fill_opacity=f"{share:.3f}", **place))
            kind = "share over" if share >= DARK else "share"
            x = f"{LEFT + width * (column + 0.5):.1f}"
            parts.append(tag("text", f"{share:.2f}", class_=kind, x=x, y=f"{middle:.1f}"))
    every = -(-len(needle.lengths) * LENGTH_WIDTH // (WIDTH - LEFT - RIGHT))  # of the lengths there is room for
    for column, length in enumerate(needle.lengths):
        if (len(needle.lengths) - 1 - column) % every == 0:
            x = f"{LEFT + width * (column + 0.5):.1f}"
            parts.append(tag("text", f"{length:,}", class_="tick", x=x, y=bottom + 16, text_anchor="middle"))
    trained = f"{LEFT + width * sum(length <= needle.trained_seq_len for length in needle.lengths):.1f}"
    parts.append(tag("line", class_="trained", x1=trained, x2=trained, y1=TOP - 4, y2=bottom + 4))
    middle_x = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", "tokens of context", class_="axis", x=middle_x, y=bottom + 33))
    box = f"0 0 {WIDTH} {bottom + BOTTOM}"
    return tag("svg", joined(parts), viewBox=box, role="img", aria_label=f"{name}: needles found")
