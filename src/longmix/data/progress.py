"""A progress bar that appears only for a person who is waiting."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 1.0


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int, int], None]]:
    """Yield `advance(documents, bytes, tokens)`.

    The bar goes to standard error, only where that is a terminal, only once the work has taken a second, and is wiped
    when the work ends: the log line that follows says what was done.
    """
    if not sys.stderr.isatty():
        yield lambda documents, num_bytes, tokens: None
        return
    bar = _LateBar(description)
    try:
        yield bar.advance
    finally:
        bar.stop()


class _LateBar:
    def __init__(self, description: str) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._started_at = time.monotonic()
        self._shown = False
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(description),
            TextColumn(
                "{task.completed:,} documents, {task.fields[megabytes]:,.1f} MB, {task.fields[rate]:,.0f} tokens/s"
            ),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(description, total=None, megabytes=0.0, rate=0.0)
        self._bytes = self._tokens = 0

    def advance(self, documents: int, num_bytes: int, tokens: int) -> None:
        self._bytes += num_bytes
        self._tokens += tokens
        elapsed = time.monotonic() - self._started_at
        rate = self._tokens / max(elapsed, 1e-9)
        self._progress.update(self._task, advance=documents, megabytes=self._bytes / 1e6, rate=rate)
        if not self._shown and elapsed > PATIENCE_SECONDS:
            self._progress.start()
            self._shown = True

    def stop(self) -> None:
        if self._shown:
            self._progress.stop()
