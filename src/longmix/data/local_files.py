"""Finding local files and identifying their content."""

import glob
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_file


def user_path(key: str, value: str | os.PathLike[str]) -> Path:
    """The path that a setting gives, with `~` expanded.

    Args:
        key: the setting, for the error message.
        value: as it was given.

    Raises:
        ConfigError: it is empty, as an unset variable of the shell leaves it, or no path.
    """
    text = os.fspath(value)
    if not text.strip():
        raise ConfigError(f"{key} is empty; was a variable of the shell not set? Give a path, or leave {key} out.")
    if "\0" in text:
        raise ConfigError(f"{key}={text!r} holds a NUL character, which no path can.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise ConfigError(f"{key}={text}: {error}") from error


def find_files(key: str, paths: str | Sequence[str], suffix: str) -> list[Path]:
    """All files that one path or several name, sorted and without repeats.

    Args:
        key: the setting the paths come from, for the error message.
        paths: each a file, a folder (all files ending in `suffix` below it) or a glob pattern; `~` is expanded.
        suffix: such as ".txt".

    Raises:
        DataError: a path names no file.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    if not given:
        raise DataError(f"{key} is an empty list; give a file, a folder or a pattern")
    return sorted({file for path in given for file in _find(key, Path(path).expanduser(), suffix)})


def _find(key: str, path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path.absolute()]
    pattern = f"{glob.escape(str(path))}/**/*{suffix}" if path.is_dir() else str(path)
    # `Path.glob` takes no absolute pattern
    files = [Path(file).absolute() for file in glob.glob(pattern, recursive=True) if Path(file).is_file()]  # noqa: PTH207
    if not files:
        found_nothing = f"no file matches {pattern}" if glob.has_magic(pattern) else f"there is no file {path}"
        raise DataError(f"{key}: {found_nothing} (the working folder is {Path.cwd()})")
    return files


class Stamp(NamedTuple):
    """What shows that a file has not changed since it was hashed.

    Attributes:
        inode, size, changed_at: of the file before it was hashed; `changed_at` in nanoseconds.
        sha256: of a file that had changed shortly before, so that another change could bear the same time; else None.
    """

    inode: int
    size: int
    changed_at: int
    sha256: str | None = None


RECENT_NANOSECONDS = 2 * 10**9
"""File systems tell two changes apart only if so much lies between them."""


def check_unchanged(stamps: dict[Path, Stamp]) -> None:
    """Refuse files that are no longer what was hashed.

    Raises:
        DataError: names the file.
    """
    for file, stamp in stamps.items():
        try:
            changed = _stamp(file) != stamp._replace(sha256=None)
            changed = changed or (stamp.sha256 is not None and sha256_of_file(file) != stamp.sha256)
        except OSError:
            changed = True
        if changed:
            raise DataError(
                f"{file} changed while it was read, and its tokens would pass for those of the old content. Leave the "
                "files as they are until they have been read, and run again."
            )


def _stamp(file: Path) -> Stamp:
    facts = file.stat()
    return Stamp(facts.st_ino, facts.st_size, facts.st_mtime_ns)


def identify_files(files: Sequence[Path], stamps: dict[Path, Stamp] | None = None) -> dict[str, Any]:
    """Count, total size and one SHA-256 over the relative name, size and content of each file; no time stamps.

    Args:
        files: to read.
        stamps: is given a stamp of each file, for `check_unchanged`.

    Raises:
        DataError: a file cannot be read.
    """
    common = Path(os.path.commonpath([file.parent for file in files]))
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_stamp_and_hash, files))
    facts = [(stamp.size, content) for stamp, content in found]
    if stamps is not None:
        now = time.time_ns()
        for file, (stamp, content) in zip(files, found, strict=True):
            recent = now - stamp.changed_at < RECENT_NANOSECONDS
            stamps[file] = stamp._replace(sha256=content) if recent else stamp
    digest = hashlib.sha256()
    for file, (size, content) in zip(files, facts, strict=True):
        digest.update(f"{file.relative_to(common).as_posix()}\0{size}\0{content}\n".encode(errors="surrogateescape"))
    return {"files": len(files), "bytes": sum(size for size, _ in facts), "sha256": digest.hexdigest()}


def refuse_overlap(sources: dict[str, list[Path]]) -> None:
    """Refuse a file that belongs to two splits.

    Raises:
        DataError: names the file and the splits.
    """
    owners: dict[Path, str] = {}
    for split, files in sources.items():
        for file in files:
            owner = owners.setdefault(file.resolve(), split)
            if owner != split:
                raise DataError(f"{file} is given for both the {owner} and the {split} split; keep them apart")


def _stamp_and_hash(file: Path) -> tuple[Stamp, str]:
    try:
        return _stamp(file), sha256_of_file(file)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
