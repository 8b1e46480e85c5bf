"""Tokenise documents batch by batch, in this process or in several, in order."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from longmix.data.corpora.corpus import Reading
from longmix.data.tokens.token_files import OFFSET_DTYPE
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import DataError

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 1024
BATCHES_AHEAD = 3
"""Batches of each process that wait to be tokenised or written."""


class TextBatch(NamedTuple):
    """Some documents: the number of the first, their texts, and the position of the reading after them."""

    first: int
    texts: list[str]
    position: Any


class Encoded(NamedTuple):
    """A batch as tokens.

    Attributes:
        tokens: of all documents, with separators.
        lengths: of each document in tokens, int64; empty documents have none.
        bytes: of the texts in UTF-8, as they were encoded.
        empty: how many documents were empty.
        position: see `TextBatch`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: int
    empty: int
    position: Any


class Encoder:
    """Turns batches into tokens, and refuses texts that the tokens do not reproduce.

    Args:
        tokenizer: ready for use.
        dtype: of the tokens.
        source_name: where the documents come from, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, source_name: str) -> None:
        self._tokenizer, self._dtype, self._source_name = tokenizer, dtype, source_name
        self._token_bytes = tokenizer.token_bytes()
        self._has_replaced = False

    def __call__(self, batch: TextBatch) -> Encoded:
        """Encode the documents of a batch.

        Raises:
            DataError: one of them is not Unicode text, or its tokens do not reproduce it.
        """
        kept = [(number, self._admit(number, text)) for number, text in enumerate(batch.texts, batch.first) if text]
        sizes = [len(text.encode()) for _, text in kept]
        separator = np.array([self._tokenizer.separator_id], self._dtype)
        pieces = [separator[:0]]
        encoded = self._tokenizer.encode_batch([text for _, text in kept])
        for (number, _), size, ids in zip(kept, sizes, encoded, strict=True):
            self._check_exact(number, size, ids)
            pieces += [separator, ids.astype(self._dtype)]
        lengths = np.array([1 + len(ids) for ids in encoded], OFFSET_DTYPE)
        return Encoded(np.concatenate(pieces), lengths, sum(sizes), len(batch.texts) - len(kept), batch.position)

    def _admit(self, number: int, text: str) -> str:
        try:
            text.encode()
            admitted = self._tokenizer.admit(text)
        except UnicodeEncodeError as error:
            raise DataError(
                f"document {number} of the {self._source_name} (counted from 0) holds a lone surrogate at character "
                f"{error.start}, which is not Unicode text; repair or remove that document"
            ) from error
        except DataError as error:
            raise DataError(f"document {number} of the {self._source_name} (counted from 0): {error}") from error
        if admitted != text and not self._has_replaced:
            self._has_replaced = True  # once, not for each of a million documents
            logger.warning(
                "characters of the %s that the tokenizer has no tokens for are replaced, first in document %d",
                *(self._source_name, number),
            )
        return admitted

    def _check_exact(self, number: int, size: int, ids: np.ndarray) -> None:
        represented = int(self._token_bytes[ids].sum())
        if represented != size:
            raise DataError(
                f"document {number} of the {self._source_name} (counted from 0) has {size:,} bytes but its tokens "
                f"stand for {represented:,}: the tokenizer does not reproduce it. Use another tokenizer."
            )


def batches_of(reading: Reading, first: int) -> Iterator[TextBatch]:
    """The documents of a reading in batches, numbered from `first` on."""
    texts: list[str] = []
    characters = 0
    for text in reading:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield TextBatch(first, texts, reading.position)
            first += len(texts)
            texts, characters = [], 0
    if texts:
        yield TextBatch(first, texts, reading.position)


def encode_in_order(encode: Encoder, batches: Iterable[TextBatch], workers: int) -> Generator[Encoded]:
    """`encode` of every batch, in their order; in several processes a bounded number of batches ahead.

    Raises:
        DataError: see `Encoder`, or a process was killed.
    """
    if not workers:
        yield from map(encode, batches)
        return
    waiting: deque[Future[Encoded]] = deque()
    pool = start_pool(workers, _install, encode)
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > BATCHES_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise killed() from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_pool(workers: int, initialize: Any, *arguments: Any) -> ProcessPoolExecutor:
    """Start a pool of processes, one core each. They call `initialize(*arguments)` first, and end with this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(initialize, *arguments))


def killed() -> DataError:
    """The error for a process of the pool that was killed."""
    return DataError(
        "a process that tokenises was killed, perhaps for want of memory; run again with fewer workers. Shards that "
        "were complete are kept."
    )


def _begin(initialize: Any, *arguments: Any) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes at once; the parent decides, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initialize(*arguments)


def _end_with_parent() -> None:
    """End this process of a pool when its parent is killed; it would outlive it otherwise."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


_installed: Encoder


def _install(encode: Encoder) -> None:
    global _installed
    _installed = encode


def _encode(batch: TextBatch) -> Encoded:
    return _installed(batch)
