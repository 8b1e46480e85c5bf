"""Everything that `python -m longmix.reporting` writes: the page, its panels as pictures, and the figures as data."""

import csv
from pathlib import Path

import numpy as np

from longmix.files import replace_file, replace_json, storage_errors
from longmix.reporting.colours import LIGHT, colour_numbers
from longmix.reporting.heat_maps import found_needles
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, panels_of
from longmix.reporting.plots import draw_curves, draw_heat_map, new_figure, save_figure
from longmix.reporting.runs import Run

PICTURES = "panels"
"""Folder of one PNG for each panel."""

COLUMNS = 3
"""Panels side by side in `runs.png`."""


def write_report(runs: list[Run], folder: Path) -> list[Path]:
    """Write report.html, runs.json, runs.csv, runs.png (all panels) and a PNG for each; returns what was written.

    Raises:
        StorageError: the folder cannot be written.
    """
    panels = panels_of(runs)
    with storage_errors(folder):
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    replace_file(page, lambda path: path.write_text(html(runs, panels, _subtitle(folder)), encoding="utf-8"))
    replace_json(folder / "runs.json", [run.row() for run in runs])
    replace_file(folder / "runs.csv", lambda path: _write_csv(runs, path))
    numbers = colour_numbers(run.summary["mixer"] for run in runs)
    with storage_errors(folder):
        overview = _picture(panels, numbers, folder / "runs.png")
        if found_needles(runs):
            _needle_picture(runs, folder / PICTURES / "needles.png")
        for panel in panels:
            _picture([panel], numbers, folder / PICTURES / f"{panel.key}.png")
    return [page, folder / "runs.json", folder / "runs.csv", overview, folder / PICTURES]


def _subtitle(folder: Path) -> str:
    return folder.resolve().name


def _write_csv(runs: list[Run], path: Path) -> None:
    rows = [run.row() for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _picture(panels: list[Panel], numbers: dict[str, int], path: Path) -> Path:
    figure, axes = new_figure(len(panels), COLUMNS)
    for panel, place in zip(panels, axes, strict=True):
        draw_curves(
            place,
            {series.name: (series.x, series.y) for series in panel.series},
            title=f"{panel.section}: {panel.title}",
            x_label=panel.x_label,
            y_label=panel.y_label,
            log_x=panel.log_x,
            marker="o",
            colours=[LIGHT[numbers[series.mixer]] for series in panel.series],
        )
        if panel.from_zero:
            place.set_ylim(bottom=min(0.0, place.get_ylim()[0]))
    return save_figure(figure, path)


def _needle_picture(runs: list[Run], path: Path) -> Path:
    """The heat maps of all runs that have one, side by side."""
    maps = found_needles(runs)
    figure, axes = new_figure(len(maps), COLUMNS)
    for (name, _, needle), place in zip(maps, axes, strict=True):
        draw_heat_map(
            place,
            np.array(needle.accuracy),
            needle.lengths,
            needle.depths,
            title=f"{name}: share of {needle.needles} needles found",
            limits=(0.0, 1.0),
            colours="viridis",
            trained_seq_len=needle.trained_seq_len,
        )
    return save_figure(figure, path)
