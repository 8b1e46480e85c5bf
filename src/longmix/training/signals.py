"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 as a request to save and stop at the next step boundary."""

import functools
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends the one that it was told to before a job's time is over, or to make room; submitit chooses SIGUSR2."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, *REQUEUE)
"""The later ones count for more where several come."""

SAME_PRESS_SECONDS = 1.0
"""A terminal sends Ctrl-C to all processes, and launchers pass it on: within this time it is the same one."""


class SignalWatch:
    """Notes a signal; a second Ctrl-C acts at once, for those who cannot wait."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over from whoever had them."""
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
        if self.received not in REQUEUE:  # SIGTERM may come first where Slurm makes room, and would not requeue
            self.received = signal.Signals(number)

    def anywhere(self, device: torch.device, failed: bool = False) -> bool:
        """Whether any process was asked to stop, or `failed`, which counts for more than a signal.

        All processes must ask at the same step, and note the same signal.
        """
        index = -1 if self.received is None else SIGNALS.index(self.received)
        index = len(SIGNALS) if failed else index
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(index, device=device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            index = int(flag)
        if 0 <= index < len(SIGNALS):
            self._since = self._since or time.monotonic()
            self.received = SIGNALS[index]
        return index >= 0

    def earlier_handler(self) -> Callable[[], None] | None:
        """What would have taken a signal that asks for a requeue: submitit's, which puts the job back into the queue.

        To be asked before `remove`, and called once the run is saved and closed.
        """
        handler = self._previous.get(self.received) if self.received in REQUEUE else None
        return functools.partial(handler, self.received, None) if callable(handler) else None
