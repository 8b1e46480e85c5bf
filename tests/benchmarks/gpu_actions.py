"""What cases of tests do in processes of their own."""

import os
import time

from benchmarks.gpu.case import CheckFailed, NotPossible


def crash(status: int) -> None:
    os._exit(status)


def wait(seconds: float) -> dict[str, float]:
    time.sleep(seconds)
    return {"waited": seconds}


def fail(text: str) -> None:
    raise CheckFailed(text)


def skip(text: str) -> None:
    raise NotPossible(text)


def break_down() -> None:
    raise ZeroDivisionError("of course")


def say_where(variable: str) -> dict[str, str | int | None]:
    return {variable: os.environ.get(variable), "pid": os.getpid()}
