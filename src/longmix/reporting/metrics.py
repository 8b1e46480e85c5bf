"""The metrics file of a run: what the CSV logger writes and the reports read."""

import csv
from pathlib import Path

METRICS_FILE = "metrics.csv"

Metrics = dict[str, float]


def read_metrics(folder: Path) -> list[Metrics]:
    """Rows of a run's metrics file without their empty cells; none if there is no such file."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    rows: list[Metrics] = []
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            try:
                rows.append({key: float(value) for key, value in row.items() if value})
            except (TypeError, ValueError):
                continue  # the last line of a killed process may be cut short
    return [row | {"step": int(row["step"])} for row in rows]
