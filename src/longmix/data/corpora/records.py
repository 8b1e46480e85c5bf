"""The documents in the records of a table or of a file of JSON: one of their fields."""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from longmix.data.corpora.json_records import JsonRecords
from longmix.errors import DataError

FIELD_WITHIN_BYTES = 10 << 20
"""Bytes after which a JSON file without the field is refused, so that a wrong name does not cost an hour."""


CUT_SHORT = "Compressed file ended before the end-of-stream marker was reached"
"""What gzip, bzip2 and xz say of a file that was cut short."""


def texts_of(records: Iterable[dict[str, Any]], field: str, source_name: str, first: int = 0) -> Iterator[str]:
    """The text field of each record; a null one gives an empty document, which the token file counts.

    Args:
        records: one after the other.
        field: which must be there in the first of them.
        source_name: where they come from, for messages.
        first: number of the first record there.

    Raises:
        DataError: the field is missing or holds something else.
    """
    for number, record in enumerate(records, first):
        if number == first and field not in record:
            raise no_field(field, source_name, record)
        text = record.get(field)
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"field {field!r} of record {number} of {source_name} holds {kind}, not text")
        yield text or ""


def texts_of_json(stream: IO[bytes], field: str, name: str) -> Iterator[str]:
    """The text field of each record of a file of JSON; see `JsonRecords`.

    A record that is null, or whose field is null or missing, gives an empty document.

    Args:
        stream: the bytes of the file, uncompressed.
        field: which at least one of the first records must have.
        name: of the file, for messages.

    Raises:
        DataError: the file is damaged, the field is missing in all of them, or one holds something else.
    """
    records = JsonRecords(stream, name)
    others: dict[str, None] = {}
    found = False
    for record in records:
        if record is not None and not isinstance(record, dict):
            raise DataError(f"line {records.line:,} of {name} holds a {type(record).__name__}, not an object")
        text = (record or {}).get(field)
        if not found and record is not None:
            found = field in record
            others.update(dict.fromkeys(record))
            if not found and records.bytes_read > FIELD_WITHIN_BYTES:
                raise no_field(field, name, others)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"field {field!r} of record {records.record} of {name} (line {records.line:,}) holds "
                f"{type(text).__name__}, not text"
            )
        if text and not text.isascii() and (character := _surrogate_in(text)) is not None:
            raise DataError(
                f"field {field!r} in line {records.line:,} of {name} holds a lone surrogate at character "
                f"{character:,}, which is not Unicode text; repair or remove that line"
            )
        yield text or ""
    if others and not found:
        raise no_field(field, name, others)


def no_field(field: str, name: str, others: Iterable[str]) -> DataError:
    """The error for records that lack the text field; names the fields they have."""
    return DataError(f"data.corpus.field: the records of {name} have no field {field!r}; they have {', '.join(others)}")


def _surrogate_in(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def uncompressed(stream: IO[bytes], name: str | Path) -> IO[bytes]:
    """The bytes behind a compression that the end of the name tells, such as .gz, .bz2, .xz, .zip or .zst.

    Reading raises EOFError where a file was cut short.

    Raises:
        DataError: it is not compressed so.
    """
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    if str(name).lower().endswith((".zst", ".zstd")):
        return cast(IO[bytes], io.BufferedReader(_Zstd(stream)))
    kind = infer_compression(str(name))
    if kind is None:
        return stream
    try:
        if kind == "zip":
            _refuse_several(zipfile.ZipFile(stream).namelist(), name)
        return cast(IO[bytes], compr[kind](stream, mode="rb"))
    except DataError:
        raise
    except Exception as error:  # each compression has its own kinds
        raise DataError(f"{name} cannot be decompressed: {type(error).__name__}: {error}") from error


class _Zstd(io.RawIOBase):
    """The bytes behind zstd, of all frames; with `zstandard`, `fsspec` reads a file that was cut short to its cut."""

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            return int(self._stream.readinto(target))
        except OSError as error:
            if "Truncated" in str(error):
                raise EOFError(CUT_SHORT) from error
            if "ZSTD" in str(error):
                raise ValueError(str(error)) from error
            raise

    def close(self) -> None:
        self._stream.close()
        super().close()


def _refuse_several(members: list[str], name: str | Path) -> None:
    if len(members) != 1:
        raise DataError(f"{name} holds {len(members)} files, of which one would be read; unpack it.")
