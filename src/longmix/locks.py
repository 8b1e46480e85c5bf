"""Locks between processes: who holds a file's lock is alone with what the file stands for.

The kernel frees a lock when its process ends, however it ends, so that nothing has to be cleaned up after a `kill -9`.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Error numbers of file systems without locks, such as Lustre without its mount option `flock`."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Lock:
    """A lock that this process holds until it is released, or until the process ends.

    Processes that this one forks do not hold it, nor do those that it starts.

    Attributes:
        path: the locked file or folder.
    """

    def __init__(self, path: Path, descriptor: int, owner: Path | None = None) -> None:
        self.path, self._descriptor, self._owner = path, descriptor, owner
        _held.add(self)

    @property
    def descriptor(self) -> int:
        """The open file; `adopt` turns it into a lock in a process that it is passed on to."""
        return self._descriptor

    @property
    def is_held(self) -> bool:
        """Whether this process still holds the lock: it was neither released nor passed on."""
        return self._descriptor >= 0

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; releasing twice does nothing.

        Args:
            remove: delete the locked file too, before anybody else can lock it.
        """
        if self._descriptor < 0:
            return
        if remove and _is_at(self._descriptor, self.path):
            self.path.unlink()
        if self._owner is not None:
            self._owner.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Close the file and leave the lock to the process that it was passed on to, if there is one."""
        _held.discard(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def try_lock(path: Path, note: str | None = None) -> Lock | None:
    """The lock of a file, or None if another process (or another part of this one) holds it; it never waits.

    Where the file system knows no locks, a file `.NAME.owner` beside it stands for the lock. It names machine, process
    and the time when the process began; it is stale once that process is gone, which only its own machine can tell.

    Args:
        path: a file, made if it is missing, whose folder exists; or a folder.
        note: text to put into the file while it is held, as `holder` reads it; None leaves the file's content alone.

    Raises:
        OSError: the file can be neither opened nor made.
    """
    while True:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags, 0o644)  # Python opens files so that programs it starts do not inherit them
        owner = None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                owner = path.with_name(f".{path.name}.owner")
                if not _own(owner):
                    os.close(descriptor)
                    return None
            if _is_at(descriptor, path):
                if note is not None:
                    _write(descriptor, note)
                return Lock(path, descriptor, owner)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it before has deleted the file: this one is nobody's


def adopt(path: Path, descriptor: int, note: str | None = None) -> Lock:
    """The lock that the process which started this one held, and passed on as an open file.

    Raises:
        OSError: the descriptor is no open file.
    """
    os.set_inheritable(descriptor, False)
    if note is not None:
        _write(descriptor, note)
    owner = path.with_name(f".{path.name}.owner")
    if owner.exists():
        owner.write_text(json.dumps(_process()), encoding="utf-8")
    return Lock(path, descriptor, owner if owner.exists() else None)


def holder(path: Path) -> str:
    """What the process that holds a lock wrote into the file; empty if it wrote nothing."""
    with contextlib.suppress(OSError):
        return path.read_bytes()[:1000].decode(errors="replace").strip()
    return ""


_held: set[Lock] = set()


def _close_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_close_all)  # the lock stays with the parent alone, and ends with it


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write(descriptor: int, note: str) -> None:
    os.ftruncate(descriptor, 0)
    try:
        os.pwrite(descriptor, note.encode(), 0)
    except OSError as error:
        if error.errno not in FULL:  # a lock without its note is a lock; what is written next says that it is full
            raise


def _own(owner: Path) -> bool:
    """Make the file that stands for a lock. A file whose process is gone is replaced."""
    for _ in range(2):
        try:
            descriptor = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if not _remove_stale(owner):
                return False
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(_process(), stream)
        return True
    return False


def _remove_stale(owner: Path) -> bool:
    """Delete the file of a process that is gone; returns whether making the file may be tried again."""
    try:
        content = owner.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    with contextlib.suppress(ValueError):
        if _is_alive(json.loads(content)):
            return False
        aside = owner.with_name(f"{owner.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            owner.rename(aside)
            if aside.read_text(encoding="utf-8") == content:
                return True
            os.link(aside, owner)  # another process was faster, and this file is already its
        except OSError:
            pass
        finally:
            aside.unlink(missing_ok=True)
    return False


def _process(pid: int | None = None) -> dict[str, Any]:
    """The identity of a process: machine, pid and, where the system says it, namespace and start time."""
    pid = os.getpid() if pid is None else pid
    facts: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "namespace": None, "start": None}
    with contextlib.suppress(OSError):
        facts["namespace"] = str(Path("/proc/self/ns/pid").readlink())
    with contextlib.suppress(OSError, IndexError):
        facts["start"] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return facts


def _is_alive(facts: dict[str, Any]) -> bool:
    """Whether a process may still be there; one of another machine or container always may."""
    here = _process()
    if facts.get("host") != here["host"] or facts.get("namespace") != here["namespace"]:
        return True
    pid = facts.get("pid")
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return facts.get("start") is None or _process(pid)["start"] in (None, facts["start"])
