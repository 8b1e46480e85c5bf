"""A bar over bytes for a person who waits, as in `longmix.data.progress`."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from longmix.data.progress import PATIENCE_SECONDS

Advance = Callable[[int], None]


def silent(_: int) -> None:
    """Take bytes and show nothing."""


@contextlib.contextmanager
def bytes_bar(description: str, total: int) -> Iterator[Advance]:
    """Yield `advance(bytes)`; the bar appears on a terminal only, after a second, and is wiped at the end."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began = bar.add_task(description, total=total), time.monotonic()

    def advance(count: int) -> None:
        bar.update(task, advance=count)
        if time.monotonic() - began > PATIENCE_SECONDS:
            bar.start()  # again does nothing

    try:
        yield advance
    finally:
        bar.stop()
