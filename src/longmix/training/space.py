"""Warns early if a run's checkpoints will not fit on the disk."""

import logging
import shutil
from pathlib import Path
from typing import Any

from longmix.checkpoints import CheckpointStore
from longmix.checkpoints.tensors import IN_TENSORS, split, without_aliases

log = logging.getLogger(__name__)


def checkpoint_bytes(state: dict[str, Any]) -> int:
    """Bytes of weights, optimizer values and carried states in a checkpoint of `state`, whole or in shards."""
    tensors, _ = without_aliases(split({key: state[key] for key in IN_TENSORS if key in state})[0])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def warn_of_space(store: CheckpointStore, size: int, keep: int, to_write: int) -> None:
    """Warn if the checkpoints that the run will hold at once do not fit into the free space.

    Args:
        store: where they go.
        size: of one, in bytes.
        keep: how many stay beside the best one.
        to_write: how many the run has still to write.
    """
    present = len(store.all())
    more = min(keep + 2, present + to_write) - present  # the best one stays too, and one is written before one goes
    free = shutil.disk_usage(_existing(store.folder)).free
    if more > 0 and more * size > free:
        log.warning(
            "%s has %.1f GiB of free space, and the run is going to need %.1f GiB more for %d checkpoints of %.1f GiB; "
            "free some, or keep fewer with loop.keep_checkpoints=1.",
            store.folder,
            free / 2**30,
            more * size / 2**30,
            more,
            size / 2**30,
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
