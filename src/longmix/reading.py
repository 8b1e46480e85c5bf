"""Reading files that someone else may have written: bounded in size and depth, and never waiting.

A damaged or hostile file must be one clear error. So a FIFO is refused instead of waited for, a file is not read
beyond a limit, and JSON or YAML is not believed to be a mapping before that has been checked.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from longmix.errors import ConfigError
from longmix.printable import printable

LARGEST_TEXT_BYTES = 64 << 20
"""The most bytes of a JSON file; the largest that longmix writes are tokenizers of some MiB."""

LONGEST_REASON = 300
"""The most letters of a library's text in one of our messages."""

LARGEST_YAML_BYTES = 1 << 20
"""The most bytes of a YAML file; longmix writes some KiB."""

DEEPEST = 64
"""The most levels of a YAML file; longmix writes about ten."""

PIECE = 1 << 20
"""Bytes of a file that are asked for at once."""


def read_bytes(path: Path, limit: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it has more than `limit` bytes.
    """
    # Without O_NONBLOCK, opening a FIFO waits until somebody writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        content = read_up_to(stream, limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content


def read_up_to(stream: BinaryIO, count: int) -> bytes:
    """So many bytes of a stream, or all that it has, in the memory that they take; `read` makes room for `count`."""
    pieces = []
    while count > 0 and (piece := stream.read(min(count, PIECE))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def found_below(folder: Path, name: str) -> list[Path]:
    """All files and folders of a name below a folder, sorted; what may not be listed, or is gone, is passed over.

    Links to folders are not followed.
    """
    return sorted(Path(parent, name) for parent, folders, files in os.walk(folder) if name in folders or name in files)


def require_regular(path: Path) -> None:
    """Refuse a path that is no regular file: a folder, a FIFO, a device.

    Raises:
        OSError: there is nothing of this name, or it is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def read_json(path: Path, limit: int = LARGEST_TEXT_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is too large, not UTF-8, not JSON, nested too deeply, or no JSON object.
    """
    try:
        content = json.loads(read_bytes(path, limit).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read as OmegaConf reads it; interpolations stay texts.

    Raises:
        ConfigError: it cannot be read, is too large, nested too deeply, has aliases, or holds no mapping.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = read_bytes(path, LARGEST_YAML_BYTES).decode("utf-8")
        _check_events(text)
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {_reason(error)}.") from error
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def _check_events(text: str) -> None:
    """Refuse YAML that a few bytes can make endless (aliases, deep nesting), before anything is built from it."""
    import yaml

    depth, begun = 0, False
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            begun |= isinstance(event, yaml.MappingStartEvent)
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.NodeEvent) and not begun:
            raise ValueError("it holds no mapping")
    if not begun:
        raise ValueError("it is empty")


def shortened(text: object, limit: int = LONGEST_REASON) -> str:
    """A library's or file's text as one line of at most `limit` letters, safe for a terminal."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[:limit]}..."


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return shortened(error).rstrip(".")
