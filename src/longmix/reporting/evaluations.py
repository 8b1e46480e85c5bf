"""What `evaluate.py` left beside a run: whether its model is causal, what it recalls, and which needles it finds."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from longmix.errors import DataError

NEEDLE_GAIN = "needle gain"

Recall = dict[str, dict[int, float]]
"""A measure's values by context length, by the measure's name."""


@dataclass(frozen=True)
class NeedleMap:
    """What `task=needle` found.

    Attributes:
        lengths: tokens of the contexts, shortest first.
        depths: where the needle lay, from 0 (first) to 1 (right before the question).
        accuracy: share of values found, a row for each depth with a figure for each length.
        gain: what the needle adds to the value's log probability, in nats, likewise.
        trained_seq_len: tokens of a training window.
        needles: how many each figure is a mean of.
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
            "needle", beside what the needle adds to the value's log probability, in nats, under `NEEDLE_GAIN`.
        needle: the latter two by depth; None where `task=needle` has not run.
        state_bytes: what the model remembered of a row then, by the name of the data, where `task=accuracy` said so.
    """

    causal: bool | None = None
    recall: Recall = field(default_factory=dict)
    needle: NeedleMap | None = None
    state_bytes: Recall = field(default_factory=dict)


def read_evaluations(run: Path) -> Evaluations:
    """The results in a run's folder `evaluation`; empty where there are none.

    Raises:
        DataError: a result is damaged.
    """
    causal, recall, needle, state_bytes = None, Recall(), None, Recall()
    for name, report in _oldest_first(run / "evaluation"):
        if name.startswith("causality_"):
            causal = bool(report["causal"])
        elif name.startswith("accuracy_"):
            rows = {int(length): row for length, row in report["lengths"].items()}
            recall[report["data"]] = {length: row["accuracy"] for length, row in rows.items()}
            known = {length: row["state_bytes"] for length, row in rows.items() if "state_bytes" in row}
            state_bytes[report["data"]] = known
        elif name.startswith("needle_"):
            needle = _needle_map(report)
            recall["needle"] = _over_depths(needle.lengths, needle.accuracy)
            recall[NEEDLE_GAIN] = _over_depths(needle.lengths, needle.gain)
    return Evaluations(causal, recall, needle, state_bytes)


def _oldest_first(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    reports = []
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith(("causality_", "accuracy_", "needle_")):
            continue
        try:
            reports.append((path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}. Delete it to leave this result out.") from error
    return sorted(reports, key=lambda named: named[1]["step"])


def _needle_map(report: dict[str, Any]) -> NeedleMap:
    cells = {(cell["depth"], cell["seq_len"]): cell for cell in report["cells"]}
    depths, lengths = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    accuracy, gain = (
        [[cells[depth, length][figure] for length in lengths] for depth in depths] for figure in ("accuracy", "gain")
    )
    return NeedleMap(lengths, depths, accuracy, gain, report["trained_seq_len"], report["needles"])


def _over_depths(lengths: list[int], figures: list[list[float]]) -> dict[int, float]:
    """The mean over the needle's depths at each length."""
    return {length: fmean(column) for length, column in zip(lengths, zip(*figures, strict=True), strict=True)}
