"""From documents to token files: in pieces that survive a kill, and by several processes if asked."""

import contextlib
import logging
import multiprocessing
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from longmix.data.corpus import Corpus, check_split, read_documents
from longmix.data.progress import progress_bar
from longmix.data.sealed import build_once, open_sealed, seal, sha256_of_json
from longmix.data.token_files import FORMAT_VERSION, OFFSET_DTYPE, OFFSETS, TOKENIZER, TokenFile, shard_name
from longmix.data.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.files import atomic_directory, write_json

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 1024
MAX_TOKENS_UINT16 = 1 << 16
BATCHES_AHEAD = 3
"""Batches of each process that wait to be tokenised or written."""

TOKENS, LENGTHS = "tokens.bin", "lengths.bin"
"""Of a piece: the tokens of a shard, and the lengths of its documents."""

COUNTS = ("documents", "tokens", "bytes", "empty_documents")


@dataclass(frozen=True)
class Preparation:
    """How token files are made; the tokens and their order do not depend on it.

    Attributes:
        shard_tokens: a shard ends with the batch of documents that fills it; 2**27 are 256 MiB of uint16.
        workers: processes that tokenise; 0 for this one alone.

    Raises:
        ConfigError: a number is too small.
    """

    shard_tokens: int = 1 << 27
    workers: int = 0

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens={self.shard_tokens} must be at least 1.")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be at least 0, which is none besides this process.")


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, split: str, cache_dir: Path, preparation: Preparation | None = None
) -> TokenFile:
    """Return the token file of a split, tokenising it first if no earlier run has.

    Memory stays bounded whatever the size of the corpus. Any number of processes may prepare the same split at once:
    one does the work and the others wait for it. What is killed goes on at the shard it was at.

    Args:
        corpus: where the documents come from.
        tokenizer: ready for use (see `Tokenizer.prepare`).
        split: one of `corpus.splits`.
        cache_dir: folder of token files, created when missing.
        preparation: how to do it.

    Raises:
        DataError: the split is unknown or empty, a document cannot be encoded, or a cached file is damaged.
        StorageError: the folder cannot be written.
    """
    check_split(corpus, split)
    preparation = Preparation() if preparation is None else preparation
    started_at = time.monotonic()
    identity = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint(), "split": split}
    key = sha256_of_json([FORMAT_VERSION, identity])
    folder = cache_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', corpus.name)}-{split}-{key[:16]}"
    header = {"format_version": FORMAT_VERSION, "key": key, **identity}
    making = _Making(corpus, tokenizer, split, folder.with_name(f".{folder.name}.pieces"), key, preparation)
    built = build_once(folder, lambda temporary: {**header, **making.fill(temporary)})
    token_file = TokenFile.open(folder, {"key": key})
    seconds = time.monotonic() - started_at
    logger.info(
        "%s %s: %s documents, %s tokens, %s bytes, %s empty documents left out; %s in %.1f s%s: %s",
        corpus.name,
        split,
        *(f"{token_file.manifest[name]:,}" for name in COUNTS),
        "tokenised" if built else "found in the cache",
        seconds,
        f" ({making.tokens / seconds:,.0f} tokens/s)" if built else "",
        folder,
    )
    return token_file


class _Making:
    """The making of one token file, shard by shard; what is complete has a second name in a folder that survives.

    Args:
        corpus, tokenizer, split, preparation: see `prepare`.
        pieces: folder of what survives; it is gone when all is done.
        key: of the token file; a piece of another one is not used.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, split: str, pieces: Path, key: str, preparation: Preparation
    ) -> None:
        self.corpus, self.tokenizer, self.split = corpus, tokenizer, split
        self.pieces, self.key, self.preparation = pieces, key, preparation
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= MAX_TOKENS_UINT16 else "<u4")
        self.place = f"{split} split of {corpus.name}"
        self.counts = dict.fromkeys(COUNTS, 0)
        self.shards: list[int] = []
        self.tokens = 0
        """Tokenised by this process."""

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write shards, offsets and the tokenizer into `folder`; returns the rest of the manifest."""
        with (folder / OFFSETS).open("wb") as offsets:
            self._take_pieces(folder, offsets)
            earlier = self.counts["tokens"]
            self._make(folder, offsets)
            offsets.write(np.array(self.counts["tokens"], OFFSET_DTYPE).tobytes())
        if self.counts["documents"] == 0:
            raise DataError(
                f"the {self.split} split of the corpus {self.corpus.name} holds no text "
                f"({self.counts['empty_documents']} empty documents)"
            )
        self.tokens = self.counts["tokens"] - earlier
        write_json(folder / TOKENIZER, self.tokenizer.state())
        shutil.rmtree(self.pieces, ignore_errors=True)
        return {
            **self.counts,
            "shards": self.shards,
            "dtype": self.dtype.str,
            "vocab_size": self.tokenizer.vocab_size,
            "separator_id": self.tokenizer.separator_id,
        }

    def _take_pieces(self, folder: Path, offsets: BinaryIO) -> None:
        """Go on from what an earlier process completed."""
        while (piece := self.pieces / shard_name(len(self.shards))).is_dir():
            manifest = open_sealed(piece, {"key": self.key})
            try:
                lengths = np.fromfile(piece / LENGTHS, OFFSET_DTYPE)
                _place(piece / TOKENS, folder / shard_name(len(self.shards)))
            except FileNotFoundError:  # without locks, another process may have finished just now
                break
            self._add(lengths, {name: manifest[name] for name in COUNTS}, offsets)
        if self.shards:
            logger.info("%s: going on after %s shards that are there", self.place, len(self.shards))

    def _make(self, folder: Path, offsets: BinaryIO) -> None:
        """The shards that are missing."""
        read = self.counts["documents"] + self.counts["empty_documents"]
        documents = islice(read_documents(self.corpus, self.split), read, None)
        encode = _Encoder(self.tokenizer, self.dtype, self.place)
        batches = _in_order(encode, _numbered(_batches(documents), read), self.preparation.workers)
        with progress_bar(f"tokenising the {self.place}") as advance, contextlib.closing(batches):
            for first in batches:
                self._write(folder, _up_to(chain([first], batches), self.preparation.shard_tokens), offsets, advance)

    def _write(
        self,
        folder: Path,
        batches: Iterator["_Encoded"],
        offsets: BinaryIO,
        advance: Callable[[int, int, int], None],
    ) -> None:
        """One shard, and its second name; documents that are all empty have none."""
        shard = folder / shard_name(len(self.shards))
        counts, lengths = dict.fromkeys(COUNTS, 0), []
        with shard.open("wb") as tokens:
            for batch in batches:
                tokens.write(batch.tokens.tobytes())
                lengths.append(batch.lengths)
                for name, count in zip(COUNTS, batch.counts(), strict=True):
                    counts[name] += count
                advance(len(batch.lengths) + batch.empty, batch.bytes, len(batch.tokens))
        if not counts["tokens"]:
            shard.unlink()
            self.counts["empty_documents"] += counts["empty_documents"]
            return
        together = np.concatenate(lengths)
        with atomic_directory(self.pieces / shard.name) as piece:
            _place(shard, piece / TOKENS)
            (piece / LENGTHS).write_bytes(together.tobytes())
            seal(piece, {"key": self.key, **counts})
        self._add(together, counts, offsets)

    def _add(self, lengths: np.ndarray, counts: dict[str, int], offsets: BinaryIO) -> None:
        ends = self.counts["tokens"] + np.cumsum(lengths)
        offsets.write((ends - lengths).astype(OFFSET_DTYPE).tobytes())
        self.shards.append(counts["tokens"])
        for name, count in counts.items():
            self.counts[name] += count


