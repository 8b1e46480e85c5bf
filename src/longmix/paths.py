"""Paths that a user gives: an empty one would mean the working folder, and is refused."""

import os
from pathlib import Path

from longmix.errors import ConfigError

LONGEST_PATH, LONGEST_NAME = 4095, 255
"""The most bytes of a path, and of a name in it, on Linux."""


def empty_path(key: str, needed: bool = False) -> str:
    """The message for an empty path.

    Args:
        key: the word or setting that gave it.
        needed: it must be given.
    """
    cure = "Give a path." if needed else f"Give a path, or leave {key} out."
    return f"{key} is empty; was a variable of the shell not set? {cure}"


def check_path(key: str, text: str, needed: bool = False) -> None:
    """Refuse a text that cannot be a path.

    Args:
        key: the word or setting that gave it, for the message.
        text: as it was given.
        needed: it must be given.

    Raises:
        ConfigError: it is empty, as an unset variable of the shell leaves it, holds a NUL character, or is too long.
    """
    if not text.strip():
        raise ConfigError(empty_path(key, needed))
    if "\0" in text:
        raise ConfigError(f"{key}={text!r} holds a NUL character, which no path can.")
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise ConfigError(f"{key}={text[:50]}... is longer than a path can be.")


def check_file(key: str, text: str) -> None:
    """Refuse the name of a folder where a file is meant.

    Raises:
        ConfigError: it is one, or ends with a slash; see `check_path` too.
    """
    check_path(key, text)
    if text.endswith(("/", "/.", "/..")) or Path(text).is_dir():
        raise ConfigError(
            f"{key}={text} is the name of a folder; give that of a file, such as {key}={Path(text) / 'x'}."
        )


def user_path(key: str, value: str | os.PathLike[str]) -> Path:
    """The path that a word or setting gives, with `~` expanded.

    Args:
        key: the word or setting, for the message.
        value: as it was given.

    Raises:
        ConfigError: see `check_path`; or `~name` of an unknown user.
    """
    text = value if isinstance(value, str) else os.fspath(value) if isinstance(value, os.PathLike) else None
    if not isinstance(text, str):
        raise ConfigError(f"{key}={value!r} is no path; give a text or a Path.")
    check_path(key, text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise ConfigError(f"{key}={text}: {error}") from error
