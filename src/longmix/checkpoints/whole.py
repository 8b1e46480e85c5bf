"""All of a state in one file, which one process writes."""

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longmix.checkpoints.processes import Processes
from longmix.checkpoints.progress import Advance, silent
from longmix.checkpoints.reading import Facts, check_file, cure, facts_of, read_info, reading
from longmix.checkpoints.tensors import IN_TENSORS, Name, own_part, own_slice, split
from longmix.errors import CheckpointError

STATE_FILE = "state.pt"


def write_whole(folder: Path, state: dict[str, Any], advance: Advance = silent) -> Facts:
    """Write a state, telling `advance` the bytes, and return size and SHA-256 of its file."""
    path = folder / STATE_FILE
    with path.open("wb") as stream:
        torch.save(state, _Counted(stream, advance))
    return facts_of(path)


class _Counted:
    """A stream that tells how much is written to it."""

    def __init__(self, stream: BinaryIO, advance: Advance) -> None:
        self._stream, self._advance = stream, advance

    def write(self, content: Any) -> int:
        count = self._stream.write(content)
        self._advance(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_whole(checkpoint: Path, *, mapped: bool = False) -> dict[str, Any]:
    """A state on the CPU, verified.

    Args:
        checkpoint: its folder.
        mapped: leave the tensors on the disk until they are used.

    Raises:
        CheckpointError: the file is missing or damaged, or names code.
    """
    path = checkpoint / STATE_FILE
    check_file(path, read_info(checkpoint))
    with reading(path, "state", f"; {cure(checkpoint).rstrip('.')}"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


class WholeCheckpoint:
    """A checkpoint of format 1, verified; its tensors stay on the disk until they are read. See `ShardedCheckpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        state = read_whole(checkpoint, mapped=True)
        self._tensors, rest = split({key: state[key] for key in IN_TENSORS if key in state})
        self._rest = state | rest
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def rest(self) -> dict[str, Any]:
        """The state without weights and without the optimizers' tensors."""
        return self._rest

    def read_into(self, targets: dict[Name, Tensor], processes: Processes) -> None:
        """Fill `targets`, of which each process reads its own part; all processes must call it.

        Raises:
            CheckpointError: a tensor is not there or has another shape; the same in all processes.
        """
        processes.each(lambda: self._read(targets))

    def _read(self, targets: dict[Name, Tensor]) -> None:
        for name, target in targets.items():
            saved = self._tensors.get(name)
            if saved is None or saved.shape != target.shape:
                found = "is not there" if saved is None else f"has shape {list(saved.shape)}, not {list(target.shape)}"
                raise CheckpointError(f"{self.checkpoint / STATE_FILE}: {name} {found}.")
            own_part(target).copy_(saved[own_slice(target)])
