"""The corpora a configuration can name: the State of the Union messages, local files, and the Hugging Face hub.

A corpus never alters a document. Splits are fixed by the content itself (by year for `Sotu`, by a hash of the text
where no split is named), so that adding files never moves a document from one split to another.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longmix.data.corpora.corpus import SplitByContent
from longmix.data.corpora.local_files import Stamp, check_unchanged, find_files, identify_files, refuse_overlap
from longmix.data.corpora.records import texts_of, texts_of_json, uncompressed
from longmix.data.corpora.retry import reason_of
from longmix.data.corpora.stream import TOGETHER
from longmix.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class _LocalFiles(SplitByContent):
    """A corpus in local files."""

    _suffixes: tuple[str, ...]
    _divides_one = True

    def __init__(
        self,
        path: str | Sequence[str],
        validation: str | Sequence[str] | None,
        test: str | Sequence[str] | None,
        validation_fraction: float,
        test_fraction: float,
    ) -> None:
        if path is None:
            raise ConfigError("data.corpus.path is required; give a file, a folder, a pattern, or a list of these.")
        given = {"train": ("path", path), "validation": ("validation", validation), "test": ("test", test)}
        sources = {
            split: find_files(f"data.corpus.{key}", paths, self._suffixes)
            for split, (key, paths) in given.items()
            if paths is not None
        }
        refuse_overlap(sources)
        super().__init__(sources, validation_fraction, test_fraction)
        self._stamps: dict[Path, Stamp] = {}

    def check_unchanged(self) -> None:
        """Refuse files that changed after the fingerprint was computed."""
        check_unchanged(self._stamps)

    def _identify(self, source: list[Path]) -> dict[str, Any]:
        return identify_files(source, self._stamps)


class TextFiles(_LocalFiles):
    """Local UTF-8 text, one file a document, in the order of the paths.

    Read without `datasets`, whose text reader turns every CR LF into LF: a corpus must not alter its documents.

    Args:
        path: file, folder (all `.txt` files below it) or glob pattern, or a list of these; the training documents. A
            single file is divided by position: its end is held out.
        validation: likewise for validation; without it, `validation_fraction` of `path` is held out.
        test: likewise for test; without it, `test_fraction` of `path` is held out.
        validation_fraction: share of the documents of `path` held out for validation, chosen by their content.
        test_fraction: share held out for test.

    Raises:
        ConfigError: a fraction is impossible.
        DataError: a path matches nothing, or a file belongs to two splits.
    """

    name = "text"
    _suffixes = (".txt",)

    def __init__(
        self,
        path: str | Sequence[str],
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.0,
    ) -> None:
        super().__init__(path, validation, test, validation_fraction, test_fraction)

    def _read(self, source: list[Path]) -> Iterator[str]:
        for file in source:
            try:
                text = file.read_bytes().decode()
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror or error}") from error
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert or remove it"
                ) from error
            yield text


class _TableFiles(_LocalFiles):
    """A corpus in local files of records, one record a document."""

    def __init__(
        self,
        path: str | Sequence[str],
        field: str = "text",
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.0,
    ) -> None:
        super().__init__(path, validation, test, validation_fraction, test_fraction)
        self._field = field

    @abstractmethod
    def _texts(self, file: Path) -> Iterator[str]:
        """The documents of one file."""

    def _read(self, source: list[Path]) -> Iterator[str]:
        for file in source:
            try:
                yield from self._texts(file)
            except DataError:
                raise
            except EOFError as error:
                raise DataError(
                    f"{file} ends before its compressed content does: it was cut short. Copy it again."
                ) from error
            except Exception as error:  # readers raise many kinds
                raise DataError(f"{file} cannot be read as {self.name}: {reason_of(error)}") from error

    def _compute_fingerprint(self) -> dict[str, Any]:
        return {**super()._compute_fingerprint(), "field": self._field}


class JsonLines(_TableFiles):
    """Local JSON Lines, also compressed: one object a line, one of its fields the document.

    Read as `json.loads` reads each line; no other field matters. A file may also be one array of objects.

    Args:
        path: file, folder (all `.jsonl` files below it, or all `.jsonl.gz`, and so on) or glob pattern, or a list of
            these; the training documents.
        field: the field that holds the text. Where it is missing or null, the document counts as empty.
        validation: likewise for validation; without it, `validation_fraction` of `path` is held out.
        test: likewise for test; without it, `test_fraction` of `path` is held out.
        validation_fraction: share of the documents of `path` held out for validation, chosen by their content.
        test_fraction: share held out for test.

    Raises:
        ConfigError: a fraction is impossible.
        DataError: a path matches nothing, or a file belongs to two splits.
    """

    name = "jsonl"
    _suffixes = (".jsonl", *(f".jsonl{ending}" for ending in (".gz", ".zst", ".bz2", ".xz")))

    def _texts(self, file: Path) -> Iterator[str]:
        with file.open("rb") as stream, uncompressed(stream, file) as lines:
            yield from texts_of_json(lines, self._field, str(file))


class ParquetFiles(_TableFiles):
    """Local Parquet files: one row a document, one column its text. Arguments and errors as for `JsonLines`."""

    name = "parquet"
    _suffixes = (".parquet",)

    def _texts(self, file: Path) -> Iterator[str]:
        from pyarrow import parquet

        with parquet.ParquetFile(file) as table:
            # Only the text is read, as a table may hold far more; an error names the fields of the full record.
            columns = [self._field] if self._field in table.schema_arrow.names else None
            batches = table.iter_batches(batch_size=TOGETHER, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from texts_of(rows, self._field, str(file))
