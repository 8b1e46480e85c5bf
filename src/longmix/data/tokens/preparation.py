"""From documents to token files, in pieces that survive a kill, and by several processes if wanted."""

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from longmix.data.corpora.corpus import Corpus, check_split, check_unchanged
from longmix.data.tokens.encoding import killed, start_pool
from longmix.data.tokens.sealed_folder import build_once
from longmix.data.tokens.token_files import FORMAT_VERSION, OFFSET_DTYPE, OFFSETS, TOKENIZER, TokenFile, shard_name
from longmix.data.tokens.tokenize_part import COUNTS, Advance, Part, Piece, Work, make_part
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.distributed.ranks import MOST_ON_A_MACHINE
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json, write_json
from longmix.progress import documents_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """How token files are made; the tokens and their order do not depend on it.

    Attributes:
        shard_tokens: a shard ends with the batch of documents that fills it, or with a part of the corpus after which
            the next does not fit; 2**27 are 256 MiB of uint16. The shards depend on it, and on nothing else here.
        workers: processes that tokenise, and read too if the corpus has parts; 0 for this one alone.

    Raises:
        ConfigError: a number is too small, or there would be too many processes.
    """

    shard_tokens: int = 1 << 27
    workers: int = 0

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens={self.shard_tokens} must be at least 1.")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be at least 0, which is none besides this process.")
        if self.workers > MOST_ON_A_MACHINE:
            raise ConfigError(f"workers={self.workers} must be at most {MOST_ON_A_MACHINE:,}.")


@runtime_checkable
class TokenizedCorpus(Corpus, Protocol):
    """A corpus whose tokens are there already, and its text is not."""

    def token_file(self, tokenizer: Tokenizer, split: str, cache_dir: Path, label: str = "") -> TokenFile:
        """The tokens of a split; see `prepare`."""
        ...


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    cache_dir: Path,
    preparation: Preparation | None = None,
    label: str = "",
) -> TokenFile:
    """Return the token file of a split, tokenising it first if no earlier run has.

    Memory stays bounded whatever the size of the corpus. Any number of processes may prepare the same split at once:
    one does the work and the others wait for it. Killed and run again, it continues behind the last whole pieces.

    Args:
        corpus: where the documents come from.
        tokenizer: ready for use (see `Tokenizer.prepare`).
        split: one of `corpus.splits`.
        cache_dir: folder of token files, created when missing.
        preparation: how to do it.
        label: what messages call the corpus; empty for its own name.

    Raises:
        DataError: the split is unknown or empty, a document cannot be encoded, or a cached file is damaged.
        StorageError: the folder cannot be written.
    """
    check_split(corpus, split)
    if isinstance(corpus, TokenizedCorpus):
        return corpus.token_file(tokenizer, split, cache_dir, label)
    preparation = Preparation() if preparation is None else preparation
    started_at = time.monotonic()
    identity = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint(), "split": split}
    key = sha256_of_json([FORMAT_VERSION, identity])
    folder = cache_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', corpus.name)}-{split}-{key[:16]}"
    header = {"format_version": FORMAT_VERSION, "key": key, **identity}
    pieces = folder.with_name(f".{folder.name}.pieces")
    work = Work(corpus, tokenizer, split, key, pieces, preparation.shard_tokens, label)
    made: list[int] = []
    built = build_once(folder, lambda temporary: {**header, **_fill(temporary, work, preparation.workers, made)})
    shutil.rmtree(pieces, ignore_errors=True)
    token_file = TokenFile.open(folder, {"key": key})
    seconds = time.monotonic() - started_at
    logger.info(
        "%s %s: %s documents, %s tokens, %s bytes, %s empty documents left out; %s in %.1f s%s: %s",
        label or corpus.name,
        split,
        *(f"{token_file.manifest[name]:,}" for name in COUNTS),
        "tokenised" if built else "found in the cache",
        seconds,
        f" ({sum(made) / seconds:,.0f} tokens/s)" if built else "",
        folder,
    )
    return token_file