class _Encoded(NamedTuple):
    """Some documents: tokens of all with separators, their lengths (int64), UTF-8 bytes, and how many were empty."""

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: int
    empty: int

    def counts(self) -> tuple[int, int, int, int]:
        """In the order of `COUNTS`."""
        return len(self.lengths), len(self.tokens), self.bytes, self.empty


class _Encoder:
    """Turns batches into tokens, and refuses what these do not stand for."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, place: str) -> None:
        self._tokenizer, self._dtype, self._place = tokenizer, dtype, place
        self._token_bytes = tokenizer.token_bytes()

    def __call__(self, first: int, batch: list[str]) -> _Encoded:
        """Encode documents that are numbered from `first` on."""
        kept = [(first + number, text) for number, text in enumerate(batch) if text]
        sizes = [self._utf8_size(number, text) for number, text in kept]
        separator = np.array([self._tokenizer.separator_id], self._dtype)
        pieces = [separator[:0]]
        encoded = self._tokenizer.encode_batch([text for _, text in kept])
        for (number, _), size, ids in zip(kept, sizes, encoded, strict=True):
            self._check_exact(number, size, ids)
            pieces += [separator, ids.astype(self._dtype)]
        lengths = np.array([1 + len(ids) for ids in encoded], OFFSET_DTYPE)
        return _Encoded(np.concatenate(pieces), lengths, sum(sizes), len(batch) - len(kept))

    def _utf8_size(self, number: int, text: str) -> int:
        try:
            return len(text.encode())
        except UnicodeEncodeError as error:
            raise DataError(
                f"document {number} of the {self._place} (counted from 0) holds a lone surrogate at character "
                f"{error.start}, which is not Unicode text; repair or remove that document"
            ) from error

    def _check_exact(self, number: int, size: int, ids: np.ndarray) -> None:
        represented = int(self._token_bytes[ids].sum())
        if represented != size:
            raise DataError(
                f"document {number} of the {self._place} (counted from 0) has {size:,} bytes but its tokens stand for "
                f"{represented:,}: the tokenizer does not reproduce it. Use another tokenizer."
            )


def _in_order(encode: _Encoder, batches: Iterable[tuple[int, list[str]]], workers: int) -> Generator[_Encoded]:
    """`encode` of every batch, in their order; in several processes a bounded number of batches ahead."""
    if not workers:
        yield from (encode(*batch) for batch in batches)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process has a core of its own
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    waiting: deque[Future[_Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, context, initializer=_install, initargs=(encode,))
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, *batch))
            if len(waiting) > BATCHES_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenises was killed, perhaps for want of memory; run again with fewer workers. Shards "
            "that were complete are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_installed: _Encoder


def _install(encode: _Encoder) -> None:
    global _installed
    _installed = encode


def _encode(first: int, batch: list[str]) -> _Encoded:
    return _installed(first, batch)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _numbered(batches: Iterable[list[str]], first: int) -> Iterator[tuple[int, list[str]]]:
    """Each batch with the number of its first document."""
    for batch in batches:
        yield first, batch
        first += len(batch)


def _up_to(batches: Iterator[_Encoded], tokens: int) -> Iterator[_Encoded]:
    """Batches until there are so many tokens."""
    for batch in batches:
        yield batch
        tokens -= len(batch.tokens)
        if tokens <= 0:
            return


def _place(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
