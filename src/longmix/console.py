"""Output that never ends a run: without terminal, reader or disk space, it is dropped.

Nothing heavy is imported here, as the entry points protect their output before anything else.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO


class LastingStream:
    """A text stream that drops what it cannot write, from its first failure on.

    Args:
        stream: where to write.

    Attributes:
        gone: whether a write has failed: the reader of the pipe has ended, the disk is full, the descriptor is closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.gone = False

    def write(self, text: str) -> int:
        """Write `text` if that is possible; returns its length in either case."""
        if not self.gone:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # a ValueError is a file that was closed
                self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all of `lines`."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write out what is buffered, if that is possible."""
        if not self.gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def _give_up(self) -> None:
        """Point the descriptor at the null device, so that buffered text does not fail when the interpreter ends."""
        self.gone = True
        with contextlib.suppress(OSError, ValueError):
            _point_at_nothing(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_output() -> None:
    """Let no failure to write to the standard output or error end this process; print, rich and logging go through it.

    A descriptor that is closed is opened on nothing, so that no file of the run gets its number and, with it, messages.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _point_at_nothing(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  (it stays open to the end)
        if isinstance(stream, io.TextIOWrapper):  # a character that the encoding lacks must not end a message
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))
    logging.raiseExceptions = False  # a handler that cannot write would print a traceback for each record


def is_gone(stream: Any) -> bool:
    """Whether output to `stream` reaches nobody any more."""
    return isinstance(stream, LastingStream) and stream.gone


def _point_at_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
