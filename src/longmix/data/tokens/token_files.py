"""Token files: a split of a corpus as memory-mapped tokens with document offsets and a manifest.

A document is stored as the separator followed by its tokens. The separator at its front tells the model that
something new starts; as the target of the token before it, it teaches where documents end.

A folder `<corpus>-<split>-<key>` holds shards `tokens-00000.bin`, `tokens-00001.bin`, ... (uint16 or uint32, little
endian; no document lies in two), `offsets.bin` (int64, little endian: where each document starts in all shards
together, and the end), `tokenizer_state.json` and `manifest.json`. The key is a hash of everything the tokens depend
on, so a folder is either right or not looked at. `preparation` makes them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from longmix.data.tokens.sealed_folder import MANIFEST, Verify, damaged, is_hashed, open_sealed
from longmix.errors import DataError

FORMAT_VERSION = 2
OFFSET_DTYPE = np.dtype("<i8")
OFFSETS = "offsets.bin"
TOKENIZER = "tokenizer_state.json"
DTYPES = ("<u2", "<u4")
TRIES = 3
CHECKED_TOGETHER = 1 << 22
"""Tokens that are checked at once, to bound the memory."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"tokens-{number:05d}.bin"


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest that lacks an entry of a token file, or has one of the wrong type.

    Raises:
        DataError: names the entry.
    """
    counts = {name: manifest.get(name) for name in ("documents", "tokens", "bytes", "vocab_size")}
    shards = manifest.get("shards")
    wrong = [name for name, count in counts.items() if not _is_count(count)]
    if not isinstance(shards, list) or not shards or not all(_is_count(count) and count > 0 for count in shards):
        wrong.append("shards")
    elif not wrong and sum(shards) != counts["tokens"]:
        wrong.append("tokens")
    if manifest.get("dtype") not in DTYPES:
        wrong.append("dtype")
    separator, vocab_size = manifest.get("separator_id"), manifest.get("vocab_size")
    if not (_is_count(separator) and _is_count(vocab_size) and separator < vocab_size):
        wrong.append("separator_id")
    wrong += [name for name in ("key", "tokenizer") if not isinstance(manifest.get(name), str)]
    if wrong:
        raise damaged(path, f"it says nothing sensible of {', '.join(wrong)}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_whole(mapped: np.ndarray) -> None:
    """Refuse a mapped file that was cut short since: reading behind its end kills the process (SIGBUS).

    Raises:
        DataError: names the file.
    """
    if isinstance(mapped, np.memmap) and mapped._mmap.size() < mapped.nbytes:  # type: ignore[attr-defined]
        raise damaged(Path(str(mapped.filename)), "it was cut short while it was in use")


class ShardSource(Protocol):
    """A source of shards that do not lie beside the manifest."""

    @property
    def most_shards(self) -> int:
        """The number of shards that are kept open at a time."""
        ...

    def fetch(self, name: str) -> Path:
        """A local copy of a shard.

        Raises:
            DataError: it cannot be had.
        """
        ...

    def release(self, name: str) -> None:
        """Allow the local copy to be deleted for now."""
        ...


class ShardedTokens:
    """Shards as one array, read by slices or by arrays of positions; each is opened when it is first needed.

    Args:
        counts: tokens of each shard.
        dtype: of the tokens.
        open_shard: maps a shard's number to its tokens.
        close_shard: told the number of a shard that was closed.
        most_open: how many shards are open at a time; the least recently used is closed for another.
    """

    def __init__(
        self,
        counts: list[int],
        dtype: np.dtype,
        open_shard: Callable[[int], np.ndarray],
        close_shard: Callable[[int], None] = lambda number: None,
        most_open: int | None = None,
    ) -> None:
        self.dtype = dtype
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._open_shard, self._close_shard, self._most_open = open_shard, close_shard, most_open
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, indices: Any) -> Any:
        if isinstance(indices, slice):
            return self._slice(*indices.indices(len(self)))
        indices = np.asarray(indices)
        numbers = np.searchsorted(self._ends, indices, side="right")
        if indices.ndim == 0:
            return self._shard(int(numbers))[indices - self._starts[numbers]]
        found = np.empty(indices.shape, self.dtype)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._shard(number)[indices[here] - self._starts[number]]
        return found

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if stop <= start:
            return np.empty(0, self.dtype)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = [
            self._shard(number)[max(start - self._starts[number], 0) : stop - self._starts[number]]
            for number in range(first, last + 1)
        ]
        return np.concatenate(parts)[::step]

    def _shard(self, number: int) -> np.ndarray:
        shard = self._open.pop(number, None)
        if shard is None:
            if self._most_open is not None and len(self._open) >= self._most_open:
                oldest = next(iter(self._open))
                del self._open[oldest]
                self._close_shard(oldest)
            shard = self._open_shard(number)
        self._open[number] = shard
        check_whole(shard)
        return shard


@dataclass(frozen=True)
class TokenFile:
    """An opened token file; `open` and `prepare` make it. Small to pickle: only the folder and manifest travel.

    Attributes:
        folder: where it lies.
        manifest: what `manifest.json` says, checked against the files.
        source: where the shards are fetched from; None if they lie in the folder.
    """

    folder: Path
    manifest: dict[str, Any]
    source: ShardSource | None = None

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
        check_manifest(folder / MANIFEST, manifest)
        token_file = cls(folder, manifest)
        token_file.check_offsets()
        for number, count in enumerate(token_file.shards):
            if is_hashed(count * token_file.dtype.itemsize, verify):
                token_file.check_ids(number)
        return token_file

    @property
    def tokens(self) -> np.ndarray | ShardedTokens:
        """All tokens, uint16 or uint32 [num_tokens], memory-mapped; of several shards to be read piece by piece.

        To be asked for before each reading, as that is when the file is seen to be whole.

        Raises:
            DataError: it was cut short.
        """
        if isinstance(self._tokens, np.ndarray):
            check_whole(self._tokens)
        return self._tokens

    @functools.cached_property
    def _tokens(self) -> np.ndarray | ShardedTokens:
        if self.source is None and len(self.shards) == 1:
            return self._map(0)
        source = self.source
        if source is None:
            return ShardedTokens(self.shards, self.dtype, self._map)
        release = source.release
        return ShardedTokens(
            self.shards, self.dtype, self._map, lambda number: release(shard_name(number)), source.most_shards
        )

    @property
    def offsets(self) -> np.ndarray:
        """Where each document starts in `tokens`, and the end: memory-mapped int64 [num_documents + 1].

        Raises:
            DataError: the file was cut short.
        """
        check_whole(self._offsets)
        return self._offsets

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.memmap(self._path(OFFSETS), dtype=OFFSET_DTYPE, mode="r")

    @property
    def dtype(self) -> np.dtype:
        """The type of the tokens."""
        return np.dtype(self.manifest["dtype"])

    @property
    def shards(self) -> list[int]:
        """The number of tokens in each shard."""
        return self.manifest["shards"]

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
    def vocab_size(self) -> int:
        """The number of ids that the tokenizer has; every token is below it."""
        return self.manifest["vocab_size"]

    @property
    def separator_id(self) -> int:
        """The id that starts every document."""
        return self.manifest["separator_id"]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _path(self, name: str) -> Path:
        return self.folder / name if self.source is None else self.source.fetch(name)

    def _map(self, number: int) -> np.ndarray:
        if self.source is None:
            return np.memmap(self.folder / shard_name(number), dtype=self.dtype, mode="r")
        for _ in range(TRIES):
            path = self.source.fetch(shard_name(number))
            try:
                shard = np.memmap(path, dtype=self.dtype, mode="r")
            except FileNotFoundError:  # another process was done with its copy at this very moment
                continue
            self._check_ids(path, shard)
            return shard
        raise DataError(f"{path} is deleted as soon as it has been fetched; give each job a data.cache_dir of its own.")

    def check_ids(self, number: int) -> None:
        """Refuse a shard with an id that the tokenizer does not have.

        Raises:
            DataError: names the file.
        """
        self._check_ids(self.folder / shard_name(number), self._map(number))

    def _check_ids(self, path: Path, shard: np.ndarray) -> None:
        largest = max(int(shard[i : i + CHECKED_TOGETHER].max()) for i in range(0, len(shard), CHECKED_TOGETHER))
        if largest >= self.vocab_size:
            known = f"its tokenizer has the tokens 0 to {self.vocab_size - 1}"
            raise damaged(path, f"it holds the token {largest}, and {known}")

    def check_sizes(self) -> None:
        """Refuse counts and sizes of files that do not fit together.

        Raises:
            DataError: names the file.
        """
        sizes = {shard_name(number): count * self.dtype.itemsize for number, count in enumerate(self.shards)}
        sizes[OFFSETS] = (self.num_documents + 1) * OFFSET_DTYPE.itemsize
        for name, size in sizes.items():
            if self.manifest["files"].get(name, {}).get("bytes") != size:
                raise damaged(self.folder / name, f"the manifest's counts need {size:,} bytes")

    def check_offsets(self) -> None:
        """Refuse counts, files and offsets that do not fit together.

        Raises:
            DataError: names the file.
        """
        self.check_sizes()
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != self.num_tokens or np.any(np.diff(offsets) < 1):
            raise damaged(self.folder / OFFSETS, f"its offsets do not rise from 0 to {self.num_tokens:,}")
        if not np.isin(np.cumsum(self.shards), offsets).all():
            raise damaged(self.folder / OFFSETS, "a document lies in two shards")
