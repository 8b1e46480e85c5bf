"""Documents as an epoch reads them, and the windows that hold some of them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.tokens.token_files import TokenFile


class Window(NamedTuple):
    """One row of a batch.

    Attributes:
        tokens: inputs, int64 [T].
        targets: the token that follows each input, or `IGNORE_INDEX`, int64 [T].
        document_ids: which document each input belongs to, counted from 0 in this window, int32 [T]; None where
            windows are never packed with several documents, or documents are not to be told apart.
        positions_before: the tokens that each input's document has before those of this window, int32 [T]; None for 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None
    positions_before: np.ndarray | None = None


@dataclass(frozen=True)
class Documents:
    """Documents of a token file: maybe parts of them, or some several times.

    Attributes:
        starts: in the token file, int64 [n].
        lengths: int64 [n], at least 1.
    """

    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, token_file: TokenFile) -> "Documents":
        """All documents of a token file, each once and whole."""
        return cls(token_file.offsets[:-1], np.diff(token_file.offsets))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all."""
        return int(self.lengths.sum())

    def taken(self, order: np.ndarray | slice) -> "Documents":
        """Those of numbers `order`, in that order."""
        return Documents(self.starts[order], self.lengths[order])

    def cut(self, most: int) -> "Documents":
        """Each in parts of `most` tokens and the rest, which are documents of their own."""
        if not len(self) or self.lengths.max() <= most:
            return self
        parts = -(-self.lengths // most)
        skipped = most * (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts))
        whole = self.taken(np.repeat(np.arange(len(self)), parts))
        return Documents(whole.starts + skipped, np.minimum(whole.lengths - skipped, most))

    def window(self, token_file: TokenFile, seq_len: int) -> Window:
        """A window of these, one after the other, padded with separators that are a document of their own.

        The target of an input is the token that follows in the file, or a separator where its document ends there: also
        where only the beginning of a document is in the window. Padding has no target.
        """
        bounds = np.cumsum(self.lengths)
        count = int(bounds[-1])
        positions = np.arange(count) + np.repeat(self.starts - (bounds - self.lengths), self.lengths)
        inputs = token_file.tokens[positions].astype(np.int64)
        targets = np.full(seq_len, IGNORE_INDEX, np.int64)
        targets[: count - 1] = inputs[1:]
        targets[bounds - 1] = _tokens_behind(token_file, self.starts + self.lengths)
        ids = np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)
        padding = seq_len - count
        inputs = np.pad(inputs, (0, padding), constant_values=token_file.separator_id)
        ids = np.pad(ids, (0, padding), constant_values=len(self))
        whole = token_file.offsets[np.searchsorted(token_file.offsets, self.starts, side="right") - 1]
        before = np.repeat((self.starts - whole).astype(np.int32), self.lengths)
        return Window(inputs, targets, ids, np.pad(before, (0, padding)))


@dataclass(frozen=True)
class Held:
    """What the windows of an epoch have of its documents.

    Attributes:
        tokens: that are in a window; the rest is dropped.
        cut: the documents that some window has a part of, without the rest.
    """

    tokens: int
    cut: Documents


def _tokens_behind(token_file: TokenFile, ends: np.ndarray) -> np.ndarray:
    """The tokens at `ends` that are of the same document as those before; separators where that is over."""
    offsets = token_file.offsets
    within = offsets[np.searchsorted(offsets, ends)] != ends
    found = np.full(len(ends), token_file.separator_id, np.int64)
    if within.any():
        found[within] = token_file.tokens[ends[within]]
    return found
