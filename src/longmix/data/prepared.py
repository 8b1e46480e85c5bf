"""Token files that were prepared elsewhere, read from a folder or from storage that `fsspec` knows, shard by shard."""

import contextlib
import errno
import functools
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from longmix.data.corpora.corpus import SPLITS
from longmix.data.corpora.retry import Patience
from longmix.data.text_data import PackedOptions, TokenData
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.sealed_folder import MANIFEST, read_manifest
from longmix.data.tokens.token_files import FORMAT_VERSION, TOKENIZER, TokenFile, check_manifest
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.windows import SHARDS_TOGETHER
from longmix.errors import ConfigError, DataError
from longmix.files import remove_leftovers, replace_file, sha256_of_file
from longmix.paths import user_path
from longmix.reading import read_json, require_regular, shortened

logger = logging.getLogger(__name__)

TRIES = 4
"""How often each file is tried."""

LEAST_SHARDS = 2 * SHARDS_TOGETHER
"""Local copies that training needs at a time: those of the current group of shards and of the next."""


@dataclass(frozen=True)
class RemoteShards:
    """The files of a token file in remote storage, and local copies of those in use; see `ShardSource`.

    Copies are named by their content, so that data which are made anew at the same place are never mixed with old ones.
    Several processes may share the copies: one that is deleted while another reads it stays readable there.

    Attributes:
        url: of the token file's folder, such as "s3://bucket/tokens/web-train-0123".
        local: folder of the copies.
        files: size and SHA-256 of each file.
        most_shards: copies that a process keeps.
    """

    url: str
    local: Path
    files: dict[str, dict[str, Any]]
    most_shards: int

    def fetch(self, name: str) -> Path:
        """A local copy of a shard. Each process checks the hash of a copy before it uses it for the first time."""
        path = self.copy_of(name)
        facts = self.files[name]
        if not _is_verified(path, facts["sha256"]):
            logger.info("fetching %s/%s, %s bytes", self.url, name, f"{facts['bytes']:,}")
            download(f"{self.url}/{name}", path, facts["sha256"])
            _remember(path)
        return path

    def copy_of(self, name: str) -> Path:
        """The path of a file's copy, whether or not the copy is there."""
        stem, dot, suffix = name.partition(".")
        return self.local / f"{stem}-{self.files[name]['sha256'][:16]}{dot}{suffix}"

    def remove_outdated(self) -> None:
        """Delete copies of files that were replaced since, because the data were made anew."""
        current = {self.copy_of(name).name for name in self.files}
        for path in self.local.glob("*.bin"):
            if path.name not in current:
                path.unlink(missing_ok=True)
        remove_leftovers(self.local)

    def release(self, name: str) -> None:
        """Delete the local copy, which is not needed for now."""
        self.copy_of(name).unlink(missing_ok=True)


_verified: dict[Path, tuple[int, int, int]] = {}
"""Copies whose hash this process has checked, with inode, size and time of change at that moment."""


def _is_verified(path: Path, sha256: str) -> bool:
    """Whether a copy is there and right. One that was altered does not count, so that it is replaced."""
    try:
        if _verified.get(path) == _identity(path):
            return True
        before = _identity(path)
        if sha256_of_file(path) != sha256:
            logger.warning("%s is not what was fetched; fetching it again.", path)
            return False
        _verified[path] = before
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Delete the folder {path.parent}."
        ) from error


