"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-<number>` that holds `state.pt` (weights, optimizer, random state, position, config,
versions) and `info.json` (step, SHA-256 of the state, validation figures). It is filled under another name and renamed
once everything is on the disk, so a folder of that name is complete; its hash is checked before anything is loaded.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longmix.errors import CheckpointError, LongmixError
from longmix.files import atomic_directory, remove_directory, remove_leftovers, sha256_of_file, write_json

STATE_FILE = "state.pt"
INFO_FILE = "info.json"
FORMAT = 1


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds one folder per checkpoint; made on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: dict[str, Any], info: dict[str, Any]) -> Path:
        """Write one checkpoint and return its folder.

        Args:
            state: tensors, numbers, texts, and lists and dicts of them; `state["step"]` names the checkpoint.
            info: what a reader should see without loading the state; must be JSON-able.

        Raises:
            StorageError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        target = self.folder / f"step-{state['step']:08d}"
        if target.exists():
            return target
        with atomic_directory(target) as folder:
            path = folder / STATE_FILE
            with path.open("wb") as stream:
                torch.save(state, stream)
            summary = {"format": FORMAT, "step": state["step"], "bytes": path.stat().st_size}
            write_json(folder / INFO_FILE, info | summary | {"sha256": sha256_of_file(path)})
        return target

    def all(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))

    def latest(self) -> Path | None:
        """The newest committed checkpoint."""
        return next(reversed(self.all()), None)

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss among those that have one."""
        losses = {path: read_info(path).get("validation", {}).get("loss") for path in self.all()}
        known = {path: loss for path, loss in losses.items() if loss is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` and the best one, and what killed processes left behind."""
        best = self.best()
        for path in self.all()[:-keep]:
            if path != best:
                remove_directory(path)
        remove_leftovers(self.folder)


def read_info(checkpoint: Path) -> dict[str, Any]:
    """The `info.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    path = checkpoint / INFO_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_cure(checkpoint)}") from error


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state saved in a checkpoint folder, on the CPU, after its hash has been verified.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format; nothing is changed.
    """
    info = read_info(checkpoint)
    if info.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} has format {info.get('format')}; this version of longmix reads {FORMAT}.")
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. {_cure(checkpoint)}")
    size = path.stat().st_size
    if size != info["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes instead of {info['bytes']}. {_cure(checkpoint)}")
    if sha256_of_file(path) != info["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {INFO_FILE}. {_cure(checkpoint)}")
    return torch.load(path, map_location="cpu", weights_only=True)


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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / INFO_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        latest = CheckpointStore(folder).latest()
        if latest is not None:
            return latest
    if not path.exists():
        raise CheckpointError(f"there is no {path}; give the folder of a run or of one of its checkpoints.")
    raise CheckpointError(
        f"{path} holds no checkpoint; give the folder of a run, or one of the step-* folders in its checkpoints folder."
    )


def _cure(checkpoint: Path) -> str:
    return f"Delete {checkpoint} and use an older checkpoint beside it."
