"""Files of JSON and CSV on this machine or at URLs, read record by record; `datasets` would guess a schema for them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import IO, Any

from longmix.data.corpora.records import no_field, texts_of_json, uncompressed
from longmix.errors import DataError
from longmix.reading import shortened

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

ALTERING = ("converters", "true_values", "false_values", "na_values", "keep_default_na", "na_filter", "usecols")
"""Settings of a CSV reader that would alter texts or drop their column."""


NOTHING_TO_PANDAS = frozenset(
    (
        *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Texts that a table of `datasets` lost; a corpus with such texts has another identity than before."""


class RecordFiles(ABC):
    """The records of some files, each reduced to its text; small to pickle.

    Args:
        files: paths or URLs that `fsspec` knows; the end of each tells its compression.
        field: the field that holds the text.
        source_name: for messages.
        names: of the files, where they lie under other names, such as in a cache.
    """

    def __init__(self, files: Sequence[str], field: str, source_name: str, names: Sequence[str] | None = None) -> None:
        self.files, self.field, self.source_name = list(files), field, source_name
        self.names = self.files if names is None else list(names)

    @property
    def num_shards(self) -> int:
        """The number of files."""
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> "RecordFiles":
        """One of the files, as `IterableDataset.shard` would return it with one shard per file."""
        if num_shards != self.num_shards:
            raise ValueError(f"{self.num_shards} files cannot be divided into {num_shards} shards")
        return self.part(index)

    @abstractmethod
    def part(self, index: int) -> "RecordFiles":
        """One of the files."""

    @abstractmethod
    def texts_of_file(self, content: IO[bytes], name: str) -> Iterator[str]:
        """The documents of a file.

        Raises:
            DataError: see `texts`.
        """

    def texts(self) -> Iterator[str]:
        """The documents of all files.

        Raises:
            DataError: a file is damaged or has no such field; names file and line.
        """
        import fsspec

        for file, name in zip(self.files, self.names, strict=True):
            with fsspec.open(file, "rb") as stream, uncompressed(stream, name) as content:
                yield from self.texts_of_file(content, f"{name} of {self.source_name}")

    def identity(self) -> dict[str, Any]:
        """The number of documents; together with the files it identifies them. Reads all of them."""
        return {"rows": sum(1 for _ in self.texts())}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The documents of all files as records."""
        return ({self.field: text} for text in self.texts())


class JsonFiles(RecordFiles):
    """The records of files of JSON; see `RecordFiles` and `longmix.data.corpora.json_records`."""

    def part(self, index: int) -> "JsonFiles":
        """One of the files."""
        return JsonFiles([self.files[index]], self.field, self.source_name, [self.names[index]])

    def texts_of_file(self, content: IO[bytes], name: str) -> Iterator[str]:
        """The documents of a file."""
        return texts_of_json(content, self.field, name)


class CsvFiles(RecordFiles):
    """The records of CSV files. A field is the text between its separators and quotes, never a number or null.

    `datasets` would guess a type for each column: 001 would become a number, and NA or null nothing.

    Args:
        files, field, source_name, names: see `RecordFiles`.
        settings: for `pandas.read_csv`; those that make something else of a text are left out.
    """

    def __init__(
        self, files: Sequence[str], field: str, source_name: str, names: Sequence[str] | None = None, **settings: Any
    ) -> None:
        super().__init__(files, field, source_name, names)
        self._settings = {name: value for name, value in settings.items() if name not in ALTERING}

    def part(self, index: int) -> "CsvFiles":
        """One of the files."""
        return CsvFiles([self.files[index]], self.field, self.source_name, [self.names[index]], **self._settings)

    def texts_of_file(self, content: IO[bytes], name: str) -> Iterator[str]:
        """The documents of a file."""
        import pandas

        try:
            for rows in pandas.read_csv(content, iterator=True, dtype=object, na_filter=False, **self._settings):
                if self.field not in rows.columns:
                    raise no_field(self.field, name, map(str, rows.columns))
                yield from (text if isinstance(text, str) else "" for text in rows[self.field])
        except pandas.errors.EmptyDataError:
            return
        except (ValueError, EOFError) as error:  # the latter of a compressed file that was cut short
            raise DataError(f"{name} cannot be read as CSV: {shortened(error)}") from error

    def identity(self) -> dict[str, Any]:
        """The number of documents, and a mark if a table of `datasets` would have lost some of their words."""
        rows = lost = 0
        for text in self.texts():
            rows += 1
            lost += text in NOTHING_TO_PANDAS
        return {"rows": rows, "words": "as they stand"} if lost else {"rows": rows}


def of_builder(
    builder: Any, files: Sequence[str], field: str, source_name: str, names: Any = None
) -> RecordFiles | None:
    """The records of files as a builder of `datasets` would read them; None if it reads archives or another format."""
    config, kind = builder.config, type(builder.config).__name__
    given = [str(file) for files in (getattr(config, "data_files", None) or {}).values() for file in files]
    if not given or any(file.lower().endswith(ARCHIVES) or "::" in file for file in given):
        return None
    if kind == "JsonConfig" and getattr(config, "field", None) is None:
        return JsonFiles(files, field, source_name, names)
    if kind == "CsvConfig":
        return CsvFiles(files, field, source_name, names, **config.pd_read_csv_kwargs)
    return None


def files_of_split(builder: Any, split: str) -> list[str]:
    """The files of a split.

    Raises:
        ValueError: there is no such split.
    """
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f"Bad split: {split}. There are {', '.join(map(str, files))}")
    return [str(file) for file in files[split]]


def downloaded(builder: Any, split: str, field: str, source_name: str) -> RecordFiles | None:
    """The files of a split in the cache of `datasets`, downloaded if they are not there; None as `of_builder`.

    Raises:
        DataError: these are archives of CSV.
        ValueError: there is no such split.
    """
    from datasets import DownloadConfig, DownloadManager

    if of_builder(builder, [], field, source_name) is None:
        if type(builder.config).__name__ == "CsvConfig":
            raise DataError(
                f"{source_name} is CSV in archives, of which data.corpus.streaming=true alone reads every text"
            )
        return None
    files = files_of_split(builder, split)
    manager = DownloadManager(builder.dataset_name, download_config=DownloadConfig(token=builder.token))
    return of_builder(builder, [str(path) for path in manager.download(files)], field, source_name, files)


def text_alone(builder: Any, field: str) -> None:
    """Make a builder of `datasets` that reads archives of CSV treat the field as text, whatever it holds."""
    if type(builder.config).__name__ == "CsvConfig":
        builder.config.converters, builder.config.na_filter = {field: str}, False
