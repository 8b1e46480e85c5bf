"""`python -m longmix.reporting FOLDER...`: runs side by side, as a table, one HTML page, pictures and data."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from longmix import startup
from longmix.errors import LongmixError
from longmix.reporting.report import write_report
from longmix.reporting.runs import find_runs, table


def main() -> int:
    """Print the table, write the report into the first folder, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longmix.reporting", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sweeps or runs; searched through")
    parser.add_argument("--output", type=Path, help="where the files go; the first folder if not given")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    as_it_is: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    try:
        runs, unfinished = find_runs(arguments.folders)
        console.print(table(runs))
        for folder in unfinished:
            console.print(f"not finished, left out: {folder}", **as_it_is)
        for path in write_report(runs, arguments.output or arguments.folders[0]):
            console.print(f"wrote {path}", **as_it_is)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
