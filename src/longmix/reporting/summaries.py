"""A run's `summary.json`, checked before anything is computed from it."""

import math
from pathlib import Path
from typing import Any

from longmix.reading import read_json

LARGEST = 2.0**62
"""The largest number that a summary may hold."""


class Unfinished(Exception):
    """The run has no results of its end yet."""


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        Unfinished: there is none, or it has no figures of the last validation.
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
    """Refuse a summary that lacks a figure or has one of a wrong kind.

    Raises:
        ValueError: names the first such figure.
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
