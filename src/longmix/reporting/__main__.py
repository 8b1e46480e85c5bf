"""`python -m longmix.reporting FOLDER...`: runs side by side, as a table, one HTML page, pictures and data."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from longmix import startup
from longmix.command_line.options import OptionParser, path_option
from longmix.command_line.program import as_called
from longmix.errors import DataError, LongmixError
from longmix.files import check_folder, replace_file, replace_json, storage_errors
from longmix.printable import LINES, printable
from longmix.reporting.best import best_of
from longmix.reporting.cache_section import panels_of_caches
from longmix.reporting.page import html
from longmix.reporting.panels import Panel, panels_of
from longmix.reporting.pictures import found_needles, needles_picture, overview, panel_picture
from longmix.reporting.plots import save_figure
from longmix.reporting.runs import Found, Run, find_runs
from longmix.reporting.table import table

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
    pictures = {name: panel_picture(panel) for name, panel in _named([*panels, *panels_of_caches(runs)]).items()}
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


LOG_WIDTH = 100
"""Width of the table where the output is no terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the report into the first folder, and return the exit code."""
    parser = OptionParser(prog=as_called("python -m longmix.reporting"), description=__doc__)
    parser.add_argument("folders", nargs="+", type=path_option, help="folders of sweeps or runs; searched through")
    parser.add_argument("--output", type=path_option, help="where the files go; the first folder if not given")
    parser.add_argument(
        "--best",
        nargs="+",
        metavar="SETTING",
        help="of runs that differ in these settings alone, such as optimizer.learning_rate, take the best",
    )
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        options = parser.parse_args(arguments)
        if options.output is not None:
            check_folder(options.output)
        found = find_runs(options.folders)
        runs = len(found.runs)
        if options.best and found.runs:
            found = replace(found, runs=best_of(found.runs, options.best))
        _print(found, console)
        if len(found.runs) < runs:
            _line(console, f"the best of {runs} runs by {', '.join(options.best)}")
        if not found.runs:
            searched = ", ".join(map(str, options.folders))
            raise DataError(f"no finished run at or below {searched}: none has a summary.json that can be read.")
        for path in write_report(found, options.output or options.folders[0]):
            _line(console, f"wrote {path}")
    except LongmixError as error:
        print(f"{type(error).__name__}: {printable(error, keep=LINES)}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(found: Found, console: Console) -> None:
    if found.runs:
        shown, notes = table(found.runs, console.width)
        console.print(shown)
        for note in notes:
            _line(console, note)
    for run in found.unfinished:
        _line(console, f"not finished: {run.folder}: {run.progress}")
    for path, reason in found.damaged:
        _line(console, f"damaged, left out: {path}: {reason}")


def _line(console: Console, words: str) -> None:
    console.print(printable(words), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
