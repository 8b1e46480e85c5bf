"""A run's folder is one process's at a time: its lock is held for the run's life, and taken before anything is read."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from longmix.distributed.ranks import was_restarted
from longmix.errors import ConfigError
from longmix.files import storage_errors
from longmix.locks import Lock, adopt, holder, try_lock

LOCK_FILE = ".lock"
PASSED_ON = "LONGMIX_RUN_LOCK"
"""Set for the first process that our launcher starts: the open file and the path of the lock that it takes over."""

PATIENCE_SECONDS = 60.0
"""Seconds that a command waits for another to choose its run, or for a process that a launcher just ended."""

MOMENT_SECONDS = 2.0
"""Seconds that a lock without a name on it is waited for: its holder is about to sign it, or only looked."""

POLL_SECONDS = 0.05


def claim(folder: Path) -> Lock:
    """Make a run's folder if it is not there, and hold it until the lock is released or this process ends.

    Raises:
        ConfigError: another process holds it; says which.
        StorageError: it cannot be written.
    """
    began = time.monotonic()
    patience = PATIENCE_SECONDS if was_restarted() else 0  # whoever was ended may need a moment
    while (lock := try_claim(folder)) is None:
        least = 0 if holder(folder / LOCK_FILE) else MOMENT_SECONDS
        if time.monotonic() >= began + max(patience, least):
            raise ConfigError(in_use(folder))
        time.sleep(POLL_SECONDS)
    return lock


def claim_new(folder: Path) -> tuple[Path, Lock]:
    """Hold a folder that nobody uses or has used: `folder`, or with `_2`, `_3`, ... behind its name.

    Raises:
        StorageError: none can be made.
    """
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        lock = try_claim(place)
        if lock is None:
            continue
        if not _content(place):
            return place, lock
        lock.release(remove=True)
    raise AssertionError


def try_claim(folder: Path) -> Lock | None:
    """The lock of a run's folder, or None if another process holds it.

    Raises:
        StorageError: it cannot be written.
    """
    passed = os.environ.get(PASSED_ON, "").partition(":")
    note = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    path = folder / LOCK_FILE
    with storage_errors(folder):
        if passed[2] == str(path.absolute()):
            del os.environ[PASSED_ON]
            return adopt(path, int(passed[0]), note)
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return try_lock(path, note)
            except FileNotFoundError:  # one that was refused has just removed the folder
                if path.is_symlink():  # to nowhere
                    raise


def is_claimed(folder: Path) -> bool:
    """Whether a process holds a run's folder right now."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    with contextlib.suppress(OSError):
        lock = try_lock(path)
        if lock is None:
            return True
        lock.release(remove=True)
    return False


def in_use(folder: Path) -> str:
    """The message for a folder that another process holds."""
    deadline = time.monotonic() + MOMENT_SECONDS
    while not (who := holder(folder / LOCK_FILE)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    who = who or "another process"
    return f"{folder} is being trained right now by {who}. Wait until it ends, stop it, or choose another name."


@contextlib.contextmanager
def deciding(parent: Path) -> Iterator[None]:
    """One command at a time looks through the runs in `parent` and takes one; the next sees what it took.

    Raises:
        StorageError: the folder cannot be written.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(parent / LOCK_FILE)) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        if lock is not None:
            lock.release(remove=True)


def remove_unused(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.absolute() != Path.cwd():
        with contextlib.suppress(OSError):
            folder.rmdir()


def _content(folder: Path) -> bool:
    return any(not path.name.lstrip(".").startswith(LOCK_FILE.lstrip(".")) for path in folder.iterdir())
