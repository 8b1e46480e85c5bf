"""Token files of other programs as token files of longmix: read where they lie, with an index of their documents.

A document begins with the token that marks a border, as in longmix's own files. Most programs write that token at a
document's end: there it counts as the beginning of the next one. One behind which a file ends, or another follows, is
left out: it would be an empty document.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longmix.data.tokens.layouts import Place, document_borders
from longmix.data.tokens.token_files import CHECKED_TOGETHER, ShardedTokens, TokenFile
from longmix.errors import DataError
from longmix.wording import counted

STARTS, LENGTHS, BYTES, NUMBERS = "starts", "lengths", "bytes", "numbers"
"""Files of an index, one number a document: where it starts in all files together, its tokens, its bytes of text, and
a number between 0 and 2**64 that depends on its first tokens and its length alone."""

NUMBERED_TOKENS = 32
"""First tokens of a document that fix its number."""

NUMBERED_TOGETHER = 1 << 16

FEWEST_ALIKE = 10
"""So many documents must end with one token before it is taken for the mark of their ends."""


def find_mark(places: Sequence[Place]) -> int | None:
    """The token that all documents of files with an index end with, or all begin with; None if there is none."""
    ends: set[int] = set()
    begins: set[int] = set()
    documents = 0
    for place in places:
        if place.format != "megatron":
            return None
        borders, tokens = np.unique(document_borders(place.path)), place.map()
        documents += len(borders) - 1
        ends.update(np.unique(tokens[borders[1:] - 1]).tolist())
        begins.update(np.unique(tokens[borders[:-1]]).tolist())
        if len(ends) > 1 and len(begins) > 1:
            return None
    found = ends if len(ends) == 1 else begins
    return next(iter(found)) if len(found) == 1 and documents >= FEWEST_ALIKE else None


def write_index(folder: Path, places: Sequence[Place], mark: int, token_bytes: np.ndarray) -> dict[str, Any]:
    """Read all tokens once, and write where the documents lie.

    Args:
        folder: for the files.
        places: of the tokens.
        mark: the token at the borders of documents.
        token_bytes: bytes of text that each id stands for, int [ids]; ids from its end on are refused.

    Returns:
        `documents` of each file, and `marks`, how often the mark was found.

    Raises:
        DataError: a token is no id; names file and place.
    """
    counts, marks, base = [], 0, 0
    with contextlib.ExitStack() as stack:
        starts, lengths, sizes, numbers = (
            stack.enter_context((folder / name).open("wb")) for name in (STARTS, LENGTHS, BYTES, NUMBERS)
        )
        for place in places:
            tokens = place.map()
            found = _marks(place, tokens, mark, len(token_bytes))
            marks += len(found)
            begins, ends = _documents(place, tokens, found, mark)
            (begins + base).astype("<i8").tofile(starts)
            (ends - begins).astype("<i8").tofile(lengths)
            _bytes_of(tokens, begins, ends, token_bytes).astype("<i8").tofile(sizes)
            for first in range(0, len(begins), NUMBERED_TOGETHER):
                some = slice(first, first + NUMBERED_TOGETHER)
                _numbers(tokens, begins[some], ends[some], mark).astype("<u8").tofile(numbers)
            counts.append(len(begins))
            base += place.count
    return {"documents": counts, "marks": marks}


def _chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(tokens), CHECKED_TOGETHER):
        yield first, tokens[first : first + CHECKED_TOGETHER]


def _marks(place: Place, tokens: np.ndarray, mark: int, vocab_size: int) -> np.ndarray:
    """Where the mark stands; refuses tokens that are no ids."""
    found = []
    for first, chunk in _chunks(tokens):
        if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
            at = int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise DataError(
                f"{place.path} holds the token {int(chunk[at]):,} at {first + at:,} (counted from 0), and the "
                f"tokenizer has the tokens 0 to {vocab_size - 1:,}. Give the tokenizer that the file was made with, or "
                f"tokenizer=ids tokenizer.vocab_size=N; or data.corpus.dtype is another than {np.dtype(place.dtype)}."
            )
        found.append(first + np.flatnonzero(chunk == mark))
    return np.concatenate(found)


def _documents(place: Place, tokens: np.ndarray, marks: np.ndarray, mark: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin and end in a file."""
    if place.format == "megatron":
        borders = np.unique(document_borders(place.path))
        ends_marked = np.isin(borders[1:] - 1, marks)
        borders[1:] -= ends_marked
        borders = np.unique(np.append(borders, place.count))
    else:
        borders = np.unique(np.concatenate([[0], marks, [place.count]]))
    begins, ends = borders[:-1], borders[1:]
    is_empty = (ends - begins == 1) & (tokens[begins] == mark)
    return begins[~is_empty], ends[~is_empty]


