"""The folder of a run's checkpoints: which are committed, which is best, which may be deleted."""

import logging
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from longmix.checkpoints.tensor_files import write_tensors
from longmix.checkpoints.tensors import Name, Piece
from longmix.checkpoints.verify import ALIASES, INFO_FILE, SHARDED, WHOLE, facts_of, read_info
from longmix.checkpoints.whole import write_whole
from longmix.config import STAGE
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.files import (
    atomic_directory,
    free_folder,
    remove_directory,
    remove_leftovers,
    replace_directory,
    replace_json,
    storage_errors,
    write_json,
)

NEW = ".new"
"""Suffix of a complete checkpoint that is about to replace another of the same step."""

ASIDE = "set-aside-"
"""Prefix of a folder with checkpoints of steps that the run took again."""

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})(\.new)?")
"""Pattern of a checkpoint's folder name, also of one about to replace another."""

SKIPS_IN_A_ROW = "skips_in_a_row"
"""Entry of a state and of `info.json`: so many steps just before the checkpoint were left out, with
loop.nonfinite=skip, so that its weights are those of an earlier step."""


PREVIOUS = "previous"
"""Entry of `info.json`: the step of the checkpoint that was saved before, or None; earlier versions do not say."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds one folder per checkpoint; made on the first save.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._warned: set[Path] = set()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether or not it is there."""
        return self.folder / f"step-{step:08d}"

    def save(self, state: dict[str, Any], info: dict[str, Any]) -> Path:
        """Write one whole checkpoint and return its folder; one of the same step that was there gives way to it.

        Args:
            state: tensors, numbers, texts, and lists and dicts of them; `state["step"]` names the checkpoint.
            info: what a reader should see without loading the state; must be JSON-able.

        Raises:
            StorageError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        target = self.path(state["step"])
        with self._committing(target) as folder:
            facts = write_whole(folder, state)
            about = {"format": WHOLE, "step": state["step"], PREVIOUS: self._before(state["step"])}
            write_json(folder / INFO_FILE, info | about | facts)
        return target

    def save_sharded(
        self,
        pieces: dict[Name, Piece],
        aliases: dict[Name, Name],
        rest: dict[str, Any],
        info: dict[str, Any],
        processes: Processes,
    ) -> Path:
        """Write one sharded checkpoint and return its folder; all processes must call it.

        Args:
            pieces: what this process writes.
            aliases: further names of tensors.
            rest: the state without these tensors; that of the first process is written.
            info: see `save`.
            processes: all that have pieces.

        Raises:
            StorageError: some process cannot write; the same error in all of them, and nothing of it stays.
        """
        from longmix.checkpoints.sharded import RUN_FILE, write_shards

        target = self.path(rest["step"])
        with storage_errors(target), ExitStack() as stack:
            folder = processes.first(lambda: stack.enter_context(self._committing(target)))
            files = write_shards(folder, pieces, processes)

            def commit() -> None:
                write_tensors(folder / RUN_FILE, {**rest, ALIASES: aliases})
                files[RUN_FILE] = facts_of(folder / RUN_FILE)
                about = {"format": SHARDED, "step": rest["step"], PREVIOUS: self._before(rest["step"])}
                write_json(folder / INFO_FILE, info | about | {"processes": processes.size, "files": files})
                stack.close()

            processes.first(commit)
        return target

    def add_info(self, checkpoint: Path | str, more: dict[str, Any]) -> None:
        """Add facts that came later, such as the validation loss, to the `info.json` of a committed checkpoint.

        Raises:
            StorageError: it cannot be written.
        """
        replace_json(Path(checkpoint) / INFO_FILE, read_info(checkpoint) | more)

    def all(self) -> list[Path]:
        """Committed checkpoints, oldest first.

        Where a process was killed while a checkpoint took the place of another, that is the complete folder `.new`.
        """
        if not self.folder.is_dir():
            return []
        found = {path.name: path for path in self.folder.iterdir() if NAME.fullmatch(path.name)}
        committed = [path for name, path in found.items() if not (name.endswith(NEW) and final_name(name) in found)]
        return sorted(committed, key=step_of)

    def latest(self) -> Path | None:
        """The newest committed checkpoint."""
        return next(reversed(self.all()), None)

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss among those that have one and can be read.

        Of a run with stages it is one of the newest stage that has any: stages validate on windows of other lengths.
        """
        losses = {path: (info.get(STAGE, 0), _validation_loss(info)) for path, info in self._readable().items()}
        known = {path: (-stage, loss) for path, (stage, loss) in losses.items() if loss is not None}
        return min(known, key=lambda path: known[path]) if known else None

    def in_a_row(self) -> list[Path]:
        """The newest checkpoints between which none was deleted, oldest first.

        Older than these is the best one alone. Where `info.json` does not say what was saved before, the oldest counts
        if it is not the best one, or no further from the next one than any other from its next.
        """
        found = self.all()
        infos, steps = self._readable(), {step_of(path): path for path in found}
        row = found[-1:]
        while row and step_of(row[0]) > min(steps):
            after, before = row[0], found[found.index(row[0]) - 1]
            info = infos.get(after, {})
            if PREVIOUS in info:
                if info[PREVIOUS] not in steps:
                    break
                before = steps[info[PREVIOUS]]
            elif before == found[0] == self.best():
                gaps = [step_of(new) - step_of(old) for old, new in pairwise(row)]
                if step_of(after) - step_of(before) > max(gaps, default=0):
                    break
            row.insert(0, before)
        return row

    def _before(self, step: int) -> int | None:
        """The step of the newest checkpoint before that step; those behind steps left out do not count."""
        earlier = [path for path, info in self._readable().items() if not info.get(SKIPS_IN_A_ROW)]
        return max((number for path in earlier if (number := step_of(path)) < step), default=None)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` and the best one, and the leftovers of killed processes.

        A checkpoint behind steps that were left out does not push out others: of such ones the newest is kept besides,
        until a step is taken again. One that cannot be read does not count and stays, for whoever may want to look at
        it.
        """
        found = self._readable()
        taken = [path for path, info in found.items() if not info.get(SKIPS_IN_A_ROW)]
        kept = {self.best(), *taken[-keep:], *list(found)[-1:]}
        for path in found:
            if path not in kept:
                remove_directory(path)
        remove_leftovers(self.folder)

    def set_aside_after(self, step: int) -> Path | None:
        """Move the checkpoints of later steps into a folder of their own; returns it, or None if there are none.

        They can be evaluated and continued there; they are neither pruned nor the newest of the run any more.

        Raises:
            StorageError: they may not be moved.
        """
        later = [path for path in self.all() if step_of(path) > step]
        if not later:
            return None
        with storage_errors(self.folder):
            aside = new_aside(self.folder)
            for path in reversed(later):  # newest first: after a kill in between, those left are still in sequence
                path.rename(aside / path.name)
        return aside

    def recover(self) -> None:
        """Rename a checkpoint that was complete when its process was killed just before the rename."""
        for path in self.folder.glob(f"step-*{NEW}"):
            target = path.with_name(path.name.removesuffix(NEW))
            with storage_errors(target):
                remove_directory(path) if target.exists() else path.rename(target)

    @contextmanager
    def _committing(self, target: Path) -> Iterator[Path]:
        """A folder that becomes `target` once all of it is on the disk; until then an older one keeps that name."""
        fresh = target.with_name(target.name + NEW) if target.exists() else target
        if fresh != target and fresh.exists():
            remove_directory(fresh)
        with atomic_directory(fresh) as folder:
            yield folder
        if fresh != target:
            replace_directory(target, fresh)

    def _readable(self) -> dict[Path, dict[str, Any]]:
        """The `info.json` of each checkpoint, oldest first; unreadable ones are left out."""
        found = {}
        for path in self.all():
            try:
                info = read_info(path)
                if not isinstance(info, dict):
                    raise CheckpointError(f"{path / INFO_FILE} holds no JSON object.")
                found[path] = info
            except CheckpointError as error:
                if path not in self._warned:
                    log.warning("%s is left as it is, and does not count: %s", path, error)
                self._warned.add(path)
        return found


def new_aside(folder: Path) -> Path:
    """A new folder, beside a run's checkpoints, for checkpoints of steps that the run will take again."""
    return free_folder(folder / f"{ASIDE}{time.strftime('%Y-%m-%d_%H-%M-%S')}")


def final_name(name: str) -> str:
    """The name of a checkpoint's folder once it has taken the place of another of its step."""
    return name.removesuffix(NEW)


def step_of(checkpoint: Path) -> int:
    """The step that the folder of a checkpoint is named by."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def _validation_loss(info: dict[str, Any]) -> float | None:
    validation = info.get("validation")
    loss = validation.get("loss") if isinstance(validation, dict) else None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None
