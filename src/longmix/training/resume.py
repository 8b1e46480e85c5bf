"""The start of a run: fresh, or from a checkpoint that fits it, in a folder of its own."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longmix.checkpoints import CheckpointStore, open_checkpoint
from longmix.checkpoints.contents import check_run_state, rebuilding
from longmix.checkpoints.store import ASIDE, new_aside, step_of
from longmix.config import OriginRecord, TrainConfig, total_steps
from longmix.config.choices import choice_or_pattern
from longmix.data.staged import by_stage
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.files import remove_leftovers, storage_errors
from longmix.locks import Lock
from longmix.model.tuned_states_file import STATES_FILE
from longmix.reading import read_json
from longmix.training.choosing import Place, choose_start, write_config
from longmix.training.claims import remove_unused
from longmix.training.identity import CONFIG_FILE, ORIGIN, announce, check_continues
from longmix.training.run_state import SavedRun
from longmix.training.summary import SUMMARY_FILE

log = logging.getLogger(__name__)


@dataclass
class Start:
    """The start of a run, as a context; at its end the run's folder is free for others.

    A run that fails before `begin` leaves no folder that was not there before.

    Attributes:
        folder: the run's folder.
        saved: the run as its checkpoint holds it, or None for a fresh run.
        created: Hydra's folder for this process, removed if it stays empty because the run lives elsewhere.
        name: the run's name.
        is_new: the folder was made for this run.
        lock: of the folder; None in all processes but the first.
    """

    folder: Path
    saved: SavedRun | None
    created: Path
    name: str = ""
    is_new: bool = False
    lock: Lock | None = None
    begun: bool = False

    @property
    def step(self) -> int:
        """Steps already taken."""
        return 0 if self.saved is None else self.saved.step

    def __enter__(self) -> "Start":
        self.leave_created()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def begin(self, config: TrainConfig) -> None:
        """Write the configuration into the run's folder, and clear outdated files there.

        Later checkpoints of a run that goes back to an earlier one are moved aside, and what killed processes left is
        deleted. The configuration of a run that has nothing left to train stays as it is. Only the first process may
        call it, and only once everything that can be refused has been.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.begun = True
        store = CheckpointStore(self.folder / "checkpoints")
        for folder in (self.folder, self.folder / "evaluation", store.folder, *store.all()):
            remove_leftovers(folder)
        aside = store.set_aside_after(self.step)
        aside = _set_results_aside(self.folder, self.step, aside)
        if aside is not None:
            log.info("The run goes back to step %d; what it had saved after that is in %s.", self.step, aside)
        if self.saved is not None:
            announce(self.saved.written, config, self.step)
        if self.step < total_steps(config):
            write_config(self.folder, config)

    def config_of(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the run's own name, the checkpoint that it began from, and the mixer that it chose."""
        config = dataclasses.replace(config, name=self.name)
        if self.saved is None:
            return config
        written = self.saved.written
        if isinstance(config.keep, int):  # the run has measured which layers those are
            config = dataclasses.replace(config, mixer=choice_or_pattern("mixer", written["mixer"]))
        return dataclasses.replace(
            config, checkpoint=written.get("checkpoint"), origin=OriginRecord.of(written.get(ORIGIN))
        )

    def leave_created(self) -> None:
        """Remove the folder that Hydra made for this process, if the run lives elsewhere."""
        if self.folder != self.created:
            remove_unused(self.created)

    def release(self) -> None:
        """Unlock the folder, and remove it if it was made for a run that never began."""
        if self.lock is None or not self.lock.is_held:
            return
        if self.is_new and not self.begun:
            with contextlib.suppress(OSError):
                (self.folder / CONFIG_FILE).unlink(missing_ok=True)
        self.lock.release(remove=True)
        remove_unused(self.folder)

    def check_data(self, fingerprint: Mapping[str, object], begun: int = 1) -> None:
        """Refuse to continue on other data than the checkpoint saw.

        Args:
            fingerprint: of the data of this command.
            begun: how many stages of the run have begun; the data of later ones may be others by now.

        Raises:
            CheckpointError: names what differs.
        """
        if self.saved is None:
            return
        before, now = by_stage(self.saved.data_fingerprint), by_stage(fingerprint)
        changed: list[str] = []
        for number, (saved, own) in enumerate(list(zip(before, now, strict=False))[:begun]):
            place = f"stage {number + 1}: " if len(now) > 1 else ""
            changed += [
                f"{place}{key} was {saved.get(key)} and is {value}"
                for key, value in own.items()
                if saved.get(key) != value
            ]
            if not changed and saved != own:
                changed.append(f"{place}they were {saved} and are {own}")
        if changed:
            raise CheckpointError(
                f"the data are not those of the checkpoint: {'; '.join(changed)}. Restore the corpus, or start a new "
                "run."
            )


def find_start(
    config: TrainConfig,
    folder: Path,
    processes: Processes | None = None,
    *,
    named: bool = True,
    swept: Sequence[str] | None = None,
) -> Start:
    """Decide by `resume` where the run in Hydra's output `folder` begins, and hold its folder.

    Of several processes, which may each have a folder of their own and look at different moments, the first decides.

    Args:
        config: the words.
        folder: Hydra's, for this process.
        processes: all that train, which must all call it; None for one.
        named: the user chose the folder; it is the run's, and no other run is looked for.
        swept: words that differ between the runs of its sweep; None outside a sweep.

    Raises:
        ConfigError: the folder is another process's, or a fresh run would mix with an earlier one in it.
        CheckpointError: the checkpoint is missing, damaged, or of another model, corpus or batch.
    """
    processes = processes or Processes()
    locks: list[Lock] = []
    start: Start | None = None

    def choose() -> Place:
        place, lock = choose_start(config, folder, named, swept)
        locks.append(lock)
        return place

    try:
        place = processes.first(choose)
        lock = locks[0] if locks else None
        start = Start(place.folder, None, folder, place.name, place.is_new, lock)
        checkpoint = place.checkpoint
        if checkpoint is not None:
            found: list[SavedRun] = []
            # the processes exchange errors, and not what is loaded
            processes.each(lambda: found.append(_load(config, checkpoint)))
            start.saved = found[0]
    except BaseException:
        for lock in locks:
            (start or Start(lock.path.parent, None, folder, lock=lock)).release()
        if start is not None:
            start.leave_created()
        raise
    return start


def start_alone(config: TrainConfig, folder: Path, named: bool) -> Start:
    """The start that `find_start` would find, locked for the first of several processes before they are started."""
    place, lock = choose_start(config, folder, named)
    return Start(place.folder, None, folder, name=place.name, is_new=place.is_new, lock=lock)


def _set_results_aside(folder: Path, step: int, aside: Path | None) -> Path | None:
    """Move results of steps after `step` to their checkpoints; returns the folder, or None if there were none.

    Args:
        aside: where those checkpoints have just gone; None if there were none, as after a process that was killed when
            it had moved them, whose folder then takes the results too.

    Raises:
        StorageError: it may not be moved.
    """
    results = [path for path in folder.glob("evaluation/*") if _step_in(path.name) > step]
    if aside is not None or results or _steps_of_summary(folder) > step:
        results = [folder / STATES_FILE, *results, folder / SUMMARY_FILE]  # the last one tells of those that remain
    results = [path for path in results if path.is_file()]
    if results:
        with storage_errors(folder):
            names = [path.relative_to(folder) for path in results]
            aside = aside or _earlier_aside(folder / "checkpoints", step, names)
            for path, name in zip(results, names, strict=True):
                (aside / name).parent.mkdir(exist_ok=True)
                path.rename(aside / name)
    return aside


def _earlier_aside(checkpoints: Path, step: int, names: list[Path]) -> Path:
    """The folder to which later checkpoints were moved last, unless it has their results already; else a new one."""
    for folder in sorted(checkpoints.glob(f"{ASIDE}*"), reverse=True):
        latest = CheckpointStore(folder).latest()
        if latest is not None and step_of(latest) > step and not any((folder / name).exists() for name in names):
            return folder
    return new_aside(checkpoints)


def _step_in(name: str) -> int:
    found = re.findall(r"step-?(\d+)", name)
    return int(found[-1]) if found else -1


def _steps_of_summary(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        steps = read_json(folder / SUMMARY_FILE).get("steps")
        return steps if isinstance(steps, int) else -1
    return -1


def _load(config: TrainConfig, checkpoint: Path) -> SavedRun:
    opened = open_checkpoint(checkpoint)
    content = opened.rest()
    if "run" not in content:
        raise CheckpointError(f"{checkpoint} holds a model and no run to continue; begin from it with checkpoint=.")
    with rebuilding(checkpoint):
        check_run_state(content)
        saved = SavedRun.of(opened, content)
    check_continues(saved.written, config, checkpoint, saved.step)
    return saved
