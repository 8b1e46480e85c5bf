"""Chooses the folder and checkpoint in which a command's run continues; the chosen folder is locked at once."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from longmix.checkpoints import CheckpointStore, chosen_checkpoint, find_checkpoint
from longmix.checkpoints.verify import INFO_FILE
from longmix.config import Plain, TrainConfig, plain
from longmix.distributed.ranks import was_restarted
from longmix.errors import ConfigError
from longmix.files import replace_file
from longmix.locks import Lock
from longmix.naming import RUNS
from longmix.reading import read_yaml
from longmix.training.claims import LOCK_FILE, claim, claim_new, deciding, in_use, is_claimed, remove_unused
from longmix.training.identity import CONFIG_FILE, changes, is_unknown_origin, phrases, read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The place where a run begins or continues.

    Attributes:
        folder: the run's.
        name: the run's.
        checkpoint: it begins from, or None for a fresh run.
        is_new: nothing was in the folder.
    """

    folder: Path
    name: str
    checkpoint: Path | None
    is_new: bool = False


def choose_start(
    config: TrainConfig, folder: Path, named: bool, swept: Sequence[str] | None = None
) -> tuple[Place, Lock]:
    """The place where the run of `folder` begins or continues, and the lock of that place.

    A command that its launcher runs again after a failure continues what it began in the same folder, whatever `resume`
    says. A run there of other settings, or that another word of `resume` began, is not its own.

    Raises:
        ConfigError, CheckpointError: as in `find_start`, but for what only a checkpoint's content tells.
    """
    resume, in_sweep = config.resume, swept is not None
    if named and not in_sweep:
        _check_place(folder)
    if resume == "auto" and (in_sweep or not named):
        return _newest_or_new(config, folder, named, swept)
    if resume not in (None, "auto"):
        return _from_checkpoint(config, folder, named or in_sweep, resume)
    return _in_own_folder(config, folder) if named or in_sweep else _new(config, folder)


def write_config(folder: Path, config: TrainConfig) -> None:
    """Replace a run's `config.yaml` in one step; one that says the same stays as it is.

    Raises:
        StorageError: it cannot be written.
    """
    path, content = folder / CONFIG_FILE, plain(config)
    with contextlib.suppress(ConfigError):
        if read_yaml(path) == content:
            return
    text = OmegaConf.to_yaml(OmegaConf.create(content))
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _in_own_folder(config: TrainConfig, folder: Path) -> tuple[Place, Lock]:
    lock = claim(folder)
    with _released_if_refused(lock):
        own = _newest(folder)
        if own is not None and config.resume is None and not (was_restarted() and _began_so(folder, config)):
            raise ConfigError(
                f"{folder} already holds a run ({own.name}); continue it with resume=auto, or choose another name."
            )
        if own is None and config.resume == "auto":
            log.info("resume=auto: %s holds no checkpoint; starting a new run.", folder)
        return _at(config, folder, own), lock


def _newest_or_new(config: TrainConfig, folder: Path, named: bool, swept: Sequence[str] | None) -> tuple[Place, Lock]:
    """Among the runs beside this one, or a sweep's beside this sweep, continue the newest of this configuration."""
    in_sweep = swept is not None
    parent = folder.parent.parent if in_sweep else folder.parent
    with deciding(parent):
        counting = (*(swept or ()), *(("name",) if named else ()))
        found = []
        for run in parent.glob("*/*" if in_sweep else "*"):
            saved = read_config(run) if run.is_dir() else None
            if saved is not None and not changes(saved, config, counting):
                found.append(run)
            elif saved is not None and is_unknown_origin(saved, config):
                log.info("%s did not keep which weights it began from; resume=%s continues it.", run, run)
        for run in found:
            if is_claimed(run):
                raise ConfigError(f"{in_use(run)} It has this configuration, and resume=auto would continue it.")
        latest = {run: CheckpointStore(run / "checkpoints").latest() for run in found}
        with_checkpoint = {run: path for run, path in latest.items() if path is not None}
        if with_checkpoint:
            run = max(with_checkpoint, key=lambda run: with_checkpoint[run].stat().st_mtime)
            lock = claim(run)
            with _released_if_refused(lock):
                return _at(config, run, _newest(run)), lock
        log.info("resume=auto: no earlier run of this configuration; starting a new one.")
        if not in_sweep:
            return _new(config, folder)
        return _new_in_sweep(config, folder)