def _bytes_of(tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, token_bytes: np.ndarray) -> np.ndarray:
    """Bytes of the text of each document."""
    edges = np.concatenate([begins, ends])
    sums = np.zeros(len(edges), np.int64)
    order = np.argsort(edges, kind="stable")
    ordered = edges[order]
    total = 0
    for first, chunk in _chunks(tokens):
        running = np.concatenate([[0], np.cumsum(token_bytes[chunk], dtype=np.int64)])
        here = slice(*np.searchsorted(ordered, [first, first + len(chunk)]))
        sums[order[here]] = total + running[ordered[here] - first]
        total += int(running[-1])
    sums[edges == len(tokens)] = total
    return sums[len(begins) :] - sums[: len(begins)]


def _numbers(tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, mark: int) -> np.ndarray:
    """A number for each document, uint64, as good as drawn by chance; a mark at its front does not count."""
    begins = begins + (tokens[begins] == mark)
    places = begins[:, None] + np.arange(NUMBERED_TOKENS)
    within = places < ends[:, None]
    read = np.where(within, tokens[np.minimum(places, len(tokens) - 1)].astype(np.uint64) + np.uint64(1), np.uint64(0))
    factors = _mixed(np.arange(1, NUMBERED_TOKENS + 1, dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        return _mixed((read * factors).sum(1, dtype=np.uint64) + (ends - begins).astype(np.uint64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Share:
    """Which documents of an index a split has.

    Attributes:
        split: "train", "validation" or "test".
        fractions: of the documents that are held out for the others, by split.
    """

    split: str
    fractions: dict[str, float]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Bool [documents]. Chance may leave a split empty; it then has the document of the lowest number for training.

        Raises:
            DataError: none is left.
        """
        bounds = np.cumsum([self.fractions.get(split, 0.0) for split in ("test", "validation")]) * 2.0**64
        splits = np.searchsorted(bounds, numbers.astype(np.float64), side="right")
        order = np.argsort(numbers, kind="stable")
        for number, split in ((0, "test"), (1, "validation")):
            trained = order[splits[order] == 2]
            if self.fractions.get(split) and not (splits == number).any() and len(trained) > 1:
                splits[trained[0]] = number
        chosen = splits == ("test", "validation", "train").index(self.split)
        if not chosen.any():
            raise DataError(
                f"none of the {counted(len(numbers), 'document')} is in the {self.split} split (fractions: "
                f"{self.fractions}). Give data.corpus.validation or data.corpus.test files of their own, or change "
                "data.corpus.validation_fraction."
            )
        return chosen

    def cut(self, length: int) -> tuple[int, int]:
        """What the split has of a single document: train, validation, test, one behind the other."""
        ends = {}
        end = float(length)
        for split in ("test", "validation", "train"):
            ends[split] = round(end)
            end -= length * self.fractions.get(split, 0.0)
        order = ("train", "validation", "test")
        place = order.index(self.split)
        return (ends[order[place - 1]] if place else 0), ends[self.split]


class ChosenTokens:
    """Some stretches of an array, one behind the other, as one array; read by slices or by arrays of positions.

    Args:
        base: the array.
        starts: where each stretch begins in it, ascending.
        lengths: of each.
    """

    def __init__(self, base: Any, starts: np.ndarray, lengths: np.ndarray) -> None:
        goes_on = np.concatenate([[False], starts[1:] == starts[:-1] + lengths[:-1]])
        ends = np.cumsum(lengths)
        self._base, self._starts = base, starts[~goes_on]
        self._ends = np.append(ends[np.flatnonzero(~goes_on)[1:] - 1], ends[-1])
        self._begins = np.concatenate([[0], self._ends[:-1]])
        self.dtype = base.dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, indices: Any) -> Any:
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            stretch = np.searchsorted(self._ends, indices, side="right")
            return self._base[indices - self._begins[stretch] + self._starts[stretch]]
        start, stop, step = indices.indices(len(self))
        if stop <= start:
            return np.empty(0, self.dtype)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for number in range(first, last + 1):
            shift = int(self._starts[number] - self._begins[number])
            low, high = max(start, int(self._begins[number])), min(stop, int(self._ends[number]))
            parts.append(self._base[low + shift : high + shift])
        return np.concatenate(parts)[::step]


@dataclass(frozen=True)
class PlacedTokens(TokenFile):
    """A split of token files of another program; see `TokenFile`. `opened` makes it.

    Attributes:
        places: of the tokens.
        share: which of the documents it has.
    """

    places: tuple[Place, ...] = field(default=())
    share: Share = field(default_factory=lambda: Share("train", {}))

    def opened(self, token_bytes: np.ndarray) -> "PlacedTokens":
        """The same with the counts of the split in its manifest.

        Raises:
            DataError: the split has no documents.
        """
        starts, lengths, sizes = self._chosen(token_bytes)
        bounds = np.cumsum([0, *(place.count for place in self.places)])
        files = np.searchsorted(bounds, starts, side="right") - 1
        shards = [int(lengths[files == number].sum()) for number in np.unique(files)]
        counts = {"documents": len(starts), "tokens": int(lengths.sum()), "bytes": int(sizes.sum())}
        return PlacedTokens(self.folder, {**self.manifest, **counts, "shards": shards}, None, self.places, self.share)

    def _chosen(self, token_bytes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, length and, if `token_bytes` are given, bytes of each document of the split."""
        starts, lengths, sizes = (self._read(name) for name in (STARTS, LENGTHS, BYTES))
        if not self.share.fractions:
            return starts, lengths, sizes
        if len(starts) == 1:
            begin, end = self.share.cut(int(lengths[0]))
            if begin == end:
                raise DataError(f"nothing of the one document is left for its {self.share.split} split.")
            starts, lengths = starts + begin, np.array([end - begin])
            if token_bytes is not None:
                tokens = self._files[int(starts[0]) : int(starts[0]) + end - begin]
                sizes = np.array([sum(int(token_bytes[chunk].sum()) for _, chunk in _chunks(tokens))])
            return starts, lengths, sizes
        chosen = self.share.of(np.asarray(self._read(NUMBERS, "<u8")))
        return starts[chosen], lengths[chosen], sizes[chosen]

    def _read(self, name: str, dtype: str = "<i8") -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    @functools.cached_property
    def _files(self) -> ShardedTokens:
        counts = [place.count for place in self.places]
        return ShardedTokens(counts, self.dtype, lambda number: self.places[number].map())

    @functools.cached_property
    def _tokens(self) -> Any:
        starts, lengths, _ = self._chosen()
        return ChosenTokens(self._files, np.asarray(starts), np.asarray(lengths))

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._chosen()[1])]).astype(np.int64)

    def check_ids(self, number: int) -> None:
        """Nothing: all ids were checked when the index was made."""

    def check_sizes(self) -> None:
        """Nothing: a file is compared with its size whenever it is mapped."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "places": self.places, "share": self.share}
