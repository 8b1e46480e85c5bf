"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 as a request to save and stop at the next step boundary."""

import signal
from types import FrameType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Of the last two, Slurm sends the one that it was told to before a job's time is over; submitit chooses SIGUSR2."""


class SignalWatch:
    """Notes the first signal; a second Ctrl-C acts at once, for those who cannot wait."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
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
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all processes must ask at the same step."""
        stop = self.received is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(int(stop), device=device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        return stop
