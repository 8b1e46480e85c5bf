"""A run's results: its `summary.json`, and what `evaluate.py` found beside it. Both are checked before use.

Results on other data than the run was trained on, of another split, of averaged weights or with other settings of the
mixer are measures of their own: their names say so.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from longmix.config import flattened
from longmix.files import sha256_of_file
from longmix.reading import read_json
from longmix.reporting.cache_cells import CacheCell, checked_cells

LARGEST = 2.0**62
"""The largest number that a summary may hold."""


class Unfinished(Exception):
    """The run has no results of its end yet."""


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        Unfinished: there is none, or it has no results of the last validation.
        OSError, ValueError: it cannot be read, or lacks what every summary has; says what.
    """
    path = folder / "summary.json"
    if not path.exists() and not path.is_symlink():
        raise Unfinished
    summary = read_json(path)
    if summary.get("validation") == {}:  # the last validation was cut short
        raise Unfinished
    check_summary(summary)
    steps, validated = summary.get("steps"), summary["validation"].get("step")
    if isinstance(steps, int) and isinstance(validated, int) and validated < steps:
        raise Unfinished
    return summary


def check_summary(summary: dict[str, Any]) -> None:
    """Refuse a summary that lacks a number or has one of a wrong kind.

    Raises:
        ValueError: names the first such number.
    """
    mixer = summary.get("mixer")
    if not isinstance(mixer, str) or not mixer:
        raise ValueError(f"its mixer is {_shown(mixer)}, which is no name")
    number(summary, "seq_len", 1, whole=True)
    number(_part(summary, "parameters"), "total", 1, whole=True)
    number(summary, "tokens", 1, whole=True)
    number(summary, "tokens_per_step", 1, whole=True)
    for key in ("tokens_per_second", "training_seconds", "training_flops_per_token"):
        number(summary, key, 0)
    validation = _part(summary, "validation")
    for key in ("loss", "bits_per_byte"):  # a run that diverged has NaN, and synthetic data no bytes
        number(validation, key, -LARGEST, finite=False)
    stages = summary.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError("its stages are no list of stages")
    for stage in stages:
        for key in ("seq_len", "steps", "tokens_per_step"):
            number(stage, key, 1, whole=True)
    rows = summary.get("validation_by_position")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its validation_by_position is no list of rows")
    for row in rows:
        number(row, "end", 1, whole=True)
        number(row, "loss", -LARGEST, finite=False)
    if summary.get("peak_memory_bytes") is not None:
        number(summary, "peak_memory_bytes", 0)
    if not isinstance(summary.get("device", ""), str):
        raise ValueError(f"its device is {_shown(summary['device'])}, which is no name")
    if not isinstance(summary.get("versions", {}), dict):
        raise ValueError("its versions are no object")


def number(
    content: dict[str, Any], key: str, least: float, most: float = LARGEST, whole: bool = False, finite: bool = True
) -> Any:
    """A number of a JSON object.

    Raises:
        ValueError: it is missing, no number, or out of bounds.
    """
    value = content.get(key)
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"its {key} is {_shown(value)}, which is no {'whole ' * whole}number")
    if isinstance(value, float) and not math.isfinite(value):
        if finite:
            raise ValueError(f"its {key} is {value}")
    elif not least <= value <= most:
        raise ValueError(f"its {key} is {_shown(value)}, which cannot be")
    return value


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    part = content.get(key)
    if not isinstance(part, dict):
        raise ValueError(f"its {key} is {_shown(part)}, which is no object")
    return part


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    words = repr(value)
    return words if len(words) <= 40 else f"{words[:37]}..."


NEEDLE, NEEDLE_GAIN = "needle", "needle gain"
GAIN = " gain"
"""Suffix of the names of measures in nats; the others are shares."""

KINDS = ("causality_", "accuracy_", "needle_", "cache_quality_")
USUAL_SPLIT = "validation"

Recall = dict[str, dict[int, float]]
"""A measure's values by context length, by the measure's name."""


@dataclass(frozen=True)
class NeedleMap:
    """The result of `task=needle`.

    Attributes:
        lengths: tokens of the contexts, shortest first.
        depths: where the needle lay, from 0 (first) to 1 (right before the question).
        accuracy: share of values found, a row for each depth with a number for each length.
        gain: what the needle adds to the value's log probability, in nats, likewise.
        trained_seq_len: tokens of a training window.
        needles: how many each number is a mean of.
    """

    lengths: list[int]
    depths: list[float]
    accuracy: list[list[float]]
    gain: list[list[float]]
    trained_seq_len: int
    needles: int


@dataclass(frozen=True)
class Evaluations:
    """The newest results of each kind.

    Attributes:
        causal: what `task=causality` found; None where it has not run.
        recall: shares of targets met by `task=accuracy`, under the name of its data; and by `task=needle`, under
            "needle", beside what the needle adds to the value's log probability, in nats, under `NEEDLE_GAIN`. Names of
            results on other data than the run's, of another split or of a changed model say of which.
        needles: the latter two by depth, by the name of the measure.
        state_bytes: what the model remembered of a row then, by the name of the data, where `task=accuracy` said so.
        caches: what `task=cache_quality` found, the newest of each cache and place, by what it read where that is not
            the run's own data, as "" else.
        damaged: results that cannot be read, and why.
    """

    causal: bool | None = None
    recall: Recall = field(default_factory=dict)
    needles: dict[str, NeedleMap] = field(default_factory=dict)
    state_bytes: Recall = field(default_factory=dict)
    caches: dict[str, list[CacheCell]] = field(default_factory=dict)
    damaged: tuple[tuple[Path, str], ...] = ()

    @property
    def needle(self) -> NeedleMap | None:
        """The map of needles in the run's own data, or else in others; None where `task=needle` has not run."""
        return self.needles.get(NEEDLE, next(iter(self.needles.values()), None))


