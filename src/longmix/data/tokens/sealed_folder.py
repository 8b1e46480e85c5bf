"""Sealed folders: their manifest holds the size and SHA-256 of each file, and a hash of the manifest itself.

Token files and trained tokenizers are both kept this way, so that a damaged, truncated, foreign or outdated file is
refused by name before anything is computed from it.
"""

import contextlib
import fcntl
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from longmix.errors import DataError, StorageError
from longmix.files import atomic_directory, remove_leftovers, sha256_of_file, sha256_of_json, storage_errors, write_json
from longmix.reading import read_json, require_regular, shortened

logger = logging.getLogger(__name__)

Verify = Literal["auto", "size", "sha256"]

MANIFEST = "manifest.json"
AUTO_HASH_LIMIT_BYTES = 1 << 30


def build_once(folder: Path, write: Callable[[Path], dict[str, Any]]) -> bool:
    """Build a sealed folder unless it is there already; of several processes that want it, one builds it.

    Args:
        folder: the folder.
        write: fills the folder it is given with files and returns the entries of the manifest.

    Returns:
        Whether this process built it.

    Raises:
        StorageError: the folder cannot be written.
    """
    if folder.is_dir():
        return False
    with _one_at_a_time(folder):
        if folder.is_dir():
            return False
        remove_leftovers(folder.parent)
        try:
            with atomic_directory(folder) as temporary:
                seal(temporary, write(temporary))
        except (StorageError, FileNotFoundError):
            # without locks, another process may have built it just now, and removed what both were working on
            if not folder.is_dir():
                raise
            return False
    return True


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other builders of `folder`, to save work; if two built at once, either result would be right."""
    lock = folder.with_name(f".{folder.name}.lock")
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process to build %s", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of an otherwise complete folder: `content`, and size and SHA-256 of every file."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in folder.iterdir()}
    sealed = {**content, "files": files}
    write_json(folder / MANIFEST, {**sealed, "manifest_sha256": sha256_of_json(sealed)})


def open_sealed(folder: Path, expected: dict[str, Any], verify: Verify = "auto") -> dict[str, Any]:
    """Return the manifest of a sealed folder after checking the folder against it.

    Args:
        folder: what `build_once` wrote.
        expected: entries the manifest must hold with these very values, such as the format version or content key.
        verify: "size" compares sizes only, "sha256" hashes every file, "auto" hashes files of at most 1 GiB.

    Raises:
        DataError: names the file, what was expected and found, and the cure.
    """
    manifest = read_manifest(folder / MANIFEST)
    for name, value in expected.items():
        if manifest.get(name) != value:
            raise damaged(folder / MANIFEST, f"its {name} should be {value!r} but is {manifest.get(name)!r}")
    for name, facts in manifest["files"].items():
        _check_file(folder / name, facts, verify)
    return manifest


def is_hashed(size: int, verify: Verify) -> bool:
    """Whether opening a folder hashes a file of this many bytes."""
    return verify == "sha256" or (verify == "auto" and size <= AUTO_HASH_LIMIT_BYTES)


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that cannot be used; the cure is always to let its folder be built again."""
    return DataError(
        f"{path} cannot be used: {shortened(reason)}. Delete the folder {path.parent}; it will be built again."
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file, without its own hash.

    Raises:
        DataError: it is missing, or not what longmix wrote there.
    """
    try:
        manifest = read_json(path)
    except FileNotFoundError as error:
        raise damaged(path, "it does not exist") from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read as JSON ({error})") from error
    if "manifest_sha256" not in manifest or not _names_files(manifest.get("files")):
        raise damaged(path, "it is not a manifest written by longmix")
    found = manifest.pop("manifest_sha256")
    expected = sha256_of_json(manifest)
    if found != expected:
        raise damaged(path, f"its content has SHA-256 {expected} but it says {found}")
    return manifest


def _names_files(files: Any) -> bool:
    """Whether a manifest names its files by plain names, without a path, each with size and hash."""
    return isinstance(files, dict) and all(
        "/" not in name
        and name not in ("", ".", "..")
        and isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
        for name, facts in files.items()
    )


def _check_file(path: Path, facts: dict[str, Any], verify: Verify) -> None:
    try:
        require_regular(path)
        size = path.stat().st_size
    except OSError as error:
        raise damaged(path, f"expected {facts['bytes']:,} bytes but {error.strerror or error}") from error
    if size != facts["bytes"]:
        raise damaged(path, f"expected {facts['bytes']:,} bytes but found {size:,}")
    if not is_hashed(size, verify):
        return
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from error
    if found != facts["sha256"]:
        raise damaged(path, f"expected SHA-256 {facts['sha256']} but found {found}")
