"""The Hugging Face hub and what reads from it, with few words: one line where it cannot be reached, none repeated."""

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
    """Use the hub's libraries: they log nothing, and ask no network that is not there.

    Without this they try for half a minute and say so in twenty lines; what goes wrong comes as an error anyway. What
    the cache of `datasets` holds is found without a network too.

    Args:
        asks_hub: whether the hub itself is needed, and not only files elsewhere.

    Yields:
        Why the hub cannot be reached; None if it can, or is not needed.
    """
    quiet_libraries()
    import datasets
    from huggingface_hub import constants

    unreachable = unreachable_reason(constants.ENDPOINT) if asks_hub and not constants.HF_HUB_OFFLINE else None
    places = [(datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")] if unreachable else []
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield unreachable
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def quiet_libraries() -> None:
    """Let the hub's libraries log nothing: what they report as an error they raise too."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(logging.CRITICAL)


@cache
def unreachable_reason(endpoint: str) -> str | None:
    """Why no connection to an address can be made; None if it can, or if a proxy stands between."""
    address = urlsplit(endpoint)
    if {"https", "http", "all"} & set(urllib.request.getproxies()) or os.environ.get("ALL_PROXY"):
        return None
    try:
        socket.create_connection((address.hostname or "", address.port or 443), CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error.strerror or error})"
    return None
