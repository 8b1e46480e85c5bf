"""One line instead of a traceback where memory runs out; nothing heavy is imported here."""

from collections.abc import Iterator
from contextlib import contextmanager

from longmix.errors import ConfigError


@contextmanager
def allocation_errors(what: str, cure: str) -> Iterator[None]:
    """Turn a refused allocation, on a CPU or a GPU, into one line.

    Args:
        what: the work that needs the memory, as messages name it.
        cure: what to change.

    Raises:
        ConfigError: names both.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).splitlines()[0] if str(error) else "memory is used up"
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        known = known or "allocate memory" in str(error)
        if not known:
            raise
        raise ConfigError(f"{what} takes more memory than there is ({words}); {cure}") from error
