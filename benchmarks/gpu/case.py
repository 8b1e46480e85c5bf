"""What is to be done on a device, and what became of it; both are lines of JSON."""

import dataclasses
import importlib
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, CRASHED, LATE = "passed", "failed", "skipped", "crashed", "late"
"""What can become of a case. A crash ended its process; one that is late was ended."""


class CheckFailed(Exception):
    """Something is not as it has to be; the message says what, in a line."""


class NotPossible(Exception):
    """A case has nothing to do here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One thing to do.

    Attributes:
        stage: the part of the command that it belongs to.
        name: unlike all others.
        action: full name of a function that takes `settings` as keywords and returns what it found.
        settings: of JSON's types.
        seconds: that it takes, as an estimate; it begins only where there is so much time.
        most: seconds after which it is ended.
        alone: nothing else may run on the device meanwhile.
    """

    stage: str
    name: str
    action: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    most: float = 60.0
    alone: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        case: its name.
        stage: its stage.
        status: one of the words above.
        seconds: that it took.
        values: what was found.
        note: why it did not pass.
        date: when it ended.
    """

    case: str
    stage: str
    status: str
    seconds: float
    values: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    date: str = ""

    def record(self) -> dict[str, Any]:
        """The result as JSON."""
        return dataclasses.asdict(self)


def ended(case: Case, status: str, seconds: float, note: str = "", values: Mapping[str, Any] | None = None) -> Result:
    """The result of a case that ends now."""
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return Result(case.name, case.stage, status, round(seconds, 3), values or {}, note, date)


def carry_out(case: Case) -> Result:
    """Do what a case says; nothing that goes wrong in it goes further."""
    began = time.monotonic()
    module, _, function = case.action.rpartition(".")
    try:
        values = getattr(importlib.import_module(module), function)(**case.settings)
    except CheckFailed as error:
        return ended(case, FAILED, time.monotonic() - began, str(error))
    except NotPossible as error:
        return ended(case, SKIPPED, time.monotonic() - began, str(error))
    except Exception as error:
        # The log has the whole story; the line says enough to know whether to read it.
        traceback.print_exc()
        return ended(case, FAILED, time.monotonic() - began, _in_a_line(error))
    return ended(case, PASSED, time.monotonic() - began, values=values)


def _in_a_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} at {place}: {text}"
