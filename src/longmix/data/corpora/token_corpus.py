"""A corpus of token files that other programs wrote: read where they lie, never copied."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longmix.data.corpora.corpus import SplitByContent, check_split
from longmix.data.corpora.local_files import Stamp, check_unchanged, find_files, refuse_overlap
from longmix.data.tokens.layouts import SUFFIXES, Place, check_words, index_of, place_of
from longmix.data.tokens.placed import PlacedTokens, Share, find_mark, write_index
from longmix.data.tokens.sealed_folder import build_once, open_sealed
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json

logger = logging.getLogger(__name__)

INDEX_VERSION = 1

SAMPLE_BYTES = 1 << 16
SAMPLES = 64
"""A file is known by its size and by so many samples of its content, evenly spread, first and last bytes included."""


class TokenFiles(SplitByContent):
    """Token files of Megatron-LM, RWKV, llm.c, modded-nanogpt, OLMo or NumPy; see `longmix.data.tokens.layouts`.

    The tokens are mapped into memory where they lie. They are read once, for an index of the documents in `cache_dir`.

    Args:
        path: file, folder (all `.bin` and `.npy` files below it) or glob pattern, or a list of these; a Megatron file
            also without its ending. All of one format and type.
        format: "auto", "megatron", "llmc", "npy" or "raw".
        dtype: "uint16" or "uint32", of tokens without a header; "auto" takes uint16 up to 65,536 ids.
        eod: the id at the borders of documents. Not given, it is what all documents of Megatron's index end or begin
            with, or else the tokenizer's separator.
        validation: files of their own for validation; without them, `validation_fraction` of the documents is held out.
        test: likewise for test.
        validation_fraction: share of the documents of `path` held out for validation, chosen by their first tokens
            and length; of a single document, its end.
        test_fraction: share held out for test.

    Raises:
        ConfigError: a setting is impossible.
        DataError: a path matches nothing, or a file belongs to two splits.
    """

    name = "tokens"

    def __init__(
        self,
        path: str | Sequence[str],
        format: str = "auto",
        dtype: str = "auto",
        eod: int | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.0,
    ) -> None:
        check_words(format, dtype)
        if path is None:
            raise ConfigError("data.corpus.path is required; give a file, a folder, a pattern, or a list of these.")
        if eod is not None and eod < 0:
            raise ConfigError(f"data.corpus.eod={eod} must be an id of the tokenizer, or null.")
        given = {"train": ("path", path), "validation": ("validation", validation), "test": ("test", test)}
        sources = {
            split: find_files(f"data.corpus.{key}", _with_endings(paths), SUFFIXES, (".idx",))
            for split, (key, paths) in given.items()
            if paths is not None
        }
        refuse_overlap(sources)
        super().__init__(sources, validation_fraction, test_fraction)
        self._format, self._dtype, self._eod = format, dtype, eod
        self._stamps: dict[Path, Stamp] = {}

    def _read(self, source: Any) -> Iterator[str]:
        raise DataError(
            f"the token files of {self.name} hold no text. Give the tokenizer that they were made with, or "
            "tokenizer=ids tokenizer.vocab_size=N."
        )

    def documents(self, split: str) -> Iterator[str]:
        """Refused: token files hold tokens, not text.

        Raises:
            DataError: always.
        """
        return self._read(None)

    def check_unchanged(self) -> None:
        """Refuse files that changed after the fingerprint was computed."""
        check_unchanged(self._stamps)

    def _identify(self, source: list[Path]) -> dict[str, Any]:
        common = Path(os.path.commonpath([file.parent for file in source]))
        digest, total = hashlib.sha256(), 0
        for file in source:
            for part in (file, index_of(file)):
                if part == file or part.exists():
                    size, content = self._stamp_and_sample(part)
                    name = part.relative_to(common).as_posix()
                    digest.update(f"{name}\0{size}\0{content}\n".encode(errors="surrogateescape"))
                    total += size
        return {"files": len(source), "bytes": total, "samples_sha256": digest.hexdigest()}

    def _stamp_and_sample(self, file: Path) -> tuple[int, str]:
        try:
            facts = file.stat()
            self._stamps[file] = Stamp(facts.st_ino, facts.st_size, facts.st_mtime_ns)
            return facts.st_size, sampled_sha256(file, facts.st_size)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error

    def _compute_fingerprint(self) -> dict[str, Any]:
        sources = {split: self._identify(source) for split, source in self._sources.items()}
        words = {"format": self._format, "dtype": self._dtype, "eod": self._eod}
        return {"kind": "TokenFiles", "sources": sources, "fractions": self._fractions, **words}

    def token_file(self, tokenizer: Tokenizer, split: str, cache_dir: Path, label: str = "") -> TokenFile:
        """The tokens of a split where they lie; the index of the documents is made first, if no earlier run has.

        Args:
            tokenizer: which the files were made with.
            split: one of `splits`.
            cache_dir: folder of the index.
            label: what messages call the corpus; empty for its own name.

        Raises:
            DataError: the files are damaged, of several types, or hold tokens that the tokenizer does not have; or
                nothing says which token is at the borders of documents.
        """
        check_split(self, split)
        started_at = time.monotonic()
        source = split if split in self._sources else "train"
        places = self._places(self._sources[source], tokenizer.vocab_size)
        identity = {"corpus": self.fingerprint(), "tokenizer": tokenizer.fingerprint()}
        key = sha256_of_json(["tokens", INDEX_VERSION, identity, source])
        folder = cache_dir / f"tokens.index.{key[:16]}"
        sizes = tokenizer.token_bytes()

        def write(temporary: Path) -> dict[str, Any]:
            mark = self._mark(places, tokenizer)
            counts = write_index(temporary, places, mark, sizes)
            check_unchanged(self._stamps)
            return {"index_version": INDEX_VERSION, "key": key, "separator_id": mark, "counts": counts}

        built = build_once(folder, write)
        index = open_sealed(folder, {"index_version": INDEX_VERSION, "key": key})
        manifest = {
            "format_version": INDEX_VERSION,
            "key": sha256_of_json([key, split]),
            **identity,
            "split": split,
            "dtype": places[0].dtype,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": index["separator_id"],
            "empty_documents": 0,
            **index["counts"],
            "files": index["files"],
        }
        share = Share(split, self._fractions if source == "train" else {})
        opened = PlacedTokens(folder, manifest, None, tuple(places), share).opened(sizes)
        if not index["counts"]["marks"]:
            logger.warning("no file of %s holds the token %d, data.eod", label or self.name, index["separator_id"])
        logger.info(
            "%s %s: %s documents, %s tokens, %s; %s %s, read in place, borders at the token %d; index %s in %.1f s: %s",
            *(label or self.name, split, f"{opened.num_documents:,}", f"{opened.num_tokens:,}"),
            f"{opened.num_bytes:,} bytes" if opened.num_bytes else "bytes unknown",
            *(len(places), places[0].format, index["separator_id"]),
            *("made" if built else "found in the cache", time.monotonic() - started_at, folder),
        )
        return opened

    def _places(self, files: list[Path], vocab_size: int) -> list[Place]:
        places = [place_of(file, self._format, self._dtype, vocab_size) for file in files]
        first = places[0]
        for place in places:
            if (place.format, place.dtype) != (first.format, first.dtype):
                raise DataError(
                    f"{place.path} is {place.format} of {np.dtype(place.dtype)} and {first.path} {first.format} of "
                    f"{np.dtype(first.dtype)}; give files of one kind, by a pattern."
                )
        return places

    def _mark(self, places: list[Place], tokenizer: Tokenizer) -> int:
        found = self._eod if self._eod is not None else find_mark(places)
        sizes = tokenizer.token_bytes()
        is_text = (
            self._eod is None and found is not None and found < len(sizes) and sizes[found]
        )  # such as a line's end
        if (found is None or is_text) and tokenizer.separator_id >= 0:
            found = tokenizer.separator_id
        if found is None:
            raise ConfigError(
                "data.corpus.eod: which token is at the borders of documents? Give its id, such as 50256 for GPT-2's "
                "<|endoftext|>, or a tokenizer that has it as its separator."
            )
        if found >= tokenizer.vocab_size:
            raise ConfigError(
                f"data.corpus.eod={found} is no id of the tokenizer, which has 0 to {tokenizer.vocab_size - 1:,}."
            )
        return found


def _with_endings(paths: str | Sequence[str]) -> list[str]:
    """The paths, those of Megatron files with the ending .bin."""
    given = [paths] if isinstance(paths, str) else list(paths)
    return [_with_ending(path) if isinstance(path, str) and path.strip() else path for path in given]


def _with_ending(path: str) -> str:
    stem = path.removesuffix(".idx")
    is_prefix = stem != path or not os.path.lexists(path)
    return f"{stem}.bin" if is_prefix and Path(f"{stem}.idx").expanduser().is_file() else path


def sampled_sha256(file: Path, size: int) -> str:
    """SHA-256 of samples of a file: all of a small one."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            for number in range(SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
