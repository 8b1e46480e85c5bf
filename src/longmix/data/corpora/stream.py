"""Data sets streamed from the Hugging Face hub or remote storage; none of it is stored here.

A split is read file by file, and a Parquet file by row groups. A reading that ends in the middle goes on there later:
files and row groups that are done are not asked for again; of another kind of file what comes before is.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from longmix.data.corpora.hub_access import quiet_libraries
from longmix.data.corpora.local_files import identify_files
from longmix.data.corpora.record_files import RecordFiles
from longmix.data.corpora.records import texts_of
from longmix.data.corpora.retry import Patience, reason_of
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json

TRIES = 8
"""Tries of a stream in a row; their pauses take two minutes in all."""

LASTING = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, gzip.BadGzipFile, zlib.error),
    *(ImportError, ValueError, TypeError, LookupError),
)
"""Kinds of failure that another try would meet again; readers' errors of format are ValueErrors."""

COMMIT = re.compile(r"hf://(?:datasets/)?[^@]+@([0-9a-f]{40})/")
"""A file of the hub with the commit that fixes its content."""

TAGS = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "checksum",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
"""Names that file systems give to the mark of a content's version, the strongest first."""

IDENTIFYING_THREADS = 16
TOGETHER = 1000
"""Records that are taken out of Arrow at once."""


@dataclass(frozen=True)
class Limit:
    """A limit on how much of a source is read, from its beginning.

    Attributes:
        max_documents: the first so many; None for all.
        max_bytes: until they have so many bytes in UTF-8, with the document that reaches it; None for all.

    Raises:
        ConfigError: a number is below 1.
    """

    max_documents: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if value < 1:
                raise ConfigError(f"data.corpus.{name}={value} must be at least 1, or null for all.")

    def as_dict(self) -> dict[str, int]:
        """The limits that are set."""
        given = {"max_documents": self.max_documents, "max_bytes": self.max_bytes}
        return {name: value for name, value in given.items() if value is not None}

    def reached(self, documents: int, num_bytes: int) -> bool:
        """Whether these counts reach the limit."""
        enough_documents = self.max_documents is not None and documents >= self.max_documents
        return enough_documents or (self.max_bytes is not None and num_bytes >= self.max_bytes)

    def take(self, texts: Iterator[str]) -> Iterator[str]:
        """The texts up to the limit; nothing is read beyond it."""
        documents = num_bytes = 0
        while not self.reached(documents, num_bytes) and (text := next(texts, None)) is not None:
            yield text
            documents += 1
            num_bytes += self.count(text)

    def count(self, text: str) -> int:
        """The bytes of a text, or 0 if no limit counts bytes."""
        return len(text.encode(errors="surrogatepass")) if self.max_bytes is not None else 0


class Stream:
    """The files of a split as records that come one after the other; small to pickle.

    Args:
        records: an `IterableDataset`, or `RecordFiles`.
        files: its paths or URLs.
        field: the field that holds the text.
        source_name: for messages.
    """

    def __init__(self, records: Any, files: Sequence[str], field: str, source_name: str) -> None:
        self._records, self._files, self.field, self._source_name = records, files, field, source_name

    @property
    def num_files(self) -> int:
        """The number of files, each of which can be read alone."""
        return self._records.num_shards

    def name(self, number: int) -> str:
        """The name of a file in messages."""
        file = self._files[number] if len(self._files) == self.num_files else f"file {number} (counted from 0)"
        return f"{file} of {self._source_name}"

    def texts(self, number: int, first: int) -> Iterator[str]:
        """The documents of a file from record `first` on."""
        quiet_libraries()
        records = self._records.shard(num_shards=self.num_files, index=number)
        groups, skipped = self._rest(records, number, first) if first else ([records], 0)
        rows = islice((row for group in groups for row in _rows(group, self.field)), first - skipped, None)
        return texts_of(rows, self.field, self.name(number), first)

    def _rest(self, records: Any, number: int, first: int) -> tuple[list[Any], int]:
        """The file from near record `first` on, as its format allows, and the number of records left out before."""
        file = self._files[number] if len(self._files) == self.num_files else ""
        if not hasattr(records, "reshard") or not file.endswith(".parquet"):
            return [records], 0
        groups = records.reshard()
        ends = np.cumsum(_rows_of_groups(file))
        if len(ends) != groups.num_shards:
            return [records], 0
        done = int(np.searchsorted(ends, first, side="right"))
        rest = [groups.shard(num_shards=len(ends), index=group) for group in range(done, len(ends))]
        return rest, int(ends[done - 1]) if done else 0


