"""The tokens of one part of a split, in pieces of which each survives a kill once it is complete."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longmix.data.corpora.corpus import Corpus, check_unchanged, num_parts, read_part
from longmix.data.tokens.encoding import Encoded, Encoder, batches_of, encode_in_order
from longmix.data.tokens.sealed_folder import open_sealed, seal
from longmix.data.tokens.token_files import OFFSET_DTYPE, shard_name
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.files import atomic_directory, replace_json, storage_errors

logger = logging.getLogger(__name__)

MAX_TOKENS_UINT16 = 1 << 16

TOKENS, LENGTHS, END = "tokens.bin", "lengths.bin", "end.json"
"""Files of a piece: its tokens, the lengths of its documents. File of a part: facts known once it has been read."""

COUNTS = ("documents", "tokens", "bytes", "empty_documents")


@dataclass(frozen=True)
class Work:
    """The split to tokenise, and how.

    Attributes:
        corpus: where the documents come from.
        tokenizer: ready for use.
        split: one of `corpus.splits`.
        key: key of the token file; pieces with another key are not used.
        pieces: folder of the pieces that survive a kill.
        shard_tokens: a piece ends with the batch of documents that fills it, or with the part.
        label: what messages call the corpus; empty for its own name.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    split: str
    key: str
    pieces: Path
    shard_tokens: int
    label: str = ""

    @property
    def parts(self) -> int:
        """The number of parts in which the split is read."""
        return num_parts(self.corpus, self.split)

    @property
    def dtype(self) -> np.dtype:
        """The type of the tokens."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= MAX_TOKENS_UINT16 else "<u4")

    @property
    def source_name(self) -> str:
        """The name of the part in messages."""
        return f"{self.split} split of {self.label or self.corpus.name}"


class Piece(NamedTuple):
    """A complete piece.

    Attributes:
        tokens: file of its tokens.
        lengths: file of the lengths of its documents, int64.
        counts: by the names of `COUNTS`.
    """

    tokens: Path
    lengths: Path
    counts: dict[str, int]


class Part(NamedTuple):
    """A part that has been tokenised.

    Attributes:
        pieces: its pieces in order; empty documents leave none.
        empty_documents: number of empty documents after the last piece.
        found: how many of the pieces an earlier process made.
    """

    pieces: list[Piece]
    empty_documents: int
    found: int


Advance = Callable[[int, int, int], None]
"""Called with the documents, bytes and tokens that are done."""


def make_part(work: Work, number: int, folder: Path, workers: int, advance: Advance) -> Part:
    """Make the missing pieces of a part.

    Args:
        work: what is tokenised.
        number: of the part.
        folder: for the files of its pieces, which have a second name among `work.pieces`.
        workers: processes that tokenise besides this one.
        advance: called after every batch.

    Raises:
        DataError: a document cannot be read or encoded, or a piece is damaged.
        StorageError: a piece cannot be written.
    """
    return _PartMaker(work, number, folder, workers, advance).make()


class _PartMaker:
    def __init__(self, work: Work, number: int, folder: Path, workers: int, advance: Advance) -> None:
        self._work, self._number, self._workers, self._advance = work, number, workers, advance
        self._folder = folder / f"part-{number:05d}"
        self._kept = work.pieces / self._folder.name
        self._pieces: list[Piece] = []
        self._position: Any = None

    def make(self) -> Part:
        self._folder.mkdir()
        self._take_pieces()
        found = len(self._pieces)
        after = self._empty_at_end()
        if found and after is None:
            logger.info("%s: going on after %s pieces of part %s", self._work.source_name, found, self._number)
        if after is None:
            after = self._make_missing()
            if self._work.parts > 1:
                self._keep_end(after)
        return Part(self._pieces, after, found)

    def _take_pieces(self) -> None:
        """Take over the pieces that an earlier process completed."""
        while (kept := self._kept / shard_name(len(self._pieces))).is_dir():
            manifest = open_sealed(kept, {"key": self._work.key})
            piece = self._new_piece({name: manifest[name] for name in COUNTS})
            try:
                shutil.copyfile(kept / LENGTHS, piece.lengths)
                _link_or_copy(kept / TOKENS, piece.tokens)
            except FileNotFoundError:  # without locks, another process may have finished just now
                break
            self._pieces.append(piece)
            self._position = manifest["position"]

    def _empty_at_end(self) -> int | None:
        """Empty documents after the last piece, if the part has been read."""
        try:
            end = json.loads((self._kept / END).read_bytes())
        except (OSError, ValueError):
            return None
        return end["empty_documents"] if end == self._end(end.get("empty_documents")) else None

    def _keep_end(self, empty_documents: int) -> None:
        with storage_errors(self._kept):
            self._kept.mkdir(parents=True, exist_ok=True)
        replace_json(self._kept / END, self._end(empty_documents))

    def _end(self, empty_documents: int) -> dict[str, Any]:
        return {"key": self._work.key, "pieces": len(self._pieces), "empty_documents": empty_documents}

    def _make_missing(self) -> int:
        work = self._work
        first = sum(piece.counts["documents"] + piece.counts["empty_documents"] for piece in self._pieces)
        reading = read_part(work.corpus, work.split, self._number, self._position)
        source_name = work.source_name if work.parts == 1 else f"{work.source_name}, part {self._number}"
        encode = Encoder(work.tokenizer, work.dtype, source_name)
        after = 0
        batches = encode_in_order(encode, batches_of(reading, first), self._workers)
        with contextlib.closing(batches):
            for head in batches:
                after += self._write(_up_to(chain([head], batches), work.shard_tokens))
        return after

    def _write(self, batches: Iterator[Encoded]) -> int:
        """Write a piece under both its names; if all its documents are empty, return their number instead."""
        counts, lengths = dict.fromkeys(COUNTS, 0), []
        piece, position = self._new_piece(counts), None
        with piece.tokens.open("wb") as tokens:
            for batch in batches:
                tokens.write(batch.tokens.tobytes())
                lengths.append(batch.lengths)
                position = batch.position
                found = len(batch.lengths), len(batch.tokens), batch.bytes, batch.empty
                for name, count in zip(COUNTS, found, strict=True):
                    counts[name] += count
                self._advance(len(batch.lengths) + batch.empty, batch.bytes, len(batch.tokens))
        if not counts["tokens"]:
            piece.tokens.unlink()
            return counts["empty_documents"]
        piece.lengths.write_bytes(np.concatenate(lengths).astype(OFFSET_DTYPE).tobytes())
        check_unchanged(self._work.corpus)
        with atomic_directory(self._kept / piece.tokens.name) as kept:
            _link_or_copy(piece.tokens, kept / TOKENS)
            shutil.copyfile(piece.lengths, kept / LENGTHS)
            seal(kept, {"key": self._work.key, "position": position, **counts})
        self._pieces.append(piece)
        return 0

    def _new_piece(self, counts: dict[str, int]) -> Piece:
        tokens = self._folder / shard_name(len(self._pieces))
        return Piece(tokens, tokens.with_suffix(".lengths"), counts)


def _up_to(batches: Iterator[Encoded], tokens: int) -> Iterator[Encoded]:
    """Batches, until they hold the given number of tokens."""
    for batch in batches:
        yield batch
        tokens -= len(batch.tokens)
        if tokens <= 0:
            return


def _link_or_copy(source: Path, target: Path) -> None:
    """Link a file to another name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
