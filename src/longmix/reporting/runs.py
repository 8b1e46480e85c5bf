"""Reads finished runs and lays them side by side."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from longmix.errors import DataError
from longmix.reporting.evaluations import Evaluations, read_evaluations
from longmix.reporting.metrics import Metrics, read_metrics

Curve = tuple[list[float], list[float]]

COLUMNS = {
    "run": "run",
    "mixer": "mixer",
    "seq_len": "seq_len",
    "parameters": "parameters",
    "tokens": "tokens",
    "bits_per_byte": "bits/byte",
    "loss": "loss",
    "tokens_per_second": "tokens/s",
    "training_seconds": "seconds",
    "peak_gib": "peak GiB",
}


@dataclass(frozen=True)
class Run:
    """One run's folder, read.

    Attributes:
        folder: where it lies.
        label: its folder's name without what all runs share.
        summary: its `summary.json`.
        metrics: the rows of its `metrics.csv`; none if it was not logged.
        evaluations: what `evaluate.py` found.
    """

    folder: Path
    label: str
    summary: dict[str, Any]
    metrics: list[Metrics]
    evaluations: Evaluations

    def curve(self, column: str, x: str = "step") -> Curve:
        """The values of one metric against another, where a row has both."""
        points = [(row[x], row[column]) for row in self.metrics if x in row and column in row]
        return [point[0] for point in points], [point[1] for point in points]

    def row(self) -> dict[str, Any]:
        """The figures that people compare."""
        validation = self.summary["validation"]
        recall = self.evaluations.recall
        return {
            "run": self.label,
            "mixer": self.summary["mixer"],
            "seq_len": self.summary["seq_len"],
            "parameters": self.summary["parameters"]["total"],
            "tokens": self.summary["tokens"],
            "bits_per_byte": validation["bits_per_byte"],
            "loss": validation["loss"],
            "tokens_per_second": self.summary["tokens_per_second"],
            "training_seconds": self.summary["training_seconds"],
            "peak_gib": self.peak_gib(),
            "training_flops_per_token": self.summary["training_flops_per_token"],
            "causal": self.evaluations.causal,
            **{f"{name} at {length}": value for name, row in recall.items() for length, value in row.items()},
        }

    def recalled(self, measure: str) -> float | None:
        """A measure of recall at the trained length, or else at the longest there is; None if it was not evaluated."""
        values = self.evaluations.recall.get(measure)
        return None if not values else values.get(self.summary["seq_len"], values[max(values)])

    def peak_gib(self) -> float | None:
        """The most memory that training took; None for a run that did not say."""
        if self.summary.get("peak_memory_bytes"):
            return self.summary["peak_memory_bytes"] / 2**30
        return max((row["memory/peak_gib"] for row in self.metrics if "memory/peak_gib" in row), default=None)


def measures_of(runs: list[Run]) -> list[str]:
    """Every measure of recall that some run was evaluated by."""
    return list(dict.fromkeys(measure for run in runs for measure in run.evaluations.recall))


def find_runs(paths: list[Path]) -> tuple[list[Run], list[Path]]:
    """All finished runs at or below `paths`, and the folders of unfinished ones.

    Raises:
        DataError: a path does not exist, a summary is damaged, or there is no finished run.
    """
    folders: dict[Path, Path] = {}  # a run that lies below two of the paths counts once
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no {path}; give the folder of a sweep or of runs.")
        for config in sorted(path.rglob("config.yaml")):
            if "wandb" not in config.relative_to(path).parts:
                folders.setdefault(config.parent.resolve(), config.parent)
    finished = [folder for folder in folders.values() if (folder / "summary.json").is_file()]
    if not finished:
        raise DataError(f"no finished run at or below {', '.join(map(str, paths))}: none has a summary.json.")
    runs = [
        Run(folder, label, _summary(folder), read_metrics(folder), read_evaluations(folder))
        for folder, label in zip(finished, _labels(finished), strict=True)
    ]
    return sorted(runs, key=_rank), [folder for folder in folders.values() if folder not in finished]


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Delete it to leave this run out.") from error


def _rank(run: Run) -> tuple[bool, float]:
    """Best first; a validation that is not a number comes last."""
    bits_per_byte = run.summary["validation"]["bits_per_byte"]
    return math.isnan(bits_per_byte), bits_per_byte


def _labels(folders: list[Path]) -> list[str]:
    """Folder names without the settings that all share; paths below their common folder where that is ambiguous."""
    parts = [folder.name.split(",") for folder in folders]
    shared = set.intersection(*map(set, parts)) if len(folders) > 1 else set()
    names = [",".join(part for part in own if part not in shared) for own in parts]
    if "" not in names and len(set(names)) == len(names):
        return names
    resolved = [folder.resolve() for folder in folders]
    common = os.path.commonpath(folder.parent for folder in resolved)
    return [folder.relative_to(common).as_posix() for folder in resolved]


def table(runs: list[Run]) -> Table:
    """The runs as a table, best validation first."""
    result = Table(title="runs, best validation first")
    for column in COLUMNS.values():
        left = column in ("run", "mixer")
        result.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    measures = measures_of(runs) or ["recall"]
    for name in (*measures, "causal"):
        result.add_column(escape(name), justify="right", overflow="fold")
    for run in runs:
        row = run.row()
        recalled = (run.recalled(measure) for measure in measures)
        result.add_row(
            *(_cell(row[name]) for name in COLUMNS),
            *("not evaluated" if value is None else _cell(value) for value in recalled),
            {True: "yes", False: "LEAKS", None: "not evaluated"}[run.evaluations.causal],
        )
    return result


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
