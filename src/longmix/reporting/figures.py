"""The page's table of all numbers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from longmix.reporting.evaluations import is_gain
from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.panels import by_length, names_of
from longmix.reporting.quality import quality_of
from longmix.reporting.runs import Run, measures_of
from longmix.reporting.table import nats, share, speed


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        name: its heading.
        value: the figure of a run; None where there is none.
        words: how it is written.
        sense: 1 if large is good, -1 if small is, 0 if neither.
        missing: the cell of a run without a figure.
    """

    name: str
    value: Callable[[Run], float | None]
    words: Callable[[float], str]
    sense: int
    missing: Markup | str = "-"


def figures_table(runs: list[Run], colours: dict[str, int]) -> Markup:
    """All runs with their figures; the best of a context length in bold, with bars of their share of the largest."""
    names, columns, groups = names_of(runs), _columns(runs), by_length(runs)
    heads = [tag("th", "mixer", class_="left"), *(tag("th", column.name) for column in columns), tag("th", "causal")]
    rows = []
    for run in runs:
        group = groups[run.summary["seq_len"]]
        cells = [_name(run, names, colours), *(_cell(run, group, runs, column) for column in columns)]
        mark = f"mark c{colours[run.summary['mixer']]}"
        rows.append(tag("tr", *cells, _badge(run.evaluations.causal), class_=mark))
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", joined(rows)), class_="figures")


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
    figure = column.value(run)
    if figure is None or not math.isfinite(figure):
        return tag("td", column.missing if figure is None else str(figure), data_value="")
    words = column.words(figure)
    if not column.sense:
        return tag("td", words, data_value=figure)
    rivals = [other for rival in group if (other := column.value(rival)) is not None and math.isfinite(other)]
    largest = max(other for rival in runs if (other := column.value(rival)) is not None and math.isfinite(other))
    best = max(rivals) if column.sense > 0 else min(rivals)
    shared = [other for other in rivals if column.words(other) == column.words(best)]
    wins = figure == best and len(rivals) > len(shared) == 1
    part = max(0.0, figure / largest) if largest > 0 else 0.0
    return tag("td", words, class_="bar best" if wins else "bar", style=f"--share:{part:.3f}", data_value=figure)


def _badge(causal: bool | None) -> Markup:
    kind, words = {True: ("yes", "causal"), False: ("no", "LEAKS"), None: ("", "not audited")}[causal]
    return tag("td", tag("span", words, class_=f"badge {kind}".strip()), data_value=words)
