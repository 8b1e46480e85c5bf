"""What `evaluate.py` left beside a run: whether its model is causal, and what it recalls."""

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
class Evaluations:
    """The newest results of each kind.

    Attributes:
        causal: what `task=causality` found; None where it has not run.
        recall: shares of targets met by `task=accuracy`, under the name of its data; and by `task=needle`, under
            "needle", beside what the needle adds to the value's log probability, in nats, under `NEEDLE_GAIN`.
    """

    causal: bool | None = None
    recall: Recall = field(default_factory=dict)


def read_evaluations(run: Path) -> Evaluations:
    """The results in a run's folder `evaluation`; empty where there are none.

    Raises:
        DataError: a result is damaged.
    """
    causal, recall = None, Recall()
    for name, report in _oldest_first(run / "evaluation"):
        if name.startswith("causality_"):
            causal = bool(report["causal"])
        elif name.startswith("accuracy_"):
            recall[report["data"]] = {int(length): row["accuracy"] for length, row in report["lengths"].items()}
        elif name.startswith("needle_"):
            recall["needle"] = _over_depths(report, "accuracy")
            recall[NEEDLE_GAIN] = _over_depths(report, "gain")
    return Evaluations(causal, recall)


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


def _over_depths(report: dict[str, Any], figure: str) -> dict[int, float]:
    """The mean over the needle's depths at each length."""
    cells: dict[int, list[float]] = {}
    for cell in report["cells"]:
        cells.setdefault(int(cell["length"]), []).append(cell[figure])
    return {length: fmean(values) for length, values in sorted(cells.items())}