def _new_in_sweep(config: TrainConfig, folder: Path) -> tuple[Place, Lock]:
    lock = claim(folder)
    with _released_if_refused(lock):
        own = _newest(folder)
        if own is not None:
            saved: Plain = read_config(folder) or {}
            raise ConfigError(
                f"{folder} already holds a run with other settings: {phrases(changes(saved, config))}. Choose another "
                "hydra.sweep.dir."
            )
        return _at(config, folder, None), lock


def _from_checkpoint(config: TrainConfig, folder: Path, named: bool, resume: str) -> tuple[Place, Lock]:
    """Continue a checkpoint: in its run if that has the chosen folder, or if none was chosen and it is the newest."""
    checkpoint = chosen_checkpoint(resume)
    run = _run_of(checkpoint)
    latest = None if run is None else CheckpointStore(run / "checkpoints").latest()
    newest = latest is not None and _is_same(latest, checkpoint)  # one of the two may be relative
    if run is None or not (_is_same(run, folder) or (newest and not named)):
        if not named:
            log.info("%s is not the newest checkpoint of its run; a new run continues it.", checkpoint)
            place, lock = _new(config, folder)
            return dataclasses.replace(place, checkpoint=checkpoint), lock
        lock = claim(folder)
        with _released_if_refused(lock):
            own = _newest(folder)
            if own is not None and not (was_restarted() and _began_so(folder, config)):
                raise ConfigError(
                    f"{folder} already holds a run ({own.name}), and {checkpoint} is not of it; continue it with "
                    "resume=auto, or choose another name."
                )
            return _at(config, folder, own or checkpoint), lock
    lock = claim(run)
    with _released_if_refused(lock):
        own = _newest(run)
        names_a_run = not (Path(resume) / INFO_FILE).is_file()
        if own is not None and (names_a_run or (was_restarted() and _began_so(run, config))):
            checkpoint = own  # another process may have gone on until it gave the folder up
        return _at(config, run, find_checkpoint(checkpoint)), lock


def _new(config: TrainConfig, folder: Path) -> tuple[Place, Lock]:
    """A fresh run in a folder named by the clock. It writes its configuration before any other command looks."""
    place, lock = claim_new(folder)
    name = config.name if place == folder else config.name + place.name.removeprefix(folder.name)
    with _released_if_refused(lock):
        write_config(place, dataclasses.replace(config, name=name))
    return Place(place, name, None, is_new=True), lock


def _at(config: TrainConfig, folder: Path, checkpoint: Path | None) -> Place:
    """A run in a folder that may hold one; if it continues that run, it keeps its name.

    A fresh run writes its configuration before any other command can look for it.
    """
    is_new = all(path.name in (CONFIG_FILE, LOCK_FILE) for path in folder.iterdir())
    name = config.name
    run = None if checkpoint is None else _run_of(checkpoint)
    if run is not None and _is_same(run, folder):
        name = str((read_config(run) or {}).get("name") or name)
    if checkpoint is None:
        write_config(folder, config)
    return Place(folder, name, checkpoint, is_new)


def _check_place(folder: Path) -> None:
    """Refuse a name inside another run's folder, or that of a folder of runs: each would be mixed with the other."""
    names = [above.name for above in folder.parents]
    if RUNS not in names:
        return
    for above in folder.parents[: names.index(RUNS)]:
        if (above / CONFIG_FILE).exists():
            raise ConfigError(f"{above} is a run, and {folder} would lie in it; choose another name.")
    if not (folder / CONFIG_FILE).exists():
        inside = next(folder.glob(f"*/{CONFIG_FILE}"), None)
        if inside is not None:
            raise ConfigError(f"{folder} holds other runs, as {inside.parent.name}; choose another name.")


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run whose lock this process holds."""
    store = CheckpointStore(folder / "checkpoints")
    store.recover()
    return store.latest()


def _run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, also if the run has set the checkpoint aside."""
    parents = checkpoint.absolute().parents
    return next((folder.parent for folder in parents if folder.name == "checkpoints"), None)


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _began_so(folder: Path, config: TrainConfig) -> bool:
    """Whether the configuration in a folder says that this `resume` began the run with these settings."""
    saved = read_config(folder)
    if saved is None or saved.get("resume") != config.resume:
        return False
    return not changes(saved, config).keys() - {"checkpoint"}


@contextlib.contextmanager
def _released_if_refused(lock: Lock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.release(remove=True)
        remove_unused(lock.path.parent)
        raise
