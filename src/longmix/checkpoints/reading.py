"""What every reader of saved files shares: nothing is believed before it is verified, and nothing runs code."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longmix.errors import CheckpointError, LongmixError
from longmix.files import sha256_of_file

INFO_FILE = "info.json"

Facts = dict[str, Any]
"""`bytes` and `sha256` of a file."""


def facts_of(path: Path) -> Facts:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def read_info(checkpoint: Path) -> dict[str, Any]:
    """The `info.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    path = checkpoint / INFO_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {cure(checkpoint)}") from error


def check_size(path: Path, facts: Facts) -> None:
    """Refuse a file of a checkpoint that is missing or has another size than it was written with.

    Raises:
        CheckpointError: names the file and the cure.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. {cure(path.parent)}")
    size = path.stat().st_size
    if size != facts.get("bytes"):
        raise CheckpointError(f"{path} has {size} bytes instead of {facts.get('bytes')}. {cure(path.parent)}")


def check_file(path: Path, facts: Facts) -> None:
    """Refuse a file of a checkpoint that is not, byte for byte, the one that was written; reads 1 MiB at a time.

    Raises:
        CheckpointError: names the file and the cure.
    """
    check_size(path, facts)
    if sha256_of_file(path) != facts.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged or of another checkpoint: its SHA-256 is not the one in {INFO_FILE}. "
            f"{cure(path.parent)}"
        )


def cure(checkpoint: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"Delete {checkpoint} and use an older checkpoint beside it."


@contextlib.contextmanager
def reading(path: Path, what: str, cure: str = "") -> Iterator[None]:
    """Turn whatever a damaged file raises while it is read into one error.

    Args:
        path: the file.
        what: it should hold.
        cure: what to do about it.

    Raises:
        CheckpointError: names the file, what it lacks and the cure.
    """
    try:
        yield
    except LongmixError:
        raise
    except Exception as error:  # its bytes may happen to mean anything
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} holds no {what} ({reason}){cure}.") from error


def load_tensors(path: Path, format_number: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What was saved in a file other than a checkpoint, without running code of the file's; call inside `reading`.

    Raises:
        CheckpointError: it is of another format.
    """
    content = torch.load(path, map_location=device, weights_only=True)
    if content["format"] != format_number:
        raise CheckpointError(f"{path} has format {content['format']}; this version of longmix reads {format_number}.")
    return content
