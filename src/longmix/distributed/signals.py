"""Signals that ask a run to end: at once while there is nothing to save, between two steps once there is.

Nothing heavy is imported here, as the entry points ask for the watch before anything else.
"""

import contextlib
import enum
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from longmix.errors import Interrupted, ProcessLost

if TYPE_CHECKING:
    import torch

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals of Slurm before a job's time is over, or to make room: sbatch chooses which, submitit SIGUSR2."""

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, *REQUEUE)
"""Signals by rising weight: of several, the last in this order counts."""

PATIENCE_SECONDS = 10.0
"""Seconds that a signal waits for a call in C++ with nothing to save; the call may wait for a lost process."""

SAME_PRESS_SECONDS = 1.0
"""Within so many seconds a second Ctrl-C is the first one, passed on by a launcher to processes that had it."""


class Answer(enum.Enum):
    """What a signal does to the process."""

    EXIT = enum.auto()
    """End the process there and then; for the time of the imports, in which an exception may get lost."""
    RAISE = enum.auto()
    """Raise KeyboardInterrupt, so that all clear up behind themselves; for as long as there is nothing to save."""
    NOTE = enum.auto()
    """Remember it; the run saves and stops at the next step boundary."""


@dataclass(eq=False)
class _Wakeup:
    """A pipe into which the system writes the number of each signal, also where Python does not come to run."""

    reader: int
    writer: int


class SignalWatch:
    """Answers signals for this process; a second Ctrl-C acts at once, for those who cannot wait.

    Attributes:
        received: the signal that counts, once there was one.
        answer: what the next one does.
        worth_saving: whether the process has something to save, and so as much time as that takes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.answer = Answer.NOTE
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._process = 0
        self.worth_saving = False
        self._wakeup: _Wakeup | None = None

    @property
    def installed(self) -> bool:
        """Whether this object answers signals now."""
        return bool(self._previous)

    def install(self) -> None:
        """Take the signals over from whoever had them; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before == signal.SIG_IGN:
                continue  # nohup wants the run to outlive its terminal
            if before != self._note:
                self._previous[number] = before
                signal.signal(number, self._note)
        if self._wakeup is None:
            self._wakeup = _Wakeup(*os.pipe())
            os.set_blocking(self._wakeup.writer, False)
            signal.set_wakeup_fd(self._wakeup.writer, warn_on_full_buffer=False)
            threading.Thread(target=self._end_what_hangs, args=(self._wakeup,), daemon=True).start()

    def _end_what_hangs(self, wakeup: "_Wakeup") -> None:
        """In a thread: end the process where its main thread does not come to it, as it waits for others in C++."""
        while number := os.read(wakeup.reader, 1):
            if number[0] in SIGNALS:
                time.sleep(PATIENCE_SECONDS)
                if self._wakeup is wakeup and not self.worth_saving and os.getpid() == self._process:
                    self.received = self.received or signal.Signals(number[0])
                    if self.earlier_handler() is None:
                        self.exit_now()
        os.close(wakeup.reader)

    def remove(self) -> None:
        """Restore the earlier handlers, and forget signals that came."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup.writer)
        self._previous, self.received, self.answer = {}, None, Answer.NOTE
        self._wakeup, self.worth_saving = None, False

    def exit_at_once(self) -> None:
        """From here on a signal ends the process; see `Answer.EXIT`."""
        self.answer = Answer.EXIT
        self.install()

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """From here on a signal raises KeyboardInterrupt, now if one has come; gives back what it took."""
        with self._given_back():
            self.answer, self.worth_saving = Answer.RAISE, False
            self.check()
            yield

    @contextlib.contextmanager
    def noting(self, worth_saving: bool = True) -> Iterator[None]:
        """From here on a signal is noted, also behind this block if signals came here before it."""
        with self._given_back():
            self.answer, self.worth_saving = Answer.NOTE, worth_saving
            yield

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came whose exception got lost in a callback or in somebody's `except`."""
        if self.received is not None and self.answer is Answer.RAISE:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _given_back(self) -> Iterator[None]:
        was_installed = self.installed
        self.install()
        try:
            yield
        finally:
            if not was_installed:
                self.remove()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was forked: the process that it works for decides
        first = self.received is None
        if first:
            self._since = time.monotonic()
        if self.received not in REQUEUE:  # SIGTERM may come first where Slurm makes room, and would not requeue
            self.received = signal.Signals(number)
        if self.answer is Answer.EXIT:
            self.exit_now()
        again = number == signal.SIGINT and time.monotonic() - self._since > SAME_PRESS_SECONDS
        if (first and self.answer is Answer.RAISE) or (not first and again):
            raise KeyboardInterrupt

    def exit_now(self) -> None:
        """Print a message and end the process without Python's own clean-up, because this may be any moment."""
        with contextlib.suppress(OSError):
            os.write(2, f"Interrupted: {self.before_the_first_step()}\n".encode())
        os._exit(Interrupted.exit_code)

    def before_the_first_step(self) -> str:
        """The message of a run that was asked to end before its first step."""
        assert self.received is not None
        return (
            f"{self.received.name} came before this command's first step; nothing was lost. Run the same command again."
        )

    def anywhere(self, device: "torch.device", failed: bool = False) -> bool:
        """Whether any process was asked to stop, or `failed`, which counts for more than a signal.

        All processes must ask at the same moment, and note the same signal.
        """
        import torch

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
        """The earlier handler of a signal that asks for a requeue: submitit's, which queues the job again.

        To be asked before `remove`, and called once the run is saved and closed.
        """
        handler = self._previous.get(self.received) if self.received in REQUEUE else None
        return functools.partial(handler, self.received, None) if callable(handler) else None


@functools.cache
def process_watch() -> SignalWatch:
    """The watch of this process. There is one, because signals belong to the process."""
    return SignalWatch()


def ignore_signals(of_terminal: bool) -> None:
    """Ignore signals from now on: all is saved, and a second signal must not change the exit code.

    Python gives signals back to the system on its way out, unless they are ignored, and the next one would kill it.

    Args:
        of_terminal: whether Ctrl-C is among them.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if of_terminal or number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)


def resumable(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let signals end `task` with `Interrupted` at any moment, until the task notes them to save its state first."""

    @functools.wraps(task)
    def run(config: Any) -> Any:
        watch = process_watch()
        with watch.raising():
            try:
                return task(config)
            except Interrupted:
                raise
            except (KeyboardInterrupt, Exception) as error:
                text = _interruption(watch, error)
                if text is None:
                    raise
                interrupted = Interrupted(text, watch.earlier_handler())
                interrupted.shared = not isinstance(error, ProcessLost)  # the first process may be the one that is gone
                raise interrupted from None

    return run


def _interruption(watch: SignalWatch, error: BaseException) -> str | None:
    """The message for an `error` that a signal caused; None for others, and where Ctrl-C came twice."""
    if watch.received is None:
        return None
    if isinstance(error, ProcessLost):
        return f"{watch.received.name} came, and {error}"
    if watch.answer is Answer.RAISE:
        return watch.before_the_first_step()
    return None
