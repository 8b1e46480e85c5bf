"""Everything that `python -m longmix.reporting` writes: the page, its panels as pictures, and the figures as data."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from longmix.files import replace_file, replace_json, storage_errors
from longmix.printable import printable
from longmix.reporting.colours import style_of
from longmix.reporting.heat_maps import found_needles
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, panels_of
from longmix.reporting.plots import draw_curves, draw_heat_map, new_figure, save_figure
from longmix.reporting.runs import Found, Run

PICTURES = "panels"
"""Folder of one PNG for each panel."""

COLUMNS = 3
"""Panels side by side in `runs.png`."""


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a text of a CSV file must not begin with: a spreadsheet would take it for a formula and run it."""


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
    with storage_errors(folder):
        overview = _picture(panels, folder / "runs.png")
        if found_needles(runs):
            _needle_picture(runs, folder / PICTURES / "needles.png")
        for name, panel in _named(panels).items():
            _picture([panel], folder / PICTURES / f"{name}.png")
    return [page, folder / "runs.json", folder / "runs.csv", overview, folder / PICTURES]


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
    """A cell that is what it shows: no formula, no control character. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if value.startswith(FORMULA) else shown


def _picture(panels: list[Panel], path: Path) -> Path:
    figure, axes = new_figure(max(len(panels), 1), COLUMNS)
    for panel, place in zip(panels, axes, strict=False):
        draw_curves(
            place,
            _curves(panel),
            title=f"{panel.section}: {panel.title}",
            x_label=panel.x_label,
            y_label=panel.y_label,
            log_x=panel.log_x,
            marker="o",
            colours=[style_of(series.mixer).light for series in panel.series],
            dashes=[style_of(series.mixer).dash for series in panel.series],
        )
        if panel.from_zero:
            place.set_ylim(bottom=min(0.0, place.get_ylim()[0]))
    return save_figure(figure, path)


def _curves(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """Curves by name; two of one name are told apart by a number, so that none is lost."""
    names = [series.name for series in panel.series]
    counted = [
        f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
    return {name: (series.x, series.y) for name, series in zip(counted, panel.series, strict=True)}


def _needle_picture(runs: list[Run], path: Path) -> Path:
    """The heat maps of all runs that have one, side by side."""
    maps = found_needles(runs)
    figure, axes = new_figure(len(maps), COLUMNS)
    for (name, _, needle, _), place in zip(maps, axes, strict=True):
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
