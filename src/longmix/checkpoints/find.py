"""Which checkpoint a word means: a folder of one, the newest of a run, or `last`, that of the newest run here."""

import sys
import time
from pathlib import Path

from longmix.checkpoints.store import NAME, NEW, CheckpointStore, final_name
from longmix.checkpoints.verify import INFO_FILE
from longmix.checkpoints.whole import STATE_FILE
from longmix.errors import CheckpointError
from longmix.printable import printable
from longmix.reading import found_below

LAST = "last"
ROOTS = ("runs", "multirun")
"""The folders in which `train.py` puts runs."""

OWN_FILES = (INFO_FILE, STATE_FILE, ".metadata")
"""Files that make a folder a checkpoint."""


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
    stores = [CheckpointStore(folder) for root in ROOTS for folder in found_below(Path(root), "checkpoints")]
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


def is_checkpoint(path: Path | str) -> bool:
    """Whether a folder is a checkpoint, possibly a damaged one, and not the folder of a run."""
    path = Path(path)
    return NAME.fullmatch(path.name) is not None or any((path / name).exists() for name in OWN_FILES)


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if NAME.fullmatch(path.name) and not path.exists():  # it was about to replace another, or has done so
        final = path.with_name(final_name(path.name))
        path = next((other for other in (final, final.with_name(final.name + NEW)) if other.exists()), path)
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


def _made(checkpoint: Path) -> float:
    return (checkpoint / INFO_FILE).stat().st_mtime
