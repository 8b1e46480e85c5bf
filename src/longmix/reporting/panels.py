"""The panels of a report, as data that `longmix.reporting.pictures` draws."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from longmix.reporting.results import is_gain
from longmix.reporting.runs import Curve, Run, measures_of, quality_of
from longmix.reporting.stages import borders, is_staged, tokens_at

ENOUGH_POINTS = 4
"""The fewest validations that make a curve; with fewer, training losses are shown."""

MAIN_MEASURES = ("average", "accuracy", "recall", "bits_per_byte", "loss")
"""The measure of a task that is shown is the first of these that it has."""

MOST_LENGTHS = 3
"""The most lengths of a task that have a panel."""

MOST_BORDERS = 12
"""The most borders of stages that a panel marks."""


@dataclass(frozen=True)
class Series:
    """One line, or one point of a scatter plot.

    Attributes:
        name: what tells it from the others of its panel.
        mixer: decides the colour.
        x, y: values.
    """

    name: str
    mixer: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        key: its file's name.
        section: the heading it stands under.
        title, x_label, y_label: words.
        series: at least one, none of them empty.
        kind: lines, or a point each.
        log_x: the horizontal axis doubles.
        from_zero: the vertical axis begins at 0, so that heights compare.
        best: of points, the best are joined, which are far right and low, or high.
        borders: where stages of its runs begin, on the horizontal axis.
    """

    key: str
    section: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: Literal["lines", "points"] = "lines"
    log_x: bool = False
    from_zero: bool = False
    best: Literal["low", "high"] | None = None
    borders: tuple[float, ...] = ()


def file_word(measure: str) -> str:
    """A measure's name as a part of a file name, made safe since results may name measures freely."""
    return re.sub(r"[^\w.=-]+", "_", measure.strip(), flags=re.ASCII)[:60].strip("_") or "measure"


def by_length(runs: list[Run]) -> dict[int, list[Run]]:
    """The runs of each context length, shortest first, in their order."""
    lengths = sorted({run.summary["seq_len"] for run in runs})
    return {length: [run for run in runs if run.summary["seq_len"] == length] for length in lengths}


def names_of(runs: list[Run]) -> dict[Path, str]:
    """By folder: the mixer where that tells a run from the others of its context length.

    Else the mixer and what the run's label says besides mixer, length and number, or the label where even that is none.
    """
    mixers = [(run.summary["mixer"], run.summary["seq_len"]) for run in runs]
    names = [
        run.summary["mixer"] if mixers.count(pair) == 1 else _with_settings(run)
        for run, pair in zip(runs, mixers, strict=True)
    ]
    pairs = [(name, run.summary["seq_len"]) for name, run in zip(names, runs, strict=True)]
    return {
        run.folder: name if pairs.count(pair) == 1 else run.label
        for run, name, pair in zip(runs, names, pairs, strict=True)
    }


def _with_settings(run: Run) -> str:
    """The mixer and the settings in a sweep's name, or the label of a run that has another name."""
    told = {f"mixer={run.summary['mixer']}", f"seq_len={run.summary['seq_len']}"}
    parts = [part for part in run.label.split(",") if part not in told and not part.isdecimal()]
    if not parts or not all("=" in part for part in parts):
        return run.label
    return " ".join([run.summary["mixer"], *parts])


def panels_of(runs: list[Run]) -> list[Panel]:
    """Every panel that the runs have data for, in the page's order."""
    panels = [*_trade_offs(runs), *_curves(runs), *_stages(runs), *_tasks(runs), *_positions(runs), *_costs(runs)]
    panels += [*_recall(runs), *_capacity(runs)]
    return [_as_points(panel) for panel in panels if panel.series]


def _as_points(panel: Panel) -> Panel:
    """Lines of one point each are points."""
    return replace(panel, kind="points") if all(len(series.x) == 1 for series in panel.series) else panel


def _series(runs: Iterable[Run], names: dict[Path, str], curve: Callable[[Run], Curve]) -> list[Series]:
    """A line per run, without values that are not numbers."""
    found = []
    for run in runs:
        points = [(x, y) for x, y in zip(*curve(run), strict=True) if math.isfinite(y)]
        if points:
            x, y = zip(*points, strict=True)
            found.append(Series(names[run.folder], run.summary["mixer"], list(x), list(y)))
    return found


