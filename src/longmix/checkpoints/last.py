"""The word `last` in place of a checkpoint: the newest run below the working folder."""

import sys
import time
from pathlib import Path

from longmix.checkpoints.reading import INFO_FILE
from longmix.checkpoints.store import CheckpointStore, find_checkpoint
from longmix.errors import CheckpointError
from longmix.printable import printable

LAST = "last"
ROOTS = ("runs", "multirun")
"""The folders in which `train.py` puts runs."""


def chosen_checkpoint(path: Path | str, except_run: Path | str | None = None) -> Path:
    """The checkpoint folder that a user's word means: see `find_checkpoint`; `last` is that of the newest run.

    Which run that is goes to standard error in one line. A folder called `last` is reached as `./last`.

    Args:
        path: what the user gave.
        except_run: a run's folder that `last` does not mean, such as the one about to begin.

    Raises:
        CheckpointError: there is none.
    """
    if not str(path):  # an unset variable; an empty path would mean the working folder
        raise CheckpointError(
            "the name of a checkpoint is empty; give the folder of a run, or last for the newest one."
        )
    if str(path) != LAST:
        return find_checkpoint(path)
    checkpoint = last_checkpoint(except_run)
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_made(checkpoint)))
    print(f"last is {printable(checkpoint)}, of {made}", file=sys.stderr)
    return checkpoint


def last_checkpoint(except_run: Path | str | None = None) -> Path:
    """The checkpoint that was written last by any run, finished or not, below `runs/` and `multirun/` here.

    Raises:
        CheckpointError: no run there has one.
    """
    stores = [CheckpointStore(folder) for root in ROOTS for folder in Path(root).rglob("checkpoints")]
    found = [
        checkpoint
        for store in stores
        if except_run is None or store.folder.parent.resolve() != Path(except_run).resolve()
        for checkpoint in store.all()
        if (checkpoint / INFO_FILE).is_file()
    ]
    if not found:
        raise CheckpointError(
            f"there is no last run: no folder below runs/ or multirun/ in {Path.cwd()} holds a checkpoint. Give the "
            "folder of a run."
        )
    return max(found, key=lambda checkpoint: (_made(checkpoint), checkpoint.name))


def _made(checkpoint: Path) -> float:
    return (checkpoint / INFO_FILE).stat().st_mtime
