"""The page's two tables: the best run of each context length by measure, and all numbers of all runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.panels import by_length, names_of
from longmix.reporting.results import is_gain
from longmix.reporting.runs import Run, measures_of, quality_of
from longmix.reporting.table import nats, share, speed

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
    known = [(number, run) for run in group if (number := measure.value(run)) is not None and math.isfinite(number)]
    if not known:
        return tag("span", "not measured", class_="next")
    ordered = sorted(known, key=lambda pair: -pair[0] if measure.more_is_better else pair[0])
    best = measure.words(ordered[0][0])
    if measure.more_is_better and float(ordered[0][0]) <= 0:
        return tag("span", f"none above {best}", class_="next")
    first = [run for number, run in ordered if measure.words(number) == best]
    won = tag("div", f"{best}{measure.unit}", class_="number")
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


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        name: its heading.
        value: the number of a run; None where there is none.
        words: how it is written.
        sense: 1 if large is good, -1 if small is, 0 if neither.
        missing: the cell of a run without a number.
    """

    name: str
    value: Callable[[Run], float | None]
    words: Callable[[float], str]
    sense: int
    missing: Markup | str = "-"


def figures_table(runs: list[Run], colours: dict[str, int]) -> Markup:
    """All runs with their numbers; the best of a context length in bold, with bars of their share of the largest."""
    names, columns, groups = names_of(runs), _columns(runs), by_length(runs)
    heads = [tag("th", "mixer", class_="left"), *(tag("th", column.name) for column in columns), tag("th", "causal")]
    rows = []
    for run in runs:
        group = groups[run.summary["seq_len"]]
        cells = [_name(run, names, colours), *(_cell(run, group, runs, column) for column in columns)]
        mark = f"mark c{colours[run.summary['mixer']]}"
        rows.append(tag("tr", *cells, _badge(run.evaluations.causal), class_=mark))
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", joined(rows)), class_="numbers")


def _columns(runs: list[Run]) -> list[Column]:
    quality = quality_of(runs)
    return [
        Column("context", lambda run: run.summary["seq_len"], "{:,}".format, 0),
        Column("parameters", lambda run: run.summary["parameters"]["total"], "{:,}".format, 0),
        Column("MFLOP/token", lambda run: run.summary["training_flops_per_token"] / 1e6, "{:,.1f}".format, -1),
        Column("tokens", lambda run: run.summary["tokens"], "{:,}".format, 0),
        Column(quality.unit, quality.of, quality.words, 1 if quality.more_is_better else -1),
        Column("tokens/s", lambda run: run.summary["tokens_per_second"], speed, 1),
        Column("peak GiB", Run.peak_gib, "{:.2f}".format, -1),
        *(_recall(measure) for measure in measures_of(runs) or ["recall"]),
    ]


def _recall(measure: str) -> Column:
    missing = tag("span", "not evaluated", class_="badge")
    words: Callable[[float], str] = nats if is_gain(measure) else share
    return Column(measure, lambda run: run.recalled(measure), words, 1, missing)


def _name(run: Run, names: dict[Path, str], colours: dict[str, int]) -> Markup:
    name = names[run.folder]
    return tag("td", tag("span", class_="dot"), name, class_=f"left c{colours[run.summary['mixer']]}", data_value=name)


def _cell(run: Run, group: list[Run], runs: list[Run], column: Column) -> Markup:
    number = column.value(run)
    if number is None or not math.isfinite(number):
        return tag("td", column.missing if number is None else str(number), data_value="")
    words = column.words(number)
    if not column.sense:
        return tag("td", words, data_value=number)
    rivals = [other for rival in group if (other := column.value(rival)) is not None and math.isfinite(other)]
    largest = max(other for rival in runs if (other := column.value(rival)) is not None and math.isfinite(other))
    best = max(rivals) if column.sense > 0 else min(rivals)
    shared = [other for other in rivals if column.words(other) == column.words(best)]
    wins = number == best and len(rivals) > len(shared) == 1
    part = max(0.0, number / largest) if largest > 0 else 0.0
    return tag("td", words, class_="bar best" if wins else "bar", style=f"--share:{part:.3f}", data_value=number)


def _badge(causal: bool | None) -> Markup:
    kind, words = {True: ("yes", "causal"), False: ("no", "LEAKS"), None: ("", "not audited")}[causal]
    return tag("td", tag("span", words, class_=f"badge {kind}".strip()), data_value=words)
