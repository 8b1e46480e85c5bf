"""One line instead of a traceback where memory runs out, or a GPU is too small; nothing heavy is imported here."""

from collections.abc import Iterator
from contextlib import contextmanager

from longmix.errors import ConfigError

SIGNS = ("allocate memory", "Storage size calculation overflowed")
"""Parts of torch's messages where there is not enough memory, and where no memory would be enough."""


@contextmanager
def allocation_errors(what: str, cure: str) -> Iterator[None]:
    """Turn a refused allocation, on a CPU or a GPU, or a GPU that cannot run a kernel, into one line.

    Args:
        what: the work that needs the memory, as messages name it.
        cure: what to change.

    Raises:
        ConfigError: names both; of a GPU that cannot run a kernel, what the kernels say of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if type(error).__name__ == "UnsupportedDevice":  # of longmix_kernels
            raise ConfigError(str(error)) from error
        words = str(error).splitlines()[0] if str(error) else "memory is used up"
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        known = known or any(sign in str(error) for sign in SIGNS)
        if not known:
            raise
        raise ConfigError(f"{what} takes more memory than there is ({words}); {cure}") from error
