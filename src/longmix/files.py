"""Writing so that a crash at any moment leaves either the old state or the new one, never half of either.

Nothing here knows what it writes: token files and checkpoints share these few functions.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longmix.errors import StorageError

HASH_CHUNK_BYTES = 1 << 20


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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace one file in a single step, so that a reader sees the old content or the new; `write` fills it.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = _temporary(path)
    with storage_errors(path):
        write(temporary)
        sync_file(temporary)
        temporary.replace(path)


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
    """The operating system's refusal that `error` is or came of: torch.save meets one and fails to end its file."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill a folder beside `target` and give it the name `target` in one rename, once all of it is on the disk.

    A folder that carries the name `target` is therefore complete. If the block fails, what it wrote is removed; if the
    process is killed, a folder with a temporary name is left behind for `remove_leftovers`. If another process
    committed `target` first, its folder stays and ours is removed.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(target)
    try:
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(target: Path) -> None:
    """Delete a folder; it loses its name first, so that a half-deleted folder never looks complete.

    Raises:
        StorageError: it may not be deleted.
    """
    with storage_errors(target):
        doomed = target.rename(_temporary(target))
        shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Delete the temporary folders that killed processes of this machine left in `parent`; those of live ones stay."""
    for path in parent.glob(f".*.{_host()}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _temporary(target: Path) -> Path:
    """A name beside `target` that no other process uses, on this machine or on another that shares the disk."""
    return target.with_name(f".{target.name}.{_host()}.{os.getpid()}.tmp")


def _host() -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())
