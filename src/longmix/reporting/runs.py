"""Reads runs and ranks them: finished ones with their numbers, unfinished ones as far as they came, damaged by name."""

import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longmix.errors import DataError
from longmix.metrics import METRICS_FILE, Metrics, read_metrics
from longmix.printable import printable
from longmix.reading import found_below, require_regular
from longmix.reporting.results import Evaluations, Unfinished, read_evaluations, read_summary
from longmix.reporting.settings import Settings, is_synthetic, read_settings
from longmix.reporting.stages import steps_of

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
        has_bytes = validation.get("bytes") != 0 and not is_synthetic(self.settings)
        recall = self.evaluations.recall
        return {
            "run": self.label,
            "mixer": self.summary["mixer"],
            "seq_len": self.summary["seq_len"],
            "parameters": self.summary["parameters"]["total"],
            "tokens": self.summary["tokens"],
            "bits_per_byte": validation["bits_per_byte"] if has_bytes else None,
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
        progress: how far it came, in words.
    """

    folder: Path
    progress: str


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
            steps = steps_of(summary)
            if max((row["step"] for row in metrics), default=0) > steps:  # the run continued after an earlier end
                raise Unfinished
            read.append((folder, {"summary": summary, "metrics": metrics}))
        except Unfinished:
            found.unfinished.append(UnfinishedRun(folder, _progress(_metrics(folder, found.damaged))))
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
        for config in found_below(path, "config.yaml"):
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


def _progress(metrics: list[Metrics]) -> str:
    """How far a run came and its last results, in words."""
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


@dataclass(frozen=True)
class Quality:
    """Bits per byte of text; of synthetic data recall, or nats where that was not measured.

    Attributes:
        key: of the number in a validation.
        unit: in words.
        more_is_better: as with recall.
        decimals: that it is written with.
    """

    key: str
    unit: str
    more_is_better: bool = False
    decimals: int = 3

    def of(self, run: Run) -> float:
        """The run's value; NaN where it has none."""
        if self.key == "recall":
            share = recall_of(run)
            return math.nan if share is None else share
        return run.summary["validation"][self.key]

    def cost(self, run: Run) -> float:
        """The value, with its sign changed where more is better, so that small is good."""
        return -self.of(run) if self.more_is_better else self.of(run)

    def words(self, value: float) -> str:
        """A value as it is written."""
        return f"{100 * value:.1f} %" if self.key == "recall" else f"{value:.{self.decimals}f}"


def recall_of(run: Run) -> float | None:
    """Share of targets met in the last validation, or else by `task=accuracy` on the run's own data."""
    share = run.summary["validation"].get("recall")
    if isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share):
        return float(share)
    own = [measure for measure in run.evaluations.state_bytes if "(" not in measure and "," not in measure]
    return run.recalled(own[0]) if own else None


def quality_of(runs: list[Run]) -> Quality:
    """One measure for all: bits per byte if all are of text, recall if all are synthetic and say it, else nats."""
    synthetic = [is_synthetic(run.settings) for run in runs]
    if runs and all(synthetic) and all(recall_of(run) is not None for run in runs):
        return Quality("recall", "recall", more_is_better=True)
    has_bytes = any(math.isfinite(run.summary["validation"]["bits_per_byte"]) for run in runs)
    if has_bytes and not any(synthetic):
        return Quality("bits_per_byte", "bits/byte")
    return Quality("loss", "nats/token")


def ranked(runs: list[Run]) -> list[Run]:
    """Best first; a value that is no number comes last."""
    quality = quality_of(runs)

    def key(run: Run) -> tuple[bool, float, str]:
        cost = quality.cost(run)
        return not math.isfinite(cost), cost if math.isfinite(cost) else 0.0, run.label

    return sorted(runs, key=key)
