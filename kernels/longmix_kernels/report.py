"""Report what the kernels compile to and what calls cost, without a GPU: `python -m longmix_kernels.report [ENGINE]`.

The command compiles each kernel ahead of time for each architecture. It exits with 1 if a kernel has a fault: it
spills, uses stack, wants more shared memory than there is, stores without a barrier what another warp has yet to load,
or misses `wgmma` on sm_90 where its tiles have the rows for it. Costs are *estimates*, not measurements: operations and
bytes of the engines' `cost`, and the least time that they take at the peak rates of an H200.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from longmix_kernels.accelerators import ARCHITECTURES
from longmix_kernels.aot import DTYPES

ENGINES = ("attention", "linear", "delta", "scatter")
"""The engines. The `report` module of each has `add_options`, `builds`, `costs`, and `NOTE`, which names the setting
that costs are for.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse an option in one line; `-h` lists the options."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the kernels, print the tables, and return the exit code: 1 if a kernel has a fault, else 0.

    Args:
        arguments: the words of the command line; None for those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in ENGINES:
        return _report(ENGINES, arguments)
    return _report(arguments[:1], arguments[1:])


def _report(engines: Sequence[str], arguments: Sequence[str]) -> int:
    reports = {engine: importlib.import_module(f"longmix_kernels.{engine}.report") for engine in engines}
    name = f" {engines[0]}" if len(engines) == 1 else " [{" + ",".join(ENGINES) + "}]"
    parser = _Parser(
        prog=f"python -m longmix_kernels.report{name}",
        description="Compile kernels without a GPU, and estimate what calls cost. An engine's name shows its options.",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--cost-only", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="write the records here too")
    if len(engines) == 1:
        reports[engines[0]].add_options(parser)
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json={options.json}: there is no folder {options.json.parent}")
    if options.json is not None:
        _check_writable(parser, options.json)
    given, written = options, {}
    for engine, report in reports.items():
        if len(engines) > 1:
            print(f"{engine}\n")
            report.add_options(own := argparse.ArgumentParser())
            options = argparse.Namespace(**vars(own.parse_args([])) | vars(given))
        builds = report.builds(parser, options)  # which refuses impossible options
        kernels = [] if options.cost_only else [build.row(build.compile()) for build in builds]
        costs = report.costs(options)
        for rows in filter(None, (kernels, costs)):
            print(as_table(rows), end="\n\n")
        print(
            "Estimates, not measurements, at an H200's peak rates, each tensor read or written once per kernel; a pass "
            f"is the sum of its kernels. {report.NOTE}\n"
        )
        written[engine] = {"kernels": kernels, "costs": costs}
    if options.json is not None:
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(row["faults"] for found in written.values() for row in found["kernels"]))


def _check_writable(parser: argparse.ArgumentParser, path: Path) -> None:
    """Refuse a file for the records that cannot be written, before anything is compiled; none is left behind."""
    is_new = not path.exists()
    if not is_new and not path.is_file():  # opening a FIFO would wait
        parser.error(f"--json={path} cannot be written: it is not a regular file")
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        parser.error(f"--json={path} cannot be written: {error.strerror}")


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return records as text in aligned columns, with the names of the first record's fields above.

    Args:
        rows: at least one record; all have the same fields in the same order.
    """

    def text(x: Any) -> str:
        if isinstance(x, bool):
            return "yes" if x else "-"
        return f"{x:.2f}" if isinstance(x, float) else str(x) or "-"

    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def read_pairs(
    parser: argparse.ArgumentParser, option: str, given: Sequence[str], example: str, most: tuple[int, int]
) -> list[tuple[int, int]]:
    """Read the pairs of an option, such as "64/128", as pairs of numbers; anything else ends the command.

    Args:
        parser: the command's parser, which reports the error.
        option: the option's name.
        given: the words that the option got.
        example: a pair that the message shows.
        most: the largest allowed first and second number; 0 for no limit.
    """
    found = [re.fullmatch(r"(\d+)/(\d+)", pair) for pair in given]
    read = [(int(pair[1]), int(pair[2])) for pair in found if pair is not None]
    allowed = [[1 <= x <= (limit or x) for x, limit in zip(pair, most, strict=True)] for pair in read]
    if len(read) < len(given) or not all(map(all, allowed)):
        limits = f"each 1 to {most[0]}" if most[0] else f"the second 1 to {most[1]}"
        parser.error(f"{option} got {list(given)}; allowed are pairs such as {example}, {limits}")
    return read


if __name__ == "__main__":
    sys.exit(main())