def _trade_offs(runs: list[Run]) -> list[Panel]:
    names, quality = names_of(runs), quality_of(runs)
    return [
        Panel(
            f"trade_off_{length}",
            "What quality costs",
            f"at {length:,} tokens; best is {'high' if quality.more_is_better else 'low'} and far right",
            "training speed, tokens per second",
            f"validation, {quality.unit}",
            _series(group, names, lambda run: ([run.summary["tokens_per_second"]], [quality.of(run)])),
            kind="points",
            best="high" if quality.more_is_better else "low",
        )
        for length, group in by_length(runs).items()
        if len(group) > 1
    ]


def _curves(runs: list[Run]) -> list[Panel]:
    names, quality = names_of(runs), quality_of(runs)
    column = _learning_column(runs, quality.key)
    split, _, key = column.partition("/")
    unit = quality.unit if key == quality.key else "nats/token"

    def against_tokens(run: Run) -> Curve:
        steps, values = run.curve(column)
        return _tokens_at(run, steps), values

    def against_time(run: Run) -> Curve:
        steps, values = run.curve(column)
        return _seconds_at(run, steps), values

    return [
        Panel(
            f"loss_by_{key}_{length}",
            f"Learning, by {words}",
            f"at {length:,} tokens" + (", stages at their own" if any(is_staged(run.summary) for run in group) else ""),
            label,
            f"{split}, {unit}",
            _series(group, names, curve),
            borders=_borders(group, place),
        )
        for key, words, label, curve, place in (
            ("tokens", "tokens seen", "tokens trained on", against_tokens, _tokens_at),
            ("time", "seconds spent", "seconds in training steps", against_time, _seconds_at),
        )
        for length, group in by_length(runs).items()
    ]


def _tokens_at(run: Run, steps: Sequence[float]) -> list[float]:
    return [tokens_at(run.summary, step) for step in steps]


def _seconds_at(run: Run, steps: Sequence[float]) -> list[float]:
    logged, seconds = seconds_by_step(run)
    return [float(second) for second in np.interp(_tokens_at(run, steps), _tokens_at(run, logged), seconds)]


def _borders(runs: list[Run], place: Callable[[Run, Sequence[float]], list[float]]) -> tuple[float, ...]:
    """Where stages begin; nothing if they are too many to be told apart."""
    found = sorted({at for run in runs for at in place(run, borders(run.summary))})
    return tuple(found) if len(found) <= MOST_BORDERS else ()


def _stages(runs: list[Run]) -> list[Panel]:
    """The loss at the last stage's length over the whole run, with runs that had that length from the start."""
    names = names_of(runs)

    def curve(run: Run) -> Curve:
        steps, values = run.curve("validation_final/loss" if is_staged(run.summary) else "validation/loss")
        return _tokens_at(run, steps), values

    return [
        Panel(
            f"stages_{length}",
            "What stages bring",
            f"after each stage, at {length:,} tokens",
            "tokens trained on",
            "validation, nats/token",
            _series(group, names, curve),
        )
        for length, group in by_length(runs).items()
        if any(is_staged(run.summary) for run in group)
    ]


def _tasks(runs: list[Run]) -> list[Panel]:
    """What `loop.tasks` measured during training: of each task its main measure, at its first few lengths."""
    names = names_of(runs)
    columns = dict.fromkeys(column for run in runs for row in run.metrics for column in row)
    found: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for column in columns:
        task, *rest = column.split("/")
        if task == "task" and len(rest) == 3 and rest[2].isdecimal():
            found.setdefault(rest[0], {}).setdefault(rest[1], []).append((int(rest[2]), column))
    panels = []
    for name, measures in found.items():
        main = next((measure for measure in MAIN_MEASURES if measure in measures), next(iter(measures)))
        for length, column in sorted(measures[main])[:MOST_LENGTHS]:

            def curve(run: Run, column: str = column) -> Curve:
                steps, values = run.curve(column)
                return _tokens_at(run, steps), values

            series = _series(runs, names, curve)
            title = f"task {name} at {length:,} tokens"
            words = "tokens trained on", main.replace("_", " ")
            panels.append(
                Panel(f"{file_word(f'task_{name}')}_{length}", "Tasks during training", title, *words, series)
            )
    return panels


