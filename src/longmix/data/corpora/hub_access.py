"""Access to the Hugging Face hub with short messages: one line where it cannot be reached, and no repetition."""

import contextlib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from functools import cache
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def hub_access(asks_hub: bool) -> Iterator[str | None]:
    """Use the hub's libraries so that they log nothing, and stay offline where there is no network.

    Otherwise they try for half a minute and say so in twenty lines; failures are raised as errors anyway. Data in the
    cache of `datasets` are found without a network too.

    Args:
        asks_hub: whether the hub itself is needed, and not only files elsewhere.

    Yields:
        Why the hub cannot be reached; None if it can, or is not needed.
    """
    quiet_libraries()
    import datasets
    from huggingface_hub import constants

    unreachable = unreachable_reason(constants.ENDPOINT) if asks_hub and not constants.HF_HUB_OFFLINE else None
    flags = [(datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")] if unreachable else []
    before = [getattr(module, name) for module, name in flags]
    for module, name in flags:
        setattr(module, name, True)
    try:
        yield unreachable
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


def quiet_libraries() -> None:
    """Silence the logs of the hub's libraries, which raise every error that they log."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(logging.CRITICAL)


@cache
def unreachable_reason(endpoint: str) -> str | None:
    """The reason that an address cannot be reached; None if it can, or if a proxy stands between."""
    address = urlsplit(endpoint)
    if {"https", "http", "all"} & set(urllib.request.getproxies()) or os.environ.get("ALL_PROXY"):
        return None
    try:
        socket.create_connection((address.hostname or "", address.port or 443), CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error.strerror or error})"
    return None