def _rows(records: Any, field: str) -> Iterator[dict[str, Any]]:
    """Records reduced to their text; whole records if they have no such field."""
    if isinstance(records, RecordFiles):
        yield from records.rows()
        return
    for table in records.with_format("arrow").iter(TOGETHER):
        if field in table.column_names:
            yield from ({field: text} for text in table[field].to_pylist())
        else:
            yield from table.to_pylist()


def _rows_of_groups(file: str) -> list[int]:
    import fsspec
    from pyarrow import parquet

    with fsspec.open(file, "rb") as stream:
        metadata = parquet.read_metadata(stream)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


class StreamReading:
    """The documents of some files of a stream; see `Reading`. Failures of the network are tried again.

    Args:
        stream: the files.
        numbers: of those to be read.
        limit: of what is read.
        wanted: which documents are given; the others count towards the limit too.
        position: see `PartedCorpus.read`.

    Raises:
        DataError: from iterating: a file cannot be read.
    """

    def __init__(
        self,
        stream: Stream,
        numbers: range,
        limit: Limit,
        wanted: Callable[[str], bool] = lambda text: True,
        position: dict[str, int] | None = None,
    ) -> None:
        self._stream, self._numbers, self._limit, self._wanted = stream, numbers, limit, wanted
        self._position = position or {"file": 0, "record": 0, "documents": 0, "bytes": 0}

    @property
    def position(self) -> dict[str, int]:
        """The next file (counted from the first of these), the next record there, and the counts read so far."""
        return dict(self._position)

    def __iter__(self) -> Iterator[str]:
        position = self._position
        limit = self._limit
        while position["file"] < len(self._numbers) and not limit.reached(position["documents"], position["bytes"]):
            for text in self._file():
                position["record"] += 1
                position["documents"] += 1
                position["bytes"] += self._limit.count(text)
                if self._wanted(text):
                    yield text
                if self._limit.reached(position["documents"], position["bytes"]):
                    return
            position["file"] += 1
            position["record"] = 0

    def _file(self) -> Iterator[str]:
        """The rest of the file that the position is in."""
        number = self._numbers[self._position["file"]]
        name = self._stream.name(number)
        patience = Patience(name, TRIES)
        while True:
            try:
                for text in self._stream.texts(number, self._position["record"]):
                    patience.succeeded()
                    yield text
                return
            except DataError:
                raise
            except LASTING as error:
                raise DataError(f"{name} cannot be read: {reason_of(error)}") from error
            except Exception as error:  # hub, network and storage each raise their own kinds
                patience.pause(error, reason_of(error))


def identify_stream(files: Sequence[str]) -> dict[str, Any]:
    """What fixes the content of files at URLs: commits, hashes of local files, or the storage's version marks.

    Raises:
        DataError: a file cannot be found, or nothing tells whether it has changed.
    """
    local = [Path(file.removeprefix("file://")) for file in files if "://" not in file.removeprefix("file://")]
    if len(local) == len(files):
        return identify_files(local)
    commits = {file: match[1] for file in files if (match := COMMIT.match(file))}
    with ThreadPoolExecutor(IDENTIFYING_THREADS) as pool:
        marks = list(pool.map(lambda file: None if file in commits else _mark(file), files))
    identity = {"files": len(files), "sha256": sha256_of_json(list(zip(files, marks, strict=True)))}
    return {**identity, "commits": sorted(set(commits.values()))} if commits else identity


def _mark(file: str) -> list[Any]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(file)
        facts = filesystem.info(path)
    except Exception as error:  # each file system has its own kinds
        raise DataError(f"{file} cannot be looked up: {reason_of(error)}") from error
    for tag in TAGS:
        if facts.get(tag) is not None:
            return [tag, str(facts[tag]), facts.get("size")]
    raise DataError(
        f"{file}: its storage tells neither a checksum nor a time of change, so that nobody could tell the same file "
        "from a changed one. Copy it to a storage that does, or read it without data.corpus.streaming."
    )
