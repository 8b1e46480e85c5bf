"""The file of JSON Lines that answers go to: killed at any moment, it can be gone on with, and no answer is lost."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmix.errors import ConfigError
from longmix.files import replace_file, storage_errors

BEGINNING = b'{"index": '
"""Of every line."""


@dataclass(frozen=True, order=True)
class Entry:
    """A line of the file.

    Attributes:
        index: number of the prompt that it answers, from 0.
        sample: number among the answers to this prompt, from 0.
        begin: where the line begins, in bytes.
        size: bytes of the line.
        digest: of what the answer depends on.
    """

    index: int
    sample: int
    begin: int
    size: int
    digest: str


class AnswerFile:
    """Answers as they come; at the end in the order of the prompts.

    Args:
        path: of the file, which need not exist.
        wanted: for each prompt by its number, the digest of what its answers depend on, and how many there are to be.

    Attributes:
        done: the prompts that all answers are there of.

    Raises:
        ConfigError: the file holds something else, or answers to something else.
        StorageError: it cannot be read or mended.
    """

    def __init__(self, path: Path, wanted: Mapping[int, tuple[str, int]]) -> None:
        self.path = path
        with storage_errors(path):
            entries, end = self._read() if path.exists() else ([], 0)
            found: dict[int, set[int]] = {}
            for number, entry in enumerate(entries, 1):
                digest, samples = wanted.get(entry.index, ("", 0))
                if entry.digest != digest or not 0 <= entry.sample < samples:
                    raise ConfigError(
                        f"output={path} holds an answer, in line {number:,}, to another prompt or of other words or "
                        "weights; give another file, or delete this one to begin anew."
                    )
                found.setdefault(entry.index, set()).add(entry.sample)
            self.done = {index for index, samples in found.items() if len(samples) == wanted[index][1]}
            self._entries = list({(e.index, e.sample): e for e in entries if e.index in self.done}.values())
            if len(self._entries) < len(entries) or (path.exists() and path.stat().st_size > end):
                self._rewrite()

    def _read(self) -> tuple[list[Entry], int]:
        """The whole lines, and where the last one ends; behind it there may be the beginning of another."""
        entries: list[Entry] = []
        end = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n") and BEGINNING[: len(line)] == line[: len(BEGINNING)]:
                    break
                entries.append(self._entry(line, number, end))
                end += len(line)
        return entries, end

    def _entry(self, line: bytes, number: int, begin: int) -> Entry:
        try:
            content = json.loads(line)
            index, sample, digest = content["index"], content["sample"], content["request"]
            if not line.startswith(BEGINNING) or [type(part) for part in (index, sample, digest)] != [int, int, str]:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(
                f"output={self.path} is no file of answers: line {number:,} holds something else. Give another file."
            ) from None
        return Entry(index, sample, begin, len(line), digest)

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """Append answers, all of a prompt's at once; they are on their way to the disk afterwards.

        Args:
            answers: JSON-able, each with `index`, the first of its keys, `sample` and `request`, the digest.

        Raises:
            StorageError: the disk is full.
        """
        answers = list(answers)
        lines = [json.dumps(answer, ensure_ascii=False).encode() + b"\n" for answer in answers]
        with storage_errors(self.path), self.path.open("ab") as stream:
            begin = stream.tell()
            stream.write(b"".join(lines))
        for answer, line in zip(answers, lines, strict=True):
            self._entries.append(Entry(answer["index"], answer["sample"], begin, len(line), answer["request"]))
            begin += len(line)

    def sort(self) -> None:
        """Bring the answers into the order of the prompts.

        Raises:
            StorageError: the file cannot be written; it stays as it was.
        """
        if self._entries != sorted(self._entries):
            self._entries.sort()
            self._rewrite()

    def _rewrite(self) -> None:
        """Let the file hold the entries alone, in their order."""

        def write(temporary: Path) -> None:
            with self.path.open("rb") as old, temporary.open("wb") as new:
                for entry in self._entries:
                    old.seek(entry.begin)
                    new.write(old.read(entry.size))

        replace_file(self.path, write)
        begin, moved = 0, []
        for entry in self._entries:
            moved.append(Entry(entry.index, entry.sample, begin, entry.size, entry.digest))
            begin += entry.size
        self._entries = moved
