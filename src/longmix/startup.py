"""The first call of every command: from then on neither a signal nor a lost terminal gives a traceback.

Nothing heavy is imported here: the imports that follow take seconds.
"""

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from longmix.console import protect_output
from longmix.distributed.signals import process_watch
from longmix.notices import show_in_one_line

BEGAN = "LONGMIX_BEGAN"
"""Environment variable with the time at which the command began, for the processes that it starts."""

INTERRUPTED = 130
"""Exit code after Ctrl-C where nothing can be continued."""

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM where nothing can be continued."""


def begin(resumable: bool = False) -> None:
    """Protect the output, note the time, and answer signals with one line.

    Args:
        resumable: the command may be run again after any signal, and says so by its exit code.
    """
    protect_output()
    show_in_one_line()
    os.environ.setdefault(BEGAN, str(time.time()))
    sys.excepthook = _without_traceback
    sys.unraisablehook = _unraisable
    if resumable:
        process_watch().exit_at_once()
    else:
        end_in_order()


def end_in_order() -> None:
    """Let SIGTERM end the process as an exception does, so that all clear up behind themselves; a second one kills it.

    A process that was forked meanwhile keeps the system's answer.
    """
    own = os.getpid()

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != own:
            os.kill(os.getpid(), number)
            return
        print("Terminated.", file=sys.stderr)
        sys.exit(TERMINATED)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def seconds_since_begin(otherwise: float) -> float:
    """Seconds since this process's command began, or `otherwise` where no command began it."""
    return time.time() - float(os.environ[BEGAN]) if BEGAN in os.environ else otherwise


def _without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> Any:
    """Answer Ctrl-C before the task has begun with one line; other errors show their traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    return _end()


def _unraisable(what: Any) -> Any:
    """End the process if Ctrl-C came inside a destructor or callback, where Python drops the exception."""
    if not issubclass(what.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(what)
    return _end()


def _end() -> None:
    watch = process_watch()
    if watch.received is not None:
        watch.exit_now()
    print("Interrupted.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
