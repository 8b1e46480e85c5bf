"""Token files: a split of a corpus as memory-mapped tokens with document offsets and a manifest.

A document is stored as the separator followed by its tokens. The separator at its front tells the model that
something new starts; as the target of the token before it, it teaches where documents end.

A folder `<corpus>-<split>-<key>` holds `tokens.bin` (uint16 or uint32, little endian), `offsets.bin` (int64, little
endian: where each document starts, and the end) and `manifest.json`. The key is a hash of everything the tokens
depend on, so a folder is either right or not looked at.
"""

import functools
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longmix.data.corpus import Corpus, check_split, read_documents
from longmix.data.progress import progress_bar
from longmix.data.sealed import Verify, build_once, damaged, open_sealed, sha256_of_json
from longmix.data.tokenizers import Tokenizer
from longmix.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 1024
OFFSET_DTYPE = np.dtype("<i8")
MAX_TOKENS_UINT16 = 1 << 16


@dataclass(frozen=True)
class TokenFile:
    """An opened token file; `open` and `prepare` make it. Small to pickle: only the folder and manifest travel.

    Attributes:
        folder: where it lies.
        manifest: what `manifest.json` says, checked against the files.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, expected: dict[str, Any] | None = None, verify: Verify = "auto") -> "TokenFile":
        """Open a folder that `prepare` wrote, after checking it.

        Args:
            folder: the folder.
            expected: further entries the manifest must hold, such as its key.
            verify: "size" compares file sizes, "sha256" hashes every file, "auto" hashes files of at most 1 GiB.

        Raises:
            DataError: a file is missing, damaged, truncated or does not fit the rest; names it and the cure.
        """
        manifest = open_sealed(folder, {"format_version": FORMAT_VERSION, **(expected or {})}, verify)
        token_file = cls(folder, manifest)
        token_file._check_offsets()
        return token_file

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped, uint16 or uint32 [num_tokens]."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.manifest["dtype"], mode="r")

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document starts in `tokens`, and the end: memory-mapped int64 [num_documents + 1]."""
        return np.memmap(self.folder / "offsets.bin", dtype=OFFSET_DTYPE, mode="r")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.manifest["documents"]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, separators included."""
        return self.manifest["tokens"]

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of text the tokens stand for; separators stand for none."""
        return self.manifest["bytes"]

    @property
    def separator_id(self) -> int:
        """The id that starts every document."""
        return self.manifest["separator_id"]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _check_offsets(self) -> None:
        token_bytes = np.dtype(self.manifest["dtype"]).itemsize
        sizes = {"tokens.bin": self.num_tokens * token_bytes, "offsets.bin": (self.num_documents + 1) * 8}
        for name, size in sizes.items():
            if self.manifest["files"].get(name, {}).get("bytes") != size:
                raise damaged(self.folder / name, f"the manifest's counts need {size:,} bytes")
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != self.num_tokens or np.any(np.diff(offsets) < 1):
            raise damaged(self.folder / "offsets.bin", f"its offsets do not rise from 0 to {self.num_tokens:,}")


def prepare(corpus: Corpus, tokenizer: Tokenizer, split: str, cache_dir: Path) -> TokenFile:
    """Return the token file of a split, tokenising it first if no earlier run has.

    Memory stays bounded whatever the size of the corpus. Any number of processes may prepare the same split at once:
    one does the work and the others wait for it.

    Args:
        corpus: where the documents come from.
        tokenizer: ready for use (see `Tokenizer.prepare`).
        split: one of `corpus.splits`.
        cache_dir: folder of token files, created when missing.

    Raises:
        DataError: the split is unknown or empty, a document cannot be encoded, or a cached file is damaged.
        StorageError: the folder cannot be written.
    """
    check_split(corpus, split)
    started_at = time.monotonic()
    identity = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint(), "split": split}
    key = sha256_of_json([FORMAT_VERSION, identity])
    folder = cache_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', corpus.name)}-{split}-{key[:16]}"
    header = {"format_version": FORMAT_VERSION, "key": key, **identity}
    built = build_once(folder, lambda temporary: {**header, **_write(corpus, tokenizer, split, temporary)})
    token_file = TokenFile.open(folder, {"key": key})
    logger.info(
        "%s %s: %s documents, %s tokens, %s bytes, %s empty documents left out; %s in %.1f s: %s",
        corpus.name,
        split,
        *(f"{token_file.manifest[name]:,}" for name in ("documents", "tokens", "bytes", "empty_documents")),
        "tokenised" if built else "found in the cache",
        time.monotonic() - started_at,
        folder,
    )
    return token_file


def _write(corpus: Corpus, tokenizer: Tokenizer, split: str, folder: Path) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= MAX_TOKENS_UINT16 else "<u4")
    writer = _Writer(tokenizer, dtype, f"{split} split of {corpus.name}")
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "offsets.bin").open("wb") as offsets,
        progress_bar(f"tokenising the {split} split of {corpus.name}") as advance,
    ):
        for batch in _batches(read_documents(corpus, split)):
            num_bytes = writer.write(batch, tokens, offsets)
            advance(len(batch), num_bytes)
        offsets.write(np.array(writer.tokens, OFFSET_DTYPE).tobytes())
    if writer.documents == 0:
        raise DataError(
            f"the {split} split of the corpus {corpus.name} holds no text ({writer.empty_documents} empty documents)"
        )
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "bytes": writer.bytes,
        "empty_documents": writer.empty_documents,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
    }


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
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


class _Writer:
    """Appends batches of documents and counts what goes in and what stays out."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, place: str) -> None:
        self.documents = self.tokens = self.bytes = self.empty_documents = 0
        self._tokenizer = tokenizer
        self._token_bytes = tokenizer.token_bytes()
        self._dtype = dtype
        self._place = place

    def write(self, batch: list[str], tokens: BinaryIO, offsets: BinaryIO) -> int:
        """Append a batch; return its UTF-8 bytes."""
        first = self.documents + self.empty_documents
        kept = [(first + number, text) for number, text in enumerate(batch) if text]
        sizes = [self._utf8_size(number, text) for number, text in kept]
        separator = np.array([self._tokenizer.separator_id], self._dtype)
        encoded = self._tokenizer.encode_batch([text for _, text in kept])
        for (number, _), size, ids in zip(kept, sizes, encoded, strict=True):
            self._check_exact(number, size, ids)
            offsets.write(np.array(self.tokens, OFFSET_DTYPE).tobytes())
            tokens.write(np.concatenate([separator, ids.astype(self._dtype)]).tobytes())
            self.tokens += 1 + len(ids)
        self.documents += len(kept)
        self.empty_documents += len(batch) - len(kept)
        self.bytes += sum(sizes)
        return sum(sizes)

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