def _remember(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process may have deleted it already
        _verified[path] = _identity(path)


def _identity(path: Path) -> tuple[int, int, int]:
    require_regular(path)
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Copy a remote file; it appears under its name once it is whole and right. Failures are tried again.

    Raises:
        DataError: it cannot be read, or is damaged.
        StorageError: the copy cannot be written.
    """
    import fsspec

    path.parent.mkdir(parents=True, exist_ok=True)
    patience = Patience(url, TRIES)
    while True:
        try:
            filesystem, remote = fsspec.core.url_to_fs(url)
            replace_file(path, lambda temporary: _copy(filesystem, remote, temporary, url, sha256))  # noqa: B023
            return
        except (DataError, FileNotFoundError, PermissionError, ImportError, ValueError) as error:
            raise DataError(f"{url} cannot be used: {error}") from error
        except _Unreachable as error:
            patience.pause(error, str(error))


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers of a full or read-only disk; another try does not help."""


class _Unreachable(Exception):
    """A failure of a remote file system that may pass."""


def _copy(filesystem: Any, remote: str, path: Path, url: str, sha256: str | None) -> None:
    try:
        filesystem.get_file(remote, str(path))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # each file system has its own kinds
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise _Unreachable(f"{type(error).__name__}: {error}") from error
    found = sha256_of_file(path)
    if sha256 is not None and found != sha256:
        raise DataError(f"expected SHA-256 {shortened(sha256)} but found {found}; upload {url} again")


def open_remote(url: str, cache_dir: Path, most_shards: int) -> TokenFile:
    """Open the token file in a remote folder: manifest and offsets are copied, shards when they are needed.

    Raises:
        DataError: a file cannot be read, is damaged, or of another format.
    """
    local = _local_folder(url, cache_dir)
    download(f"{url}/{MANIFEST}", local / MANIFEST)
    manifest = read_manifest(local / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = shortened(manifest.get("format_version"))
        raise DataError(f"{url} has format {found}; this version of longmix reads {FORMAT_VERSION}. Prepare it again.")
    source = RemoteShards(url, local, manifest["files"], most_shards)
    check_manifest(local / MANIFEST, manifest)
    token_file = TokenFile(local, manifest, source)
    token_file.check_sizes()
    source.remove_outdated()
    token_file.check_offsets()
    return token_file


def local_path(url: str) -> Path | None:
    """The folder that a path or URL means on this machine; None if it is elsewhere."""
    if "://" in url and not url.startswith("file://"):
        return None
    return Path(url.removeprefix("file://")).expanduser()


def find_splits(path: str) -> dict[str, str]:
    """The folders of the splits' token files at a path or URL.

    Raises:
        DataError: it cannot be listed, has no train split, or several token files of one split.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        listed = filesystem.ls(root, detail=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"data.path={path} cannot be listed: {error}") from error
    names = sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in listed)
    found = {split: [name for name in names if f"-{split}-" in name and name[0] != "."] for split in SPLITS}
    for split, folders in found.items():
        if len(folders) > 1:
            raise DataError(
                f"data.path={path} holds several token files of the {split} split: {', '.join(folders)}. Give a folder "
                "with one corpus and one tokenizer."
            )
    if not found["train"]:
        raise DataError(
            f"data.path={path} holds no token file of a train split; make it with prepare.py and give the cache_dir "
            "it names."
        )
    return {split: f"{path}/{folders[0]}" for split, folders in found.items() if folders}


def prepared_tokenizer(path: str | None, cache_dir: str = "~/.cache/longmix") -> Tokenizer:
    """The tokenizer that the token files at a path or URL were made with.

    Args:
        path: as `data.path`; None where the data are of another kind.
        cache_dir: where a remote one is copied to.

    Raises:
        ConfigError: there is no path, or it is empty.
        DataError: there are no token files, or the tokenizer cannot be read.
    """
    if path is None:
        raise ConfigError(
            "tokenizer=prepared is the tokenizer that the token files of data=prepared were made with: give "
            "data=prepared data.path=FOLDER too, or another tokenizer, such as tokenizer=bpe."
        )
    if not path.strip():
        raise ConfigError(
            "tokenizer.path, which follows data.path, is empty; was a variable of the shell not set? Give "
            "data.path=FOLDER."
        )
    folder = find_splits(path.rstrip("/"))["train"]
    local = local_path(folder)
    if local is None:
        local = _local_folder(folder, Path(cache_dir).expanduser())
        download(f"{folder}/{TOKENIZER}", local / TOKENIZER)
    try:
        state = read_json(local / TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/{TOKENIZER} cannot be read: {error}") from error
    return tokenizer_from_state(state, f"{folder}/{TOKENIZER}")


def _local_folder(url: str, cache_dir: Path) -> Path:
    name = f"{url.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return cache_dir / "remote" / name


@dataclass(frozen=True)
class PreparedCorpus:
    """Stands for a corpus whose token files are there and whose text is not.

    Attributes:
        name: what messages and logs call it.
        splits: those that training needs.
    """

    name: str
    splits: tuple[str, ...]

    def documents(self, split: str) -> Iterator[str]:
        """Refused: token files hold tokens, not text.

        Raises:
            DataError: always.
        """
        raise DataError("token files hold no text to train a tokenizer on; train with tokenizer=prepared.")

    def fingerprint(self) -> dict[str, Any]:
        """The kind alone; `PreparedData.fingerprint` identifies the token files."""
        return {"kind": "PreparedCorpus"}


class PreparedData(TokenData):
    """Data whose token files are there, in a folder or in remote storage; see `TokenData`.

    Args:
        path: a folder or URL with one token file's folder for each split, as `prepare.py` leaves them in its cache.
        tokenizer: the one they were made with.
        local_shards: copies of remote shards that a process keeps.
        order: see `TokenData`.
        options: see `TokenData`.

    Raises:
        ConfigError: `local_shards` is too small for the order of training.
        DataError: from the methods: there are no token files, several of one split, or of another tokenizer.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        *,
        local_shards: int = LEAST_SHARDS,
        order: str = "shuffled",
        **options: Unpack[PackedOptions],
    ) -> None:
        super().__init__(PreparedCorpus("prepared", SPLITS[:2]), tokenizer, order=order, **options)
        if local_shards < LEAST_SHARDS:
            raise ConfigError(
                f"data.local_shards={local_shards} must be at least {LEAST_SHARDS}: windows are shuffled within "
                f"{SHARDS_TOGETHER} shards at a time."
            )
        user_path("data.path", path)  # refuses an empty path
        self.path, self.local_shards = path.rstrip("/"), local_shards

    @functools.cached_property
    def folders(self) -> dict[str, str]:
        """Where each split lies."""
        return find_splits(self.path)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are; those of training are taken for granted until the path has been read."""
        return tuple(self.folders) if "folders" in self.__dict__ else self.corpus.splits

    def _check_room(self) -> None:
        shards = self.token_files("train")[0].shards
        if self.reads_on and local_path(self.folders["train"]) is None and len(shards) > self.local_shards:
            raise ConfigError(
                f"data.order=contiguous reads all {len(shards)} shards of the train split at a time, and "
                f"data.local_shards={self.local_shards} are kept at hand; set data.local_shards={len(shards)}, or "
                "data.order=shuffled."
            )
        super()._check_room()

    def prepare_data(self) -> None:
        """Open the token files that training needs.

        Raises:
            DataError: there are none of a validation split.
        """
        if "validation" not in self.folders:
            raise DataError(
                f"data.path={self.path} has no token file of a validation split, which training needs. Run prepare.py "
                "with data.corpus.validation_fraction above 0, or with files for data.corpus.validation."
            )
        super().prepare_data()

    def token_files(self, split: str) -> list[TokenFile]:
        """The token file of a split, alone in a list."""
        if split not in self.folders:
            raise DataError(f"data.path={self.path} has no split {split!r}; it has {', '.join(self.folders)}")
        return super().token_files(split)

    def _token_file_of(self, name: str, split: str) -> TokenFile:
        folder = self.folders[split]
        local = local_path(folder)
        opened = open_remote(folder, self.cache_dir, self.local_shards) if local is None else TokenFile.open(local)
        if opened.manifest["tokenizer"] != self.tokenizer.fingerprint():
            raise DataError(
                f"{folder} was made with another tokenizer than the one given; train with tokenizer=prepared."
            )
        return opened
