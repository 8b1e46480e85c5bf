"""Retries with pauses, for failures of a network or remote storage."""

import logging
import time

from longmix.errors import DataError

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
"""Seconds before the second try; each further pause is twice as long."""

REASON_CHARACTERS = 300


class Patience:
    """Counts the failures of an operation since it last succeeded.

    Args:
        what: the operation, as messages name it.
        tries: the number of failures in a row that ends it.
    """

    def __init__(self, what: str, tries: int) -> None:
        self.what, self.tries = what, tries
        self._failures = 0

    def succeeded(self) -> None:
        """Begin to count failures from zero again."""
        self._failures = 0

    def pause(self, error: Exception, reason: str) -> None:
        """Wait after a failure.

        Raises:
            DataError: this was the last try.
        """
        self._failures += 1
        if self._failures == self.tries:
            raise DataError(f"{self.what} could not be read in {self.tries} tries: {reason}") from error
        seconds = FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1)
        logger.warning("%s could not be read (%s); trying again in %.0f s", self.what, reason, seconds)
        time.sleep(seconds)


def reason_of(error: Exception) -> str:
    """Kind and message of an error, or of what caused it, in one line."""
    cause = error.__cause__ if error.__cause__ is not None else error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:REASON_CHARACTERS]}"