def _fill(folder: Path, work: Work, workers: int, made: list[int]) -> dict[str, Any]:
    """Write shards, offsets and tokenizer; return the rest of the manifest. Token counts of new pieces go to `made`."""
    with documents_bar(f"tokenising the {work.source_name}") as advance:
        parts = _make_parts(work, folder, workers, advance)
    check_unchanged(work.corpus)
    pieces = [piece for part in parts for piece in part.pieces]
    counts = {name: sum(piece.counts[name] for piece in pieces) for name in COUNTS}
    counts["empty_documents"] += sum(part.empty_documents for part in parts)
    if not pieces:
        raise DataError(
            f"the {work.split} split of the corpus {work.corpus.name} holds no text "
            f"({counts['empty_documents']} empty documents); give it files with text, or if it is held out of another "
            "split, hold out or take more"
        )
    made += [piece.counts["tokens"] for part in parts for piece in part.pieces[part.found :]]
    shards = _join(folder, pieces, work.shard_tokens)
    for path in folder.glob("part-*"):
        shutil.rmtree(path)
    write_json(folder / TOKENIZER, work.tokenizer.state())
    return {
        **counts,
        "shards": shards,
        "dtype": work.dtype.str,
        "vocab_size": work.tokenizer.vocab_size,
        "separator_id": work.tokenizer.separator_id,
    }


def _make_parts(work: Work, folder: Path, workers: int, advance: Advance) -> list[Part]:
    """Make all parts. Several parts run in processes of their own; a single part shares out its batches."""
    if not workers or work.parts == 1:
        return [make_part(work, number, folder, workers, advance) for number in range(work.parts)]
    if work.parts < workers:
        logger.info(
            "%s: read in %s parts, so that no more of the %s processes work", work.source_name, work.parts, workers
        )
    stop = get_context("spawn").Event()
    pool = start_pool(min(workers, work.parts), _install, work, folder, stop)
    try:
        futures = [pool.submit(_make_part, number) for number in range(work.parts)]
        for future in as_completed(futures):
            for piece in future.result().pieces:
                advance(piece.counts["documents"], piece.counts["bytes"], piece.counts["tokens"])
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise killed() from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _join(folder: Path, pieces: list[Piece], shard_tokens: int) -> list[int]:
    """Join pieces to shards, several small ones to one, and write the offsets; returns the tokens of each shard."""
    shards: list[int] = []
    end = 0
    with (folder / OFFSETS).open("wb") as offsets:
        for group in _groups(pieces, shard_tokens):
            shard = folder / shard_name(len(shards))
            _concatenate([piece.tokens for piece in group], shard)
            for piece in group:
                lengths = np.fromfile(piece.lengths, OFFSET_DTYPE)
                ends = end + np.cumsum(lengths)
                offsets.write((ends - lengths).astype(OFFSET_DTYPE).tobytes())
                end += piece.counts["tokens"]
            shards.append(sum(piece.counts["tokens"] for piece in group))
        offsets.write(np.array(end, OFFSET_DTYPE).tobytes())
    return shards


def _groups(pieces: Iterable[Piece], shard_tokens: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces that fit into a shard together."""
    group: list[Piece] = []
    tokens = 0
    for piece in pieces:
        if group and tokens + piece.counts["tokens"] > shard_tokens:
            yield group
            group, tokens = [], 0
        group.append(piece)
        tokens += piece.counts["tokens"]
    if group:
        yield group


def _concatenate(files: list[Path], target: Path) -> None:
    if len(files) == 1:
        files[0].rename(target)
        return
    with target.open("wb") as whole:
        for file in files:
            with file.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
            file.unlink()


_installed: tuple[Work, Path, Event]


def _install(work: Work, folder: Path, stop: Event) -> None:
    global _installed
    _installed = work, folder, stop


def _make_part(number: int) -> Part:
    work, folder, stop = _installed

    def advance(documents: int, num_bytes: int, tokens: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # the run has ended, so nothing needs the rest of this part

    return make_part(work, number, folder, 0, advance)
