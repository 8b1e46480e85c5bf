"""Writing so that a crash at any moment leaves either the old state or the new one, never half of either.

Nothing here knows what it writes: token files and checkpoints share these few functions.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from longmix.errors import StorageError
from longmix.locks import try_lock

HASH_CHUNK_BYTES = 1 << 20

LONGEST_NAME_BYTES = 120
"""The most bytes of the target's name in a temporary name; file systems take 255 in all."""

LOCKED = ".lock"
"""Suffix of the lock beside a temporary file."""

ANOTHER_HOST_SECONDS = 24 * 3600
"""Seconds that leftovers of another machine stay untouched, since some shared disks keep locks per machine."""

_OURS = re.compile(r"\.(?P<name>.*)\.(?P<host>[^.]+)\.(?P<token>r[0-9a-f]{16}|\d+)\.tmp", re.DOTALL)
"""Temporary names; earlier versions had the writer's pid in the place of the token, and no lock."""


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; call inside `atomic_directory`, or use `replace_json` for a file of its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def replace_json(path: Path, content: Any) -> None:
    """Replace one JSON file in a single step; see `replace_file`."""
    replace_file(path, lambda temporary: write_json(temporary, content))


def replace_text(path: Path, content: str) -> None:
    """Replace one text file in a single step; see `replace_file`."""
    replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace one file in a single step, so that a reader sees the old content or the new; `write` fills it.

    If `write` fails, what it wrote is removed; if the process is killed, `remove_leftovers` will.

    Raises:
        StorageError: it cannot be written, or the name is that of a folder or a device.
    """
    with storage_errors(path):
        _check_place(path)
        with _temporary(path) as temporary:
            write(temporary)
            sync_file(temporary)
            temporary.replace(path)
        sync_file(path.parent)


def check_replaceable(path: Path) -> None:
    """Refuse a path that `replace_file` cannot write to. Call it before work whose result goes there.

    Raises:
        StorageError: its folder is missing or may not be written to, or the name is that of a folder or a device.
    """
    with storage_errors(path):
        _check_place(path)
        _try_to_write(path.parent)


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise OSError(errno.EINVAL, "it is not a regular file")
    if not path.parent.is_dir():
        raise OSError(errno.ENOENT, f"there is no folder {path.parent}")


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to. Call it before work whose result goes there.

    Nothing is made: the folder that is there, or the nearest one above it, gets a file for a moment.

    Raises:
        StorageError: a file is in its place or above it, or nothing may be written there.
    """
    with storage_errors(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise OSError(errno.ENOTDIR, f"{there} is not a folder")
        _try_to_write(there)


def _try_to_write(folder: Path) -> None:
    """Make a file in a folder and delete it: permissions alone say nothing of read-only and special file systems."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    os.close(descriptor)
    Path(name).unlink()


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `target` into one `StorageError` that says why and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raised = StorageError(
            f"could not write {target}: {refusal.strerror or refusal}. What was there before is untouched; free some "
            "space or choose a folder you may write to, then run again."
        )
        raised.shared = getattr(error, "shared", False)
        raise raised from refusal


def refusal_of(error: Exception) -> OSError | None:
    """The OSError behind `error`: torch.save hides it, because it then fails to end its file."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary folder, and rename it to `target` once all of it is on the disk.

    A folder that carries the name `target` is therefore complete. If the block fails, what it wrote is removed; if the
    process is killed, a folder with a temporary name is left behind for `remove_leftovers`. If another process
    committed `target` first, its folder stays and ours is removed.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as temporary:
            temporary.mkdir()
            yield temporary
            for path in [*temporary.iterdir(), temporary]:
                sync_file(path)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            sync_file(target.parent)


def free_folder(folder: Path) -> Path:
    """Make a new folder: `folder`, or if that exists one with `_2`, `_3`, ... behind its name."""
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError


def remove_directory(target: Path) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted folder never looks complete.

    Of a link to a folder the link goes and the folder stays.

    Raises:
        StorageError: it may not be deleted.
    """
    with storage_errors(target):
        if target.is_symlink():
            target.unlink()
            return
        with _temporary(target) as doomed:
            target.rename(doomed)
            shutil.rmtree(doomed)


def replace_directory(target: Path, fresh: Path) -> None:
    """Rename the folder `fresh` to `target`. An older `target` is deleted; of a link only the link.

    Killed between its two renames, it leaves `fresh` under its own name and nothing under `target`.

    Raises:
        StorageError: it may not be renamed or deleted.
    """
    with storage_errors(target), _temporary(target) as doomed:
        target.rename(doomed)
        fresh.rename(target)
        _delete(doomed)
        sync_file(target.parent)


def remove_leftovers(parent: Path) -> None:
    """Delete the temporary files and folders in `parent` whose writers are gone; those of live ones stay.

    A writer locks a file beside what it writes, and the kernel frees the lock when the writer ends, however it ends.
    """
    names = {path.name.removesuffix(LOCKED) for path in parent.glob(".*.tmp*")}
    for name in names:
        found = _OURS.fullmatch(name)
        if found is None:
            continue
        with contextlib.suppress(OSError):  # another process may clear away as well
            if found["token"].isdigit():
                if found["host"] == _host() and not _is_process(int(found["token"])):
                    _delete(parent / name)
            elif found["host"] == _host() or _age(parent / name) > ANOTHER_HOST_SECONDS:
                _delete_if_free(parent / name)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A new name beside `target`. Whatever has this name at the end of the block is deleted."""
    name = os.fsdecode(os.fsencode(target.name)[:LONGEST_NAME_BYTES])
    temporary = target.with_name(f".{name}.{_host()}.r{secrets.token_hex(8)}.tmp")
    lock = try_lock(_lock_of(temporary))
    if lock is None:
        raise OSError(errno.EEXIST, f"{temporary.name} is another process's")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            _delete(temporary)
            lock.release(remove=True)
        lock.forget()


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(temporary.name + LOCKED)


def _delete_if_free(temporary: Path) -> None:
    """Delete a file that no living process holds. Writers lock before they begin, so theirs stay."""
    lock = try_lock(_lock_of(temporary))
    if lock is not None:
        try:
            _delete(temporary)
            lock.release(remove=True)
        finally:
            lock.forget()


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder, as far as permissions allow."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _age(temporary: Path) -> float:
    """Seconds since a file, or anything in a folder, changed."""
    paths = [path for path in (temporary, _lock_of(temporary)) if path.exists()]
    if temporary.is_dir():
        paths += temporary.iterdir()
    now = time.time()
    return now - max((path.lstat().st_mtime for path in paths), default=now)


def _is_process(pid: int) -> bool:
    """Whether there is a process of this number here, of whatever user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _host() -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[: LONGEST_NAME_BYTES // 2]


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value; the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
