"""Errors a user can cause and cure.

Each is raised once, close to where the user made the choice, with a message that names the cause and the cure. The
entry points print that message alone and exit with `exit_code`; any other exception is a defect of longmix and keeps
its traceback.
"""

import contextlib
import re
from collections.abc import Callable, Iterator


class LongmixError(Exception):
    """Base of every error whose message is meant for the user.

    Attributes:
        exit_code: the process's.
        shared: all processes of the run raise it alike, so that the first one speaks for all.
    """

    exit_code = 2
    shared = False


@contextlib.contextmanager
def settings_at(place: str, usual: str) -> Iterator[None]:
    """Errors that name settings of `usual`, such as data.corpus, name those of `place`, such as data.corpora.books."""
    try:
        yield
    except LongmixError as error:
        if place != usual:
            rest = place.removeprefix(usual) if place.startswith(usual) else "\0"  # what names the place already stays
            named = re.compile(rf"\b{re.escape(usual)}(?!{re.escape(rest)}\b)(?=[.:])")
            error.args = tuple(named.sub(lambda _: place, str(text)) for text in error.args)
        raise


class ConfigError(LongmixError):
    """A setting is unknown, missing or impossible; the message names its key."""


class DataError(LongmixError):
    """A corpus, tokenizer or token file is missing, damaged or does not fit the rest."""


class CheckpointError(LongmixError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class StorageError(LongmixError):
    """A folder cannot be written or the disk is full; nothing that was complete before is touched."""


class NonFiniteError(LongmixError):
    """A loss or a gradient became infinite or NaN and the run was stopped."""

    exit_code = 3
    shared = True


class SpikeError(LongmixError):
    """A loss or a gradient norm jumped far above those of the steps before and the run was stopped."""

    exit_code = 3
    shared = True


class ProcessLost(LongmixError):
    """Another process of the run was killed or gives no sign; running again with `resume=auto` continues it."""

    exit_code = 4


class Interrupted(LongmixError):
    """A signal ended the run after its state was saved; running again with `resume=auto` continues it.

    Args:
        message: what the user should read.
        hand_on: called once all is closed: tells whoever had the signal before this run took it.
    """

    exit_code = 75
    shared = True

    def __init__(self, message: str, hand_on: Callable[[], None] | None = None) -> None:
        super().__init__(message)
        self.hand_on = hand_on