def is_gain(measure: str) -> bool:
    """Whether a measure is in nats and not a share."""
    return measure.endswith(GAIN)


def read_evaluations(run: Path) -> Evaluations:
    """The results in a run's folder `evaluation`; empty where there are none. What is damaged is left out and named."""
    found = Evaluations()
    causal: bool | None = None
    damaged: list[tuple[Path, str]] = []
    steps: dict[str, int] = {}
    for path, report in _oldest_first(run, damaged):
        try:
            if path.name.startswith("causality_"):
                if not isinstance(report["causal"], bool):
                    raise ValueError("its causal is neither true nor false")
                causal = report["causal"]
            elif path.name.startswith("accuracy_"):
                _take_accuracy(found, report, steps)
            elif path.name.startswith("cache_quality_"):
                _take_caches(found, report, steps)
            else:
                _take_needles(found, report)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            damaged.append((path, _reason(error)))
    return Evaluations(causal, found.recall, found.needles, found.state_bytes, found.caches, tuple(damaged))


def _oldest_first(run: Path, damaged: list[tuple[Path, str]]) -> list[tuple[Path, dict[str, Any]]]:
    reports = []
    for path in sorted((run / "evaluation").glob("*.json")):
        if not path.name.startswith(KINDS):
            continue
        try:
            report = read_json(path)
            number(report, "step", 0, whole=True)
            if _is_of(run, report):
                reports.append((path, report))
        except (OSError, ValueError) as error:
            damaged.append((path, _reason(error)))
    return sorted(reports, key=lambda named: (named[1]["step"], str(named[1].get("date", ""))))


def _is_of(run: Path, report: dict[str, Any]) -> bool:
    """Whether a result belongs to the run's model, without states that another run has tuned."""
    states = report.get("states")
    if states is None:
        return True
    own = run / "states.pt"
    return isinstance(states, dict) and own.is_file() and sha256_of_file(own) == states.get("sha256")


def _measure(report: dict[str, Any], name: str) -> str:
    """What a result measures: its name, and data, split, weights and mixer where they are not the run's own."""
    if report.get("own_data") is False:
        name += f" in {report['corpus']}" if name == NEEDLE else ""
        name += f" ({str(report['data_fingerprint'])[:6]})"
    settings = report.get("settings")
    if isinstance(settings, dict) and "stride" in settings:
        name += f", stride {settings['stride']}"
    if "averaged" in report:
        name += f", weights={report['averaged']}"
    changed = report.get("mixer")
    if isinstance(changed, dict):
        name += "".join(f", {key}={value}" for key, value in flattened(changed).items())
    split = report.get("split", USUAL_SPLIT)
    return name if split == USUAL_SPLIT else f"{name}, {split}"


def _take_accuracy(found: Evaluations, report: dict[str, Any], steps: dict[str, int]) -> None:
    if not isinstance(report["data"], str):
        raise ValueError("its data is no name")
    measure = _measure(report, report["data"])
    rows = {_length(key): row for key, row in report["lengths"].items()}
    shares = {length: number(row, "accuracy", 0, 1) for length, row in rows.items()}
    known = {length: number(row, "state_bytes", 0) for length, row in rows.items() if "state_bytes" in row}
    newer = steps.get(measure) != report["step"]  # results of an older step are dropped
    steps[measure] = report["step"]
    before = {} if newer else found.recall[measure]
    found.recall[measure] = dict(sorted((before | shares).items()))
    found.state_bytes[measure] = ({} if newer else found.state_bytes[measure]) | known


def _take_caches(found: Evaluations, report: dict[str, Any], steps: dict[str, int]) -> None:
    rows, cells = _measure(report, "").strip(" ,"), checked_cells(report)
    newer = steps.get(f"caches {rows}") != report["step"]  # results of an older step are dropped
    steps[f"caches {rows}"] = report["step"]
    known = {} if newer else {(*cell.place, cell.cache): cell for cell in found.caches[rows]}
    found.caches[rows] = list((known | {(*cell.place, cell.cache): cell for cell in cells}).values())


def _take_needles(found: Evaluations, report: dict[str, Any]) -> None:
    measure = _measure(report, NEEDLE)
    needle = _needle_map(report)
    found.needles[measure] = needle
    found.recall[measure] = _over_depths(needle.lengths, needle.accuracy)
    found.recall[measure + GAIN] = _over_depths(needle.lengths, needle.gain)


def _length(key: str) -> int:
    length = int(key)
    if length < 1:
        raise ValueError(f"its context length {length} is below 1")
    return length


def _needle_map(report: dict[str, Any]) -> NeedleMap:
    cells = {}
    for cell in report["cells"]:
        where = number(cell, "depth", 0, 1), number(cell, "seq_len", 1, whole=True)
        cells[where] = {"accuracy": number(cell, "accuracy", 0, 1), "gain": number(cell, "gain", -1e9, 1e9)}
    if not cells:
        raise ValueError("its cells are empty")
    depths, lengths = (sorted({where[axis] for where in cells}) for axis in (0, 1))
    accuracy, gain = (
        [[cells[depth, length][measure] for length in lengths] for depth in depths] for measure in ("accuracy", "gain")
    )
    trained, needles = (number(report, key, 1, whole=True) for key in ("trained_seq_len", "needles"))
    return NeedleMap(lengths, depths, accuracy, gain, trained, needles)


def _over_depths(lengths: list[int], rows: list[list[float]]) -> dict[int, float]:
    """The mean over the needle's depths at each length."""
    return {length: fmean(column) for length, column in zip(lengths, zip(*rows, strict=True), strict=True)}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    if isinstance(error, TypeError | AttributeError):
        return "it has another form than results have"
    return str(error)
