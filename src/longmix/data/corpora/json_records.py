"""The records of JSON Lines and JSON arrays, one after the other, exactly as they stand.

Nothing is guessed about their fields: those that are not read may appear late, change their type or be null. Memory
holds one record and a chunk of the file, however long a line or an array is.
"""

import gzip
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from longmix.errors import DataError

CHUNK_BYTES = 1 << 20

UNFINISHED_CHARACTERS = 16
"""So near the end of a chunk, an error may come from a word, number or escape that the chunk cut."""

DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
"""Errors that decompression raises for content that is cut or altered."""

BLANKS = re.compile(r"[ \t\n\r]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_KINDS = (
    *((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\x1f\x8b", "compressed by gzip")),
    *((b"BZh", "compressed by bzip2"), (b"\xfd7zXZ", "compressed by xz"), (b"(\xb5/\xfd", "compressed by zstd")),
    *((b"PK\x03\x04", "a zip archive"), (b"PAR1", "a Parquet file")),
)
"""First bytes of other kinds of files, which are refused by name."""


LONGEST_MARK = 8


class JsonRecords:
    """The records of a file: its JSON values one after the other, usually one a line, or the items of one array.

    Args:
        stream: the bytes of the file, uncompressed.
        name: of the file, for messages.

    Attributes:
        record: number of the record that came last, counted from 0.

    Raises:
        DataError: from iterating: the file is damaged or not JSON in UTF-8; names the line, counted from 1.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.record = -1
        self._stream, self._name = stream, name
        self._text, self._start, self._end = "", 0, False
        self._lines_before = 0
        self._tail, self._bytes_before = b"", 0

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, counted in chunks."""
        return self._bytes_before

    @property
    def line(self) -> int:
        """The line, counted from 1, in which the last record began."""
        return self._line_at(self._start)

    def __iter__(self) -> Iterator[Any]:
        if not self._skip_blanks():
            return
        in_array = self._text[self._start] == "["
        if in_array:
            self._start += 1
            if self._next_in_array(first=True) == "]":
                self._expect_end()
                return
        while self._skip_blanks():
            self.record += 1
            value, end = self._value()
            if in_array and isinstance(value, str):
                value = {"text": value}  # an array of nothing but texts
            yield value
            self._start = end
            if in_array and self._next_in_array(first=False) == "]":
                self._expect_end()
                return
        if in_array:
            raise self._broken("the array has no end", self._start)

    def _next_in_array(self, first: bool) -> str:
        """The character at the next item of an array; a comma, or the bracket that ends it, is passed over."""
        if not self._skip_blanks():
            raise self._broken("the array has no end", self._start)
        found = self._text[self._start]
        if found in "],":
            self._start += 1
        if found not in "]," and not first:
            raise self._broken("a comma is expected between the items of the array", self._start)
        if found == "," and first:
            raise self._broken("the array begins with a comma", self._start)
        return found

    def _expect_end(self) -> None:
        if self._skip_blanks():
            raise self._broken("something follows the end of the array", self._start)

    def _value(self) -> tuple[Any, int]:
        """Parse the value at the start, reading more until it is whole; returns it and where it ends."""
        while True:
            try:
                return _decode(self._text, self._start)
            except json.JSONDecodeError as error:
                cut_text = error.msg.startswith("Unterminated string")
                cut = cut_text or error.pos > len(self._text) - UNFINISHED_CHARACTERS
                if cut and self._read(max(CHUNK_BYTES, len(self._text) - self._start)):
                    continue
                at_end = self._end and (cut_text or error.pos >= len(self._text.rstrip()))
                raise self._broken("the file ends within this record" if at_end else error.msg, error.pos) from error
            except RecursionError as error:
                raise self._broken("its values are nested too deeply", self._start) from error

    def _skip_blanks(self) -> bool:
        """Go to the next character that is not blank. Returns False at the end of the file."""
        while True:
            self._start = BLANKS.match(self._text, self._start).end()  # type: ignore[union-attr]
            if self._start < len(self._text):
                return True
            if not self._read(CHUNK_BYTES):
                return False

    def _read(self, size: int) -> bool:
        """Drop the text that was parsed and read about `size` bytes more. Returns False at the end of the file."""
        chunk = b"" if self._end else self._bytes(size)
        if not chunk:
            self._end = True
            if self._tail:
                raise self._not_utf8(self._tail, 0)
            return False
        self._lines_before += self._text.count("\n", 0, self._start)
        kept = self._text[self._start :]
        added = self._decoded(self._tail + chunk)
        self._text, self._start = kept + added, 0
        return True

    def _bytes(self, size: int) -> bytes:
        is_first = not self._bytes_before and not self._tail and not self._text
        try:
            chunk = self._stream.read(max(size, LONGEST_MARK) if is_first else size)
        except DAMAGE as error:
            raise DataError(f"{self._name} is cut or damaged: {' '.join(str(error).split())}") from error
        if is_first:
            for mark, kind in OTHER_KINDS:
                if chunk.startswith(mark):
                    raise DataError(f"{self._name} is {kind}, which its name does not tell; convert or rename it")
            if chunk[:1].strip() and b"\0" in chunk[:4]:
                raise DataError(f"{self._name} is not UTF-8 text (it looks like UTF-16 or UTF-32); convert it")
            if chunk.startswith(BYTE_ORDER_MARK):
                self._bytes_before = len(BYTE_ORDER_MARK)
                return chunk[len(BYTE_ORDER_MARK) :] or self._bytes(size)
        return chunk

    def _decoded(self, data: bytes) -> str:
        """The bytes as text. A character that is cut at the end waits for its other bytes."""
        try:
            text, self._tail = data.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data" or len(data) - error.start > 3:
                raise self._not_utf8(data, error.start) from error
            text, self._tail = data[: error.start].decode(), data[error.start :]
        self._bytes_before += len(data) - len(self._tail)
        return text

    def _not_utf8(self, data: bytes, offset: int) -> DataError:
        line = 1 + self._lines_before + self._text.count("\n", self._start) + data.count(b"\n", 0, offset)
        byte = self._bytes_before + offset
        return DataError(f"{self._name} is not UTF-8 text in line {line:,} (byte {byte:,}); convert or remove it")

    def _line_at(self, offset: int) -> int:
        return 1 + self._lines_before + self._text.count("\n", 0, offset)

    def _broken(self, reason: str, offset: int) -> DataError:
        line, begins = self._line_at(offset), self._line_at(self._start)
        within = "" if line == begins else f", in the record that begins in line {begins:,}"
        cause = reason.removesuffix(" at")
        return DataError(f"{self._name} cannot be read as JSON: {cause} (line {line:,}{within}); repair or remove it")


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        return -math.inf if digits.startswith("-") else math.inf


_decode_plain = json.JSONDecoder().raw_decode
_decode_long_integers = json.JSONDecoder(parse_int=_integer).raw_decode


def _decode(text: str, start: int) -> tuple[Any, int]:
    try:
        return _decode_plain(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _decode_long_integers(text, start)
