"""The best run of each context length by quality, speed, memory and recall. A tie has no winner, and nor has zero."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longmix.reporting.evaluations import is_gain
from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.panels import by_length, names_of
from longmix.reporting.quality import quality_of
from longmix.reporting.runs import Run, measures_of
from longmix.reporting.table import share, speed

MOST_NAMES = 4
"""The most names of runs that share a first place."""


@dataclass(frozen=True)
class Measure:
    """A measure in which runs compete.

    Attributes:
        heading: of its column.
        value: of a run; None where there is none.
        words: how a value is written.
        unit: after the winner's value.
        more_is_better: large values win; zero never does.
    """

    heading: str
    value: Callable[[Run], float | None]
    words: Callable[[float], str]
    unit: str = ""
    more_is_better: bool = False


def verdicts(runs: list[Run], colours: dict[str, int]) -> tuple[Markup, int]:
    """Cells of a grid, a row for each context length; and how many measures there are.

    A model that sees later tokens has no loss that could win.
    """
    names, measures = names_of(runs), _measures(runs)
    cells = [
        tag("div", "context", class_="head"),
        *(tag("div", measure.heading, class_="head") for measure in measures),
    ]
    for length, group in by_length(runs).items():
        cells.append(tag("div", f"{length:,}", class_="length"))
        for measure in measures:
            heading = tag("div", measure.heading, class_="small")  # for a narrow page, which has no row of headings
            cells.append(tag("div", heading, _verdict(measure, group, names, colours)))
    return joined(cells), len(measures)


def _measures(runs: list[Run]) -> list[Measure]:
    quality = quality_of(runs)
    unit = "" if quality.key == "recall" else f" {quality.unit}"
    heading = "best recall" if quality.key == "recall" else "lowest loss"

    def of_quality(run: Run) -> float | None:
        return None if run.evaluations.causal is False else quality.of(run)

    def of_recall(measure: str) -> Callable[[Run], float | None]:
        return lambda run: run.recalled(measure)

    return [
        Measure(heading, of_quality, quality.words, unit, quality.more_is_better),
        Measure("fastest training", lambda run: run.summary["tokens_per_second"], speed, " tokens/s", True),
        Measure("least memory", Run.peak_gib, "{:.2f}".format, " GiB"),
        *(
            Measure(f"best recall, {measure}", of_recall(measure), share, "", True)
            for measure in measures_of(runs)
            if not is_gain(measure)
        ),
    ]


def _verdict(measure: Measure, group: list[Run], names: dict[Path, str], colours: dict[str, int]) -> Markup:
    """The winner and who comes next; all of those that share the first place; or why there is neither."""
    known = [(figure, run) for run in group if (figure := measure.value(run)) is not None and math.isfinite(figure)]
    if not known:
        return tag("span", "not measured", class_="next")
    ordered = sorted(known, key=lambda pair: -pair[0] if measure.more_is_better else pair[0])
    best = measure.words(ordered[0][0])
    if measure.more_is_better and float(ordered[0][0]) <= 0:
        return tag("span", f"none above {best}", class_="next")
    first = [run for figure, run in ordered if measure.words(figure) == best]
    won = tag("div", f"{best}{measure.unit}", class_="figure")
    if len(first) > 1:
        listed = ", ".join(names[run.folder] for run in first[:MOST_NAMES])
        more = f" and {len(first) - MOST_NAMES} more" if len(first) > MOST_NAMES else ""
        return joined([won, tag("div", f"a tie: {listed}{more}", class_="next")])
    winner = tag(
        "div", tag("span", class_="dot"), names[first[0].folder], class_=f"winner c{colours[first[0].summary['mixer']]}"
    )
    if len(ordered) == 1:
        return joined([winner, won])
    value, other = ordered[1]
    return joined([winner, won, tag("div", f"then {names[other.folder]}, {measure.words(value)}", class_="next")])
