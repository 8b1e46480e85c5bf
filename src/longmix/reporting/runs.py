"""Reads runs: finished ones with their figures, unfinished ones as far as they came, damaged ones by name."""

import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longmix.errors import DataError
from longmix.metrics import METRICS_FILE, Metrics, read_metrics
from longmix.printable import printable
from longmix.reading import require_regular
from longmix.reporting.evaluations import Evaluations, read_evaluations
from longmix.reporting.quality import ranked
from longmix.reporting.settings import Settings, is_synthetic, read_settings
from longmix.reporting.summaries import Unfinished, read_summary

Curve = tuple[list[float], list[float]]

LARGEST_METRICS = 2**31
"""The most bytes of a metrics file that are read."""


@dataclass(frozen=True)
class Run:
    """One run's folder, read.

    Attributes:
        folder: where it lies.
        label: its folder's name without what all runs share.
        summary: its `summary.json`.
        metrics: the rows of its `metrics.csv`; none if it was not logged.
        evaluations: what `evaluate.py` found.
        settings: what its `config.yaml` says; none if that cannot be read.
    """

    folder: Path
    label: str
    summary: dict[str, Any]
    metrics: list[Metrics]
    evaluations: Evaluations
    settings: Settings = field(default_factory=dict)

    def curve(self, column: str, x: str = "step") -> Curve:
        """The values of one metric against another, where a row has both and they are finite."""
        points = [(row[x], row[column]) for row in self.metrics if x in row and column in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        return [point[0] for point in points], [point[1] for point in points]

    def row(self) -> dict[str, Any]:
        """The numbers that people compare."""
        validation = self.summary["validation"]
        recall = self.evaluations.recall
        return {
            "run": self.label,
            "mixer": self.summary["mixer"],
            "seq_len": self.summary["seq_len"],
            "parameters": self.summary["parameters"]["total"],
            "tokens": self.summary["tokens"],
            "bits_per_byte": None if is_synthetic(self.settings) else validation["bits_per_byte"],
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


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that goes on, or was killed before its end.

    Attributes:
        folder: where it lies.
        figures: how far it came, in words.
    """

    folder: Path
    figures: str


@dataclass(frozen=True)
class Found:
    """All runs at or below some folders.

    Attributes:
        runs: the finished ones, best first.
        unfinished: the others.
        damaged: files that cannot be read and were left out, with the reason; a run whose summary is among them is left
            out altogether.
    """

    runs: list[Run]
    unfinished: list[UnfinishedRun] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def measures_of(runs: list[Run]) -> list[str]:
    """Every measure of recall that some run was evaluated by."""
    return list(dict.fromkeys(measure for run in runs for measure in run.evaluations.recall))


def find_runs(paths: list[Path]) -> Found:
    """All runs at or below `paths`. One that is damaged or unfinished keeps no other from being read.

    Raises:
        DataError: a path does not exist, or there is no run at all.
    """
    folders = _folders(paths)
    if not folders:
        raise DataError(f"no run at or below {', '.join(map(str, paths))}: no folder there has a config.yaml.")
    read: list[tuple[Path, dict[str, Any]]] = []
    found = Found([])
    for folder in folders:
        try:
            summary = read_summary(folder)
            metrics = _metrics(folder, found.damaged)
            steps = summary["tokens"] / summary["tokens_per_step"]
            if max((row["step"] for row in metrics), default=0) > steps:  # the run continued after an earlier end
                raise Unfinished
            read.append((folder, {"summary": summary, "metrics": metrics}))
        except Unfinished:
            found.unfinished.append(UnfinishedRun(folder, _figures(_metrics(folder, found.damaged))))
        except (OSError, ValueError) as error:
            found.damaged.append((folder / "summary.json", _reason(error)))
    labels = _labels([folder for folder, _ in read]) if read else []
    for (folder, content), label in zip(read, labels, strict=True):
        settings, problem = read_settings(folder)
        evaluations = read_evaluations(folder)
        found.damaged.extend([] if problem is None else [(folder / "config.yaml", problem)])
        found.damaged.extend(evaluations.damaged)
        found.runs.append(Run(folder, label, evaluations=evaluations, settings=settings, **content))
    found.runs[:] = ranked(found.runs)
    return found


def _folders(paths: list[Path]) -> list[Path]:
    """Folders with a configuration; one that lies below two of the paths counts once."""
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no {path}; give the folder of a sweep or of runs.")
        for config in sorted(path.rglob("config.yaml")):
            if "wandb" not in config.relative_to(path).parts:
                folders.setdefault(config.parent.resolve(), config.parent)
    return list(folders.values())


def _metrics(folder: Path, damaged: list[tuple[Path, str]]) -> list[Metrics]:
    """The rows of a metrics file; none of a damaged one, which is named."""
    path = folder / METRICS_FILE
    try:
        if path.exists() or path.is_symlink():
            require_regular(path)
            if path.stat().st_size > LARGEST_METRICS:
                raise ValueError(f"it is larger than {LARGEST_METRICS:,} bytes")
        return read_metrics(folder)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        if (path, _reason(error)) not in damaged:
            damaged.append((path, _reason(error)))
        return []


def _figures(metrics: list[Metrics]) -> str:
    """How far a run came and its last figures, in words."""
    if not metrics:
        return "nothing logged yet"
    words = [f"step {int(max(row['step'] for row in metrics)):,}"]
    for split in ("train", "validation"):
        for key, unit in ((f"{split}/recall", ""), (f"{split}/bits_per_byte", " bits/byte"), (f"{split}/loss", "")):
            rows = [row for row in metrics if key in row and math.isfinite(row[key])]
            if rows:
                name = key.replace("/", " ").replace("bits_per_byte", "").strip()
                words.append(f"{name} {rows[-1][key]:.4f}{unit} at step {int(rows[-1]['step']):,}")
                break
    return ", ".join(words)


def _reason(error: Exception) -> str:
    words = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return printable(words.strip().rstrip(".")) or type(error).__name__


def _labels(folders: list[Path]) -> list[str]:
    """Folder names without the settings that all share; where ambiguous, paths below the common folder."""
    parts = [folder.name.split(",") for folder in folders]
    shared = set.intersection(*map(set, parts)) if len(folders) > 1 else set()
    names = [",".join(part for part in own if part not in shared) for own in parts]
    if "" not in names and len(set(names)) == len(names):
        return names
    resolved = [folder.resolve() for folder in folders]
    common = os.path.commonpath(folder.parent for folder in resolved)
    return [folder.relative_to(common).as_posix() for folder in resolved]
