"""The metrics file of a run: what the CSV logger writes and the reports read."""

import csv
from pathlib import Path

from longmix.reading import require_regular

METRICS_FILE = "metrics.csv"

LAYERS_LOSS = "train/layers_loss"
"""The loss of a step in which layers learn from a teacher's; any other has `train/loss`, that of its tokens."""

Metrics = dict[str, float]


def read_cells(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics file as they are written there, without empty cells; none if there is no such file.

    Rows that are no numbers are left out: the last line of a killed process may be cut short. Each line is read by
    itself, so that a stray quote takes no further ones with it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    require_regular(path)
    with path.open(encoding="utf-8", errors="replace") as stream:
        columns = _cells(next(stream, ""))
        lines = [_cells(line) for line in stream]
    rows = [
        {key: value for key, value in zip(columns, cells, strict=True) if value}
        for cells in lines
        if len(cells) == len(columns)
    ]
    return [row for row in rows if "step" in row and _are_numbers(row)]


def read_metrics(folder: Path) -> list[Metrics]:
    """Rows of a run's metrics file without their empty cells; none if there is no such file."""
    rows = [{key: float(value) for key, value in row.items()} for row in read_cells(folder)]
    return [row | {"step": int(row["step"])} for row in rows]


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # longer than any cell that was written here
        return []


def _are_numbers(row: dict[str, str]) -> bool:
    try:
        return int(row["step"]) >= 0 and all(float(value) is not None for value in row.values())
    except (TypeError, ValueError):
        return False
