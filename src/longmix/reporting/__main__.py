"""`python -m longmix.reporting FOLDER...`: runs side by side, as a table, one HTML page, pictures and data."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from longmix import startup
from longmix.command_line.program import as_called
from longmix.errors import DataError, LongmixError
from longmix.printable import LINES, printable
from longmix.reporting.report import write_report
from longmix.reporting.runs import Found, find_runs
from longmix.reporting.table import table

LOG_WIDTH = 100
"""Width of the table where the output is no terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write the report into the first folder, and return the exit code."""
    parser = argparse.ArgumentParser(prog=as_called("python -m longmix.reporting"), description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sweeps or runs; searched through")
    parser.add_argument("--output", type=Path, help="where the files go; the first folder if not given")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        found = find_runs(options.folders)
        _print(found, console)
        if not found.runs:
            places = ", ".join(map(str, options.folders))
            raise DataError(f"no finished run at or below {places}: none has a summary.json that can be read.")
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
        _line(console, f"not finished: {run.folder}: {run.figures}")
    for path, reason in found.damaged:
        _line(console, f"damaged, left out: {path}: {reason}")


def _line(console: Console, words: str) -> None:
    console.print(printable(words), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
