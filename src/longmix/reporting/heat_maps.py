"""Needles found by depth and length of context as SVG, a small map for each run; the page lays them side by side.

A cell is the darker in its mixer's colour, the more needles were found there.
"""

from html import escape

from longmix.reporting.evaluations import NeedleMap
from longmix.reporting.panels import names_of
from longmix.reporting.runs import Run

WIDTH, CELL = 300, 30
LEFT, TOP, RIGHT, BOTTOM = 40, 6, 6, 38
DARK = 0.65
"""From which share on the figure is written in the page's colour."""


def found_needles(runs: list[Run]) -> list[tuple[str, Run, NeedleMap]]:
    """Name, run and map of every run that `task=needle` has evaluated, in the order of the runs."""
    names = names_of(runs)
    return [(names[run.folder], run, run.evaluations.needle) for run in runs if run.evaluations.needle is not None]


def section(runs: list[Run], colours: dict[str, int]) -> str:
    """The page's section of heat maps; empty where no run has one."""
    maps = found_needles(runs)
    if not maps:
        return ""
    figures = "\n".join(
        f'<figure class="mark c{colours[run.summary["mixer"]]}" data-mixer="{escape(run.summary["mixer"])}">'
        f"<h3>{escape(name)}</h3>{draw(name, needle)}</figure>"
        for name, run, needle in maps
    )
    return (
        "<h2>Needles found</h2>\n"
        '<p class="soft">Share of hidden facts that are found, by their depth, from the first token (0) to the '
        "question (1), and by the length of the context. The line ends the lengths that were trained.</p>\n"
        f'<div class="maps">{figures}</div>'
    )


def draw(name: str, needle: NeedleMap) -> str:
    """One map as an `<svg>` element."""
    width = (WIDTH - LEFT - RIGHT) / len(needle.lengths)
    bottom = TOP + CELL * len(needle.depths)
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(name)}: needles found">']
    for row, depth in enumerate(needle.depths):
        middle = TOP + CELL * (row + 0.5) + 4
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{depth:g}</text>')
        for column, length in enumerate(needle.lengths):
            share, gain = needle.accuracy[row][column], needle.gain[row][column]
            left = LEFT + width * column
            words = f"{length:,} tokens, depth {depth:g}: {share:.0%} of {needle.needles}, {gain:+.1f} nats"
            parts.append(
                f'<rect class="cell" x="{left:.1f}" y="{TOP + CELL * row}" width="{width:.1f}" height="{CELL}" '
                f'fill-opacity="{share:.3f}"><title>{escape(words)}</title></rect>'
            )
            kind = "share over" if share >= DARK else "share"
            parts.append(f'<text class="{kind}" x="{left + width / 2:.1f}" y="{middle:.1f}">{share:.2f}</text>')
    for column, length in enumerate(needle.lengths):
        middle = LEFT + width * (column + 0.5)
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{bottom + 16}" text-anchor="middle">{length:,}</text>')
    trained = LEFT + width * sum(length <= needle.trained_seq_len for length in needle.lengths)
    parts.append(f'<line class="trained" x1="{trained:.1f}" x2="{trained:.1f}" y1="{TOP - 4}" y2="{bottom + 4}"/>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 33}">tokens of context</text>')
    return "\n".join([*parts, "</svg>"])
