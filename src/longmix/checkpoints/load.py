"""Opening checkpoints of either form."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from longmix.checkpoints.processes import Processes
from longmix.checkpoints.progress import bytes_bar
from longmix.checkpoints.reading import read_info
from longmix.checkpoints.tensors import join
from longmix.checkpoints.whole import WholeCheckpoint, read_whole
from longmix.errors import CheckpointError

if TYPE_CHECKING:  # it imports torch.distributed.tensor, which takes a second
    from longmix.checkpoints.sharded import ShardedCheckpoint

WHOLE = 1
SHARDED = 2
ALIASES = "aliases"
"""Key in the rest of a sharded checkpoint: further names of tensors."""

Checkpoint = Union[WholeCheckpoint, "ShardedCheckpoint"]


def load_checkpoint(checkpoint: Path, *, optimizers: bool = True) -> dict[str, Any]:
    """The state saved in a checkpoint folder, on the CPU of one process, after its hashes have been verified.

    Args:
        checkpoint: the folder.
        optimizers: with their state, which often is twice as large as the weights.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format; nothing is changed.
    """
    if _format(checkpoint) == WHOLE:
        state = read_whole(checkpoint)
        return state if optimizers else {key: value for key, value in state.items() if key != "optimizers"}
    saved = _open_shards(checkpoint)
    rest = saved.rest()
    aliases = rest.pop(ALIASES)
    if not optimizers:
        del rest["optimizers"]
    tensors = {
        name: torch.empty(shape, dtype=saved.dtypes[name])
        for name, shape in saved.shapes.items()
        if name.split("/")[0] in rest
    }
    size = sum(facts["bytes"] for facts in saved.files.values()) + sum(tensor.nbytes for tensor in tensors.values())
    with bytes_bar(f"reading {checkpoint}", size) as advance:
        saved.read_into(tensors, Processes(), advance)
    return join(tensors | {name: tensors[other] for name, other in aliases.items()}, rest)


def open_checkpoint(checkpoint: Path) -> Checkpoint:
    """A checkpoint whose tensors are read later, by several processes, each its part.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    return WholeCheckpoint(checkpoint) if _format(checkpoint) == WHOLE else _open_shards(checkpoint)


def _open_shards(checkpoint: Path) -> "ShardedCheckpoint":
    from longmix.checkpoints.sharded import ShardedCheckpoint

    return ShardedCheckpoint(checkpoint)


def _format(checkpoint: Path) -> int:
    number = read_info(checkpoint).get("format")
    if number not in (WHOLE, SHARDED):
        raise CheckpointError(f"{checkpoint} has format {number}; this version of longmix reads {WHOLE} and {SHARDED}.")
    return number
