"""What a run left in its folder."""

import csv
from pathlib import Path


def checkpoint(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / f"checkpoints/step-{step:08d}"


def rows(run: Path, column: str) -> dict[int, str]:
    """What a column of the log says, by step, where it says something."""
    with (run / "metrics.csv").open(newline="") as stream:
        return {int(row["step"]): row[column] for row in csv.DictReader(stream) if row.get(column)}
