"""Finding local files and identifying their content."""

import glob
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from longmix.errors import DataError
from longmix.files import sha256_of_file
from longmix.paths import user_path
from longmix.printable import printable

logger = logging.getLogger(__name__)

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
MOST_KINDS = 6
"""The most kinds of left-out files that a line of the log names."""


def find_files(key: str, paths: str | Sequence[str], suffixes: Sequence[str], beside: Sequence[str] = ()) -> list[Path]:
    """All files that one path or several name, sorted; each once, however many links and paths lead to it.

    Args:
        key: the setting the paths come from, for the error message.
        paths: each a file, a folder (all files below it that end in one of `suffixes`, in small or capital letters) or
            a glob pattern; `~` is expanded. Names that begin with a dot are passed over. Links are followed.
        suffixes: such as ".txt", the usual one first.
        beside: suffixes of files that belong to those, and are not spoken of.

    Raises:
        ConfigError: a path is empty.
        DataError: a path names no file, or a folder whose files end in several of `suffixes`.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    if not given:
        raise DataError(f"{key} is an empty list; give a file, a folder or a pattern")
    expanded = [user_path(key, path) for path in given]
    try:
        found = sorted({file for path in expanded for file in _find(key, path, suffixes, beside)})
        by_target: dict[Path, Path] = {}
        for file in found:
            target = file.resolve()
            if target not in by_target or file == target:
                by_target[target] = file
    except OSError as error:  # such as a folder that may be listed but not entered
        raise DataError(f"{key}: cannot read {error.filename}: {error.strerror or error}") from error
    return sorted(by_target.values())


def _find(key: str, path: Path, suffixes: Sequence[str], beside: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path.absolute()]
    if path.is_dir():
        return _files_below(key, path.absolute(), suffixes, beside)
    if path.exists():
        raise DataError(f"{key}: {path} is a device, pipe or socket; give a file, a folder or a pattern")
    files = [Path(file).absolute() for file in _matches(str(path)) if Path(file).is_file()]
    if not files:
        found_nothing = f"no file matches {path}" if glob.has_magic(str(path)) else f"there is no file {path}"
        raise DataError(f"{key}: {found_nothing} (the working folder is {Path.cwd()})")
    return files


def _files_below(key: str, folder: Path, suffixes: Sequence[str], beside: Sequence[str]) -> list[Path]:
    """The files with one of the wanted suffixes; one line in the log counts the others."""
    wanted: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in (path for inner in _folders(folder) for path in _entries(inner) if not path.is_dir()):
        suffix = _ending(path, suffixes) if path.is_file() else None
        if suffix is not None:
            wanted.setdefault(suffix, []).append(path)
        elif _ending(path, beside) is None:
            others.append(path)
    kinds = Counter(_kind(path) for path in others)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(MOST_KINDS))
    counts += ", ..." if len(kinds) > MOST_KINDS else ""
    if not wanted:
        named = [kind for kind, _ in kinds.most_common() if kind.startswith(".")]
        there = f"; there are {counts}" if others else "; there are no files"
        there += f". A pattern such as {folder}/**/*{named[0]} takes them" if named else ""
        sought = f"no file matches {folder}/**/*{suffixes[0]}"
        raise DataError(f"{key}: {sought} (the working folder is {Path.cwd()}){there}")
    if len(wanted) > 1:
        mixed = ", ".join(f"{len(files):,} {suffix}" for suffix, files in sorted(wanted.items()))
        raise DataError(
            f"{key}={folder} holds files of several kinds, which may be copies of each other: {mixed}. Give those of "
            f"one kind by a pattern, such as {folder}/**/*{max(wanted, key=lambda suffix: len(wanted[suffix]))}."
        )
    ((suffix, files),) = wanted.items()
    if others:
        logger.warning("%s=%s takes its %s %s; left out: %s", key, folder, f"{len(files):,}", suffix, counts)
    return files


def _ending(path: Path, suffixes: Sequence[str]) -> str | None:
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


def _kind(path: Path) -> str:
    if not path.is_file():
        return "broken links" if path.is_symlink() else "devices or pipes"
    suffix = "".join(path.suffixes[-2:]) if path.suffix in COMPRESSED else path.suffix
    return printable(suffix) or "without a suffix"


def _matches(pattern: str) -> Iterator[str]:
    """The matches of `glob.glob`, but no folder is entered twice: under `**`, links may lead in circles."""
    whole = f"{pattern}/*" if pattern.endswith("/**") or pattern == "**" else pattern
    head, mark, rest = whole.partition("**/")
    if not mark or (head and not head.endswith("/")):
        yield from glob.glob(whole, recursive=True)  # noqa: PTH207 - `Path.glob` takes no absolute pattern
        return
    starts = glob.glob(head) if glob.has_magic(head) else [head or "."]  # noqa: PTH207
    for start in sorted(starts):
        for folder in _folders(Path(start)):
            yield from _matches(f"{glob.escape(str(folder))}/{rest or '*'}")


def _folders(start: Path) -> Iterator[Path]:
    """A folder and those below it, each once: by its shortest path, and by its own rather than by that of a link."""
    seen: set[Path] = set()
    level = [start]
    while level:
        inner: list[Path] = []
        for folder in sorted(level, key=lambda path: (path.is_symlink(), path)):
            if (target := folder.resolve()) not in seen:
                seen.add(target)
                yield folder
                inner += [path for path in _entries(folder) if path.is_dir()]
        level = inner


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from error


class Stamp(NamedTuple):
    """Facts of a file that show whether it changed after it was hashed.

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
    """Refuse files that changed after they were hashed.

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
    contents = [content for size, content in facts if size]
    if repeats := len(contents) - len(set(contents)):
        logger.warning(
            "%s of the %s files below %s repeat the content of another; all of them count",
            *(f"{repeats:,}", f"{len(files):,}", common),
        )
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
