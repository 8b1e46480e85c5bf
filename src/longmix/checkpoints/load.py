"""Opening checkpoints of either form."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from longmix.checkpoints.find import find_checkpoint, is_checkpoint
from longmix.checkpoints.tensors import AVERAGED, join
from longmix.checkpoints.verify import ALIASES, SHARDED, WHOLE, as_state, cure, read_info, reading
from longmix.checkpoints.whole import WholeCheckpoint, read_whole
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.progress import bytes_bar
from longmix.reading import shortened

if TYPE_CHECKING:  # it imports torch.distributed.tensor, which takes a second
    from longmix.checkpoints.sharded import ShardedCheckpoint

Checkpoint = Union[WholeCheckpoint, "ShardedCheckpoint"]


OF_TRAINING = ("optimizers", "carried")
"""The entries of a state that only training goes on with."""


def load_checkpoint(checkpoint: Path | str, *, optimizers: bool = True, averaged: bool = True) -> dict[str, Any]:
    """The state saved in a checkpoint folder, on the CPU of one process, after its hashes have been verified.

    Args:
        checkpoint: the folder, or that of a run, whose newest checkpoint is taken.
        optimizers: with their state, which often is twice as large as the weights, and what rows carry from step to
            step.
        averaged: with the averages of the weights, if there are any.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format; nothing is changed.
    """
    checkpoint = _one_of(checkpoint)
    left_out = {*(() if optimizers else OF_TRAINING), *(() if averaged else (AVERAGED,))}
    if _format(checkpoint) == WHOLE:
        return {key: value for key, value in read_whole(checkpoint).items() if key not in left_out}
    saved = _open_shards(checkpoint)
    rest = saved.rest()
    with _rest_of(checkpoint):
        aliases: dict[str, str] = rest.pop(ALIASES)
        for key in left_out:
            rest.pop(key, None)
        tensors = {
            name: torch.empty(shape, dtype=saved.dtypes[name])
            for name, shape in saved.shapes.items()
            if name.split("/")[0] in rest
        }
    size = sum(facts["bytes"] for facts in saved.files.values()) + sum(tensor.nbytes for tensor in tensors.values())
    with bytes_bar(f"reading {checkpoint}", size) as advance:
        saved.read_into(tensors, Processes(), advance)
    with _rest_of(checkpoint):
        known = {name: tensors[other] for name, other in aliases.items() if not left_out or other in tensors}
        return as_state(join(tensors | known, rest))


def open_checkpoint(checkpoint: Path | str) -> Checkpoint:
    """A checkpoint whose tensors are read later, by several processes, each its part; see `load_checkpoint`.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    checkpoint = _one_of(checkpoint)
    return WholeCheckpoint(checkpoint) if _format(checkpoint) == WHOLE else _open_shards(checkpoint)


def _open_shards(checkpoint: Path) -> "ShardedCheckpoint":
    from longmix.checkpoints.sharded import ShardedCheckpoint

    return ShardedCheckpoint(checkpoint)


def _one_of(path: Path | str) -> Path:
    """The checkpoint that a path means. Only a path to a checkpoint itself can lead to an error about damage."""
    path = Path(path)
    return path if is_checkpoint(path) and path.exists() else find_checkpoint(path)


def _rest_of(checkpoint: Path) -> AbstractContextManager[None]:
    return reading(checkpoint, "state that fits its tensors", f"; {cure(checkpoint).rstrip('.')}")


def _format(checkpoint: Path) -> int:
    number = read_info(checkpoint).get("format")
    if number not in (WHOLE, SHARDED) or not isinstance(number, int):
        found = shortened(number)
        raise CheckpointError(f"{checkpoint} has format {found}; this version of longmix reads {WHOLE} and {SHARDED}.")
    return number
