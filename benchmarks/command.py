"""What the command lines of all benchmarks share: options, errors in one line, and a progress bar."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the options that every benchmark has."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"{self.prog}: {message} (-h lists the options)\n")

    def add_shared(self) -> None:
        """Add device, dtype, time and place."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", choices=("cpu", "cuda"), default=device)
        self.add_argument("--dtype", choices=DTYPES, help="default: bf16 on CUDA, fp32 on the CPU")
        self.add_argument("--seconds", type=positive(float), default=1.0, help="how long to time each call, in sum")
        self.add_argument(
            "--limit", type=positive(float), default=20.0, help="most seconds that one call may take; longer is skipped"
        )
        self.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")

    def check_shared(self, options: argparse.Namespace) -> None:
        """Fill in what depends on the device, and refuse what cannot be."""
        if options.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda, but torch sees no CUDA device")
        options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
        self.make_folder(options.out)

    def make_folder(self, folder: Path) -> None:
        """Make the folder for what is written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"--out {folder} cannot be a folder: {error.strerror}")


def positive(kind: type[int] | type[float], most: float = float("inf")) -> Callable[[str], float]:
    """Return a reader of numbers above 0 and up to `most`, for argparse."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)
        if not 0 < number <= most:
            whole = "whole numbers" if kind is int else "numbers"
            upto = "" if most == float("inf") else f" up to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are {whole} above 0{upto}")
        return number

    return read


@contextlib.contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yield `announce(what is going on)` and `finish(what is done)`; `total` things will finish.

    Goes to standard error: a bar where that is a terminal, and a line for each thing that is finished.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, markup=False)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)

        def finish(what: str) -> None:
            console.print(what, soft_wrap=True)
            bar.advance(task)

        yield lambda what: bar.update(task, description=what), finish
