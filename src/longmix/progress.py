"""Progress for people who wait: bars on standard error if that is a terminal, else plain lines.

A bar that is wiped at the end leaves its place to the line that says what was done.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from longmix.metrics import LAYERS_LOSS, Metrics
from longmix.printable import printable

PATIENCE_SECONDS = 1.0
"""Work that takes less shows no bar."""

DESCRIPTION = "{task.description}"

Item = TypeVar("Item")
Advance = Callable[[int], None]


_without_bars: ContextVar[bool] = ContextVar("without_bars", default=False)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bar appears meanwhile: another one has the terminal."""
    token = _without_bars.set(True)
    try:
        yield
    finally:
        _without_bars.reset(token)


def on_terminal() -> bool:
    """Whether standard error is a terminal. Colours that are forced on a file do not make it one."""
    return sys.stderr.isatty()


def silent(_: int) -> None:
    """Show nothing; stands for `advance` without a bar."""


def tracked(
    items: Iterable[Item] | Sequence[Item], description: str, total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """`items` beneath a bar that counts them; `total` where they do not say how many they are."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    columns = (
        TextColumn(DESCRIPTION),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with _bar(description, columns, total, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def steps_bar(description: str, total: int, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Yield `advance()`, to be called after each of `total` steps."""
    columns = TextColumn(DESCRIPTION), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with _bar(description, columns, total, shown=shown) as advance:
        yield lambda: advance(1)


@contextlib.contextmanager
def bytes_bar(description: str, total: int) -> Iterator[Advance]:
    """Yield `advance(bytes)`, of `total`; the bar appears after a second."""
    moved = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with _bar(description, (TextColumn(DESCRIPTION), BarColumn(), *moved), total, PATIENCE_SECONDS) as advance:
        yield advance


@contextlib.contextmanager
def documents_bar(description: str) -> Iterator[Callable[[int, int, int], None]]:
    """Yield `advance(documents, bytes, tokens)`; the bar appears after a second, and counts what has no known end."""
    counts = "{task.completed:,} documents, {task.fields[megabytes]:,.1f} MB, {task.fields[rate]:,.0f} tokens/s"
    columns = SpinnerColumn(), TextColumn(DESCRIPTION), TextColumn(counts), TimeElapsedColumn()
    began, total_bytes, total_tokens = time.monotonic(), 0, 0
    with _bar(description, columns, None, PATIENCE_SECONDS, megabytes=0.0, rate=0.0) as update:

        def advance(documents: int, num_bytes: int, tokens: int) -> None:
            nonlocal total_bytes, total_tokens
            total_bytes, total_tokens = total_bytes + num_bytes, total_tokens + tokens
            rate = total_tokens / max(time.monotonic() - began, 1e-9)
            update(documents, megabytes=total_bytes / 1e6, rate=rate)

        yield advance


@contextlib.contextmanager
def _bar(
    description: str,
    columns: Sequence[ProgressColumn],
    total: int | None,
    patience: float = 0.0,
    shown: bool = True,
    **fields: Any,
) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, **fields)` of a bar that is wiped at the end; without a terminal it does nothing.

    Args:
        description: any text; a path, or the name of a run, may look like markup.
        columns: of which one shows the description.
        total: None where nobody knows.
        patience: seconds after which the bar appears, with the next advance; 0 shows it at once.
        shown: False never shows it.
        fields: what columns show besides, as it is in the beginning.
    """
    if not shown or _without_bars.get() or not on_terminal():
        yield lambda count, **fields: None
        return
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began = bar.add_task(escape(printable(description)), total=total, **fields), time.monotonic()
    if not patience:
        bar.start()

    def advance(count: int, **fields: Any) -> None:
        bar.update(task, advance=count, **fields)
        if time.monotonic() - began > patience:
            bar.start()  # again does nothing

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


class ProgressDisplay:
    """Steps done, loss, tokens per second and time left.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process began.
        enabled: False on all processes but the first.
    """

    def __init__(self, total_steps: int, first_step: int, enabled: bool = True) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self.console = Console(stderr=True, quiet=not enabled)
        self.started = time.monotonic()
        self.bar: Progress | None = None

    def open(self) -> None:
        """Show the bar; without a terminal nothing is shown until the first line."""
        self.started = time.monotonic()
        if self.console.quiet or not on_terminal():
            return
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.add_task("training", total=self.total_steps, completed=self.first_step, numbers="")
        self.bar.start()

    @property
    def is_live(self) -> bool:
        """Whether a bar is shown, which has something to say after each step."""
        return self.bar is not None

    def advance(self, step: int, loss: float, rate: float) -> None:
        """Move the bar by a step, with its loss and the tokens per second since the last numbers."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, numbers=_numbers(loss, rate))

    def show(self, step: int, metrics: Metrics) -> None:
        """Show new training numbers: in the bar, or as a line without one."""
        if self.bar is None:
            loss = metrics["train/loss"] if "train/loss" in metrics else metrics[LAYERS_LOSS]
            numbers = _numbers(loss, metrics["throughput/tokens_per_second"])
            if "train/recall" in metrics:
                numbers += f"  recall {metrics['train/recall']:.3f}"
            self.console.print(f"step {step}/{self.total_steps}  {numbers}  left {self._left(step)}", highlight=False)

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self, step: int) -> str:
        done = max(1, step - self.first_step)
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))


def _numbers(loss: float, rate: float) -> str:
    return f"loss {loss:.3f}  {rate:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
