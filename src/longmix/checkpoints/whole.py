"""The whole form of a checkpoint: all of the state in one file, which one process writes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints.tensor_files import check_archive, write_tensors
from longmix.checkpoints.tensors import IN_TENSORS, Name, own_part, own_slice, split, without_aliases
from longmix.checkpoints.verify import Facts, as_state, check_file, cure, facts_of, read_info, reading
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.progress import Advance, silent

STATE_FILE = "state.pt"


def write_whole(folder: Path | str, state: dict[str, Any], advance: Advance = silent) -> Facts:
    """Write a state, telling `advance` the bytes, and return size and SHA-256 of its file."""
    path = Path(folder) / STATE_FILE
    write_tensors(path, state, advance)
    return facts_of(path)


def read_whole(checkpoint: Path | str, *, mapped: bool = False) -> dict[str, Any]:
    """A state on the CPU, verified.

    Args:
        checkpoint: its folder.
        mapped: leave the tensors on the disk until they are used.

    Raises:
        CheckpointError: the file is missing or damaged, or names code.
    """
    path = Path(checkpoint) / STATE_FILE
    check_file(path, read_info(checkpoint))
    with reading(path, "state", f"; {cure(checkpoint).rstrip('.')}"):
        check_archive(path)
        return as_state(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


class WholeCheckpoint:
    """A checkpoint of format 1, verified; its tensors stay on the disk until they are read. See `ShardedCheckpoint`."""

    def __init__(self, checkpoint: Path | str) -> None:
        self.checkpoint = checkpoint = Path(checkpoint)
        state = read_whole(checkpoint, mapped=True)
        with reading(checkpoint / STATE_FILE, "state", f"; {cure(checkpoint).rstrip('.')}"):
            self._tensors, rest = split({key: state[key] for key in IN_TENSORS if key in state})
        self._rest = state | rest
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def rest(self) -> dict[str, Any]:
        """The state without weights and without the optimizers' tensors."""
        return self._rest

    def aliases(self) -> dict[Name, Name]:
        """Further names of tensors, each with the one that stands first."""
        return without_aliases(self._tensors)[1]

    def verify(self) -> None:
        """Nothing is left to verify."""

    def read_into(self, targets: dict[Name, Tensor], processes: Processes) -> None:
        """Fill `targets`, of which each process reads its own part; all processes must call it.

        Raises:
            CheckpointError: a tensor is not there or has another shape; the same in all processes.
        """
        processes.each(lambda: self.read(targets))

    def read(self, targets: dict[Name, Tensor]) -> None:
        """Fill `targets` in one process.

        Raises:
            CheckpointError: a tensor is not there or has another shape.
        """
        for name, target in targets.items():
            saved = self._tensors.get(name)
            if saved is None or saved.shape != target.shape:
                found = "is not there" if saved is None else f"has shape {list(saved.shape)}, not {list(target.shape)}"
                raise CheckpointError(f"{self.checkpoint / STATE_FILE}: {name} {found}.")
            own_part(target).copy_(saved[own_slice(target)])
