"""Everything that `python -m longmix.reporting` writes: the page, its panels as pictures, and the figures as data."""

import csv
from pathlib import Path
from typing import Any

from longmix.files import replace_file, replace_json, storage_errors
from longmix.printable import printable
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, panels_of
from longmix.reporting.pictures import found_needles, needles_picture, overview, panel_picture
from longmix.reporting.plots import save_figure
from longmix.reporting.runs import Found, Run

PICTURES = "panels"
"""Folder with one PNG for each panel."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make a spreadsheet run a text of a CSV file as a formula."""


def write_report(found: Found, folder: Path) -> list[Path]:
    """Write report.html, runs.json, runs.csv, runs.png (all panels) and a PNG for each; returns what was written.

    Args:
        found: at least one finished run, and what else there is.
        folder: to write into.

    Raises:
        StorageError: the folder cannot be written.
    """
    runs, panels = found.runs, panels_of(found.runs)
    with storage_errors(folder):
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    replace_file(page, lambda path: path.write_text(html(found, panels, folder), encoding="utf-8"))
    replace_json(folder / "runs.json", [run.row() for run in runs])
    replace_file(folder / "runs.csv", lambda path: _write_csv(runs, path))
    pictures = {name: panel_picture(panel) for name, panel in _named(panels).items()}
    if maps := found_needles(runs):
        pictures["needles"] = needles_picture([(found.title, found.needles) for found in maps])
    for path, figure in {
        folder / "runs.png": overview(panels),
        **{folder / PICTURES / f"{name}.png": figure for name, figure in pictures.items()},
    }.items():
        save_figure(figure, path)
    return [page, folder / "runs.json", folder / "runs.csv", folder / "runs.png", folder / PICTURES]


def _named(panels: list[Panel]) -> dict[str, Panel]:
    """Panels by their keys; of several with one key the later ones are numbered."""
    named: dict[str, Panel] = {}
    for panel in panels:
        number = sum(name == panel.key or name.startswith(f"{panel.key}_") for name in named)
        named[panel.key if panel.key not in named else f"{panel.key}_{number + 1}"] = panel
    return named


def _write_csv(runs: list[Run], path: Path) -> None:
    rows = [{_cell(key): _cell(value) for key, value in run.row().items()} for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> Any:
    """A harmless cell: text without formulas and control characters; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if value.startswith(FORMULA) else shown
