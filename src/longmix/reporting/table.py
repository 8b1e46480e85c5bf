"""The runs as a table for a terminal of 80 columns and more."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from longmix.printable import printable
from longmix.reporting.results import is_gain
from longmix.reporting.runs import Run, measures_of, quality_of

LONGEST_NAME, FOLDED_NAME = 44, 24
"""Longer names of runs are folded to give other columns room; width of a folded name."""

CAUSAL = {True: "yes", False: "LEAKS", None: "-"}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: its heading.
        cells: one for each run.
        expendable: which go first where there is no room: the highest.
        left: the cells begin at the left.
    """

    name: str
    cells: list[str]
    expendable: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        """Letters of the longest cell, or of the heading."""
        return max(map(cell_len, [self.name, *self.cells]))


def table(runs: list[Run], width: int) -> tuple[Table, list[str]]:
    """The runs, best first, in a table of at most `width` letters; and notes: what all share, what had no room."""
    columns, shared = _columns(runs)
    left_out = []
    while _width(columns) > width and any(column.expendable for column in columns):
        last = max(columns, key=lambda column: column.expendable)
        columns.remove(last)
        left_out.append(last.name)
    result = Table(title="runs, best validation first", title_justify="left")
    for column in columns:
        justify, overflow = ("left", "fold") if column.left else ("right", "ellipsis")
        result.add_column(Text(column.name), justify=justify, overflow=overflow, no_wrap=not column.left)  # type: ignore[arg-type]
    for number in range(len(runs)):
        result.add_row(*(Text(column.cells[number]) for column in columns))
    notes = [f"all runs: {', '.join(shared)}"] if shared else []
    notes += [f"no room here for {', '.join(left_out)}: see runs.csv"] if left_out else []
    return result, notes


def _width(columns: list[Column]) -> int:
    """The width of the table when names are folded as far as allowed."""
    widths = [FOLDED_NAME if column.left and column.width > LONGEST_NAME else column.width for column in columns]
    return sum(widths) + 3 * len(columns) + 1


def _columns(runs: list[Run]) -> tuple[list[Column], list[str]]:
    quality = quality_of(runs)
    columns = [
        Column("run", [printable(run.label) for run in runs], left=True),
        *([] if _names_say(runs, "mixer") else [Column("mixer", [printable(run.summary["mixer"]) for run in runs], 1)]),
    ]
    shared = []
    for name, expendable, of, form in (
        ("seq_len", 0, lambda run: run.summary["seq_len"], "{:,} tokens of context"),
        ("parameters", 3, lambda run: run.summary["parameters"]["total"], "{:,} parameters"),
        ("tokens", 6, lambda run: run.summary["tokens"], "{:,} tokens trained on"),
    ):
        values = [of(run) for run in runs]
        if name == "seq_len" and _names_say(runs, "seq_len"):
            continue
        if len(set(values)) == 1 and len(runs) > 1:
            shared.append(form.format(values[0]))
        else:
            columns.append(Column(name, [f"{value:,}" for value in values], expendable))
    columns.append(_numbers(quality.unit, runs, quality.of, quality.words))
    if quality.key != "loss":
        columns.append(_numbers("loss", runs, lambda run: run.summary["validation"]["loss"], "{:.3f}".format, 7))
    columns.append(_numbers("tokens/s", runs, lambda run: run.summary["tokens_per_second"], speed, 2))
    columns.append(_numbers("seconds", runs, lambda run: run.summary["training_seconds"], speed, 8))
    columns.append(_numbers("peak GiB", runs, Run.peak_gib, "{:.2f}".format, 5))
    columns.extend(_recall(measure, runs) for measure in measures_of(runs))
    if any(run.evaluations.causal is not None for run in runs):
        columns.append(Column("causal", [CAUSAL[run.evaluations.causal] for run in runs], 3))
    return columns, shared


def _numbers(
    name: str, runs: list[Run], of: Callable[[Run], float | None], form: Callable[[float], str], expendable: int = 0
) -> Column:
    values = [of(run) for run in runs]
    cells = ["-" if value is None or not math.isfinite(value) else form(value) for value in values]
    return Column(name, cells, expendable)


def _recall(measure: str, runs: list[Run]) -> Column:
    form: Callable[[float], str] = (lambda value: f"{nats(value)} nats") if is_gain(measure) else share
    return _numbers(printable(measure), runs, lambda run: run.recalled(measure), form, 4 + is_gain(measure))


def _names_say(runs: list[Run], key: str) -> bool:
    """Whether every run's name has a setting, as those of a sweep have."""
    return all(f"{key}={run.summary[key]}" in run.label.split(",") for run in runs)


def speed(value: float) -> str:
    """A number without decimals where it is large."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def nats(value: float) -> str:
    """A gain with its sign; zero has none."""
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"