def _learning_column(runs: list[Run], key: str) -> str:
    """The metric to show as the learning curve: that of the validations if there are enough, else of the steps."""
    validations = [len(run.curve(f"validation/{key}")[0]) for run in runs]
    if min(validations) >= ENOUGH_POINTS:
        return f"validation/{key}"
    for column in (f"train/{key}", "train/loss"):
        points = [len(run.curve(column)[0]) for run in runs]
        if min(points) > min(validations) or (min(validations) < 2 and any(points)):
            return column
    return f"validation/{key}"


def seconds_by_step(run: Run) -> Curve:
    """Steps, and the seconds in training steps until then, as the logged speeds add up to them."""
    logged = zip(*run.curve("throughput/tokens_per_second"), strict=True)
    measured = [(step, rate) for step, rate in logged if rate > 0]
    steps, rates = [step for step, _ in measured], [rate for _, rate in measured]
    taken = np.diff([0.0, *_tokens_at(run, steps)])
    return [0.0, *steps], [0.0, *np.cumsum(taken / np.asarray(rates)).tolist()]


def _positions(runs: list[Run]) -> list[Panel]:
    names = names_of(runs)

    def curve(run: Run) -> Curve:
        rows = run.summary["validation_by_position"]
        return [row["end"] for row in rows], [row["loss"] for row in rows]

    return [
        Panel(
            f"loss_by_position_{length}",
            "What more context is worth",
            f"at {length:,} tokens",
            "tokens of context, up to",
            "validation, nats/token",
            _series(group, names, curve),
            log_x=True,
        )
        for length, group in by_length(runs).items()
    ]


def _costs(runs: list[Run]) -> list[Panel]:
    """Speed and memory against the context length; a mixer's runs of one length are averaged."""
    if len(by_length(runs)) < 2:
        return []

    def lines(value: Callable[[Run], float | None]) -> list[Series]:
        found = []
        for mixer in sorted({run.summary["mixer"] for run in runs}):
            means = {}
            for length, group in by_length(runs).items():
                known = [value(run) for run in group if run.summary["mixer"] == mixer]
                values = [value for value in known if value is not None]
                if values:
                    means[float(length)] = sum(values) / len(values)
            if means:
                found.append(Series(mixer, mixer, list(means), list(means.values())))
        return found

    return [
        Panel(
            key, "What context costs", title, "context length, tokens", label, lines(value), log_x=True, from_zero=True
        )
        for key, title, label, value in (
            ("speed", "training speed", "tokens per second", lambda run: run.summary["tokens_per_second"]),
            ("memory", "peak memory in training", "GiB", lambda run: run.peak_gib()),
        )
    ]


def _recall(runs: list[Run]) -> list[Panel]:
    names = names_of(runs)
    lengths = by_length(runs)

    def curve(measure: str) -> Callable[[Run], Curve]:
        def of(run: Run) -> Curve:
            values = run.evaluations.recall.get(measure, {})
            return list(values), list(values.values())

        return of

    return [
        Panel(
            f"recall_{file_word(measure)}_{length}",
            "Recall",
            measure if len(lengths) == 1 else f"{measure}, trained at {length:,} tokens",
            "context length, tokens",
            "nats that the needle adds" if is_gain(measure) else "share of targets met",
            _series(group, names, curve(measure)),
            log_x=True,
            from_zero=True,
        )
        for measure in measures_of(runs)
        for length, group in lengths.items()
    ]


def _capacity(runs: list[Run]) -> list[Panel]:
    """Recall at the trained length against the size of the state there: a line for each mixer."""

    def lines(measure: str, group: list[Run]) -> list[Series]:
        points: dict[str, list[tuple[float, float]]] = {}
        for run in group:
            remembered = run.evaluations.state_bytes.get(measure, {}).get(run.summary["seq_len"])
            if remembered:
                recalled = run.evaluations.recall[measure][run.summary["seq_len"]]
                points.setdefault(run.summary["mixer"], []).append((float(remembered), recalled))
        ordered = {mixer: zip(*sorted(found), strict=True) for mixer, found in sorted(points.items())}
        return [Series(mixer, mixer, list(x), list(y)) for mixer, (x, y) in ordered.items()]

    return [
        Panel(
            f"capacity_{file_word(measure)}_{length}",
            "Recall",
            f"{measure} at {length:,} tokens, by state",
            "bytes of a row's state",
            "share of targets met",
            lines(measure, group),
            log_x=True,
            from_zero=True,
        )
        for measure in measures_of(runs)
        for length, group in by_length(runs).items()
        if len(group) > 1
    ]
