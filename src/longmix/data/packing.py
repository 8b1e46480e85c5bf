"""Packing: how documents are put into training windows. See docs/data.md.

The windows of every packing are pure functions of (seed, epoch, index), as those of `longmix.data.windows` are.
"""

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longmix.data.best_fit import best_fit
from longmix.data.documents import Documents, Held, Window
from longmix.data.tokens.token_files import TokenFile
from longmix.data.windows import (
    SHARDS_TOGETHER,
    ContiguousWindows,
    OrderedWindows,
    TextWindows,
    TrainWindows,
    check_order,
    grouped,
    permutation,
    within,
)
from longmix.errors import ConfigError

PACKINGS = ("stream", "best_fit", "aligned")

MOST_VISITS = 1000

PLACE_STREAM = 1 << 42
"""The random stream that orders documents within windows; `SHARD_STREAM` of `longmix.data.windows` tells of others."""


class AlignedWindows(TrainWindows):
    """Shuffled training windows that begin where a document begins.

    The stream is that of `TrainWindows`. A window begins at the first document that begins where the window before has
    ended, or later. So the rest of a document that does not fit into its window is dropped, of other documents in each
    epoch.

    Args:
        token_file, seq_len, seed, documents: see `TrainWindows`.

    Attributes:
        windows_per_epoch: of the first epoch; others may have a few more or less.
    """

    _epoch_ends: list[int]
    """Windows of the first epoch, of the first two, and so on, as far as they have been needed."""

    def sample(self, global_index: int) -> Window:
        """The window at a running index that goes through the epochs one after the other."""
        while self._epoch_ends[-1] <= global_index:
            self._epoch_ends.append(self._epoch_ends[-1] + self._windows_of(len(self._epoch_ends)))
        epoch = bisect_right(self._epoch_ends, global_index)
        return self.window(epoch, global_index - (self._epoch_ends[epoch - 1] if epoch else 0))

    def begins(self, documents: Documents) -> np.ndarray:
        """Where windows begin in the stream of ordered documents."""
        ends = np.cumsum(documents.lengths)
        starts = ends - documents.lengths
        following = np.searchsorted(starts, starts + self._seq_len).tolist()
        chosen, document = [], 0
        while document < len(following):
            chosen.append(document)
            document = following[document]
        return starts[chosen]

    def _count(self) -> int:
        self._epoch_ends = [self._windows_of(0)]
        return self._epoch_ends[0]

    def _windows_of(self, epoch: int) -> int:
        return len(self.begins(self.ordered(epoch)[0]))


class BestFitWindows:
    """Shuffled training windows in which no document is cut that fits into one.

    A longer document is cut into windows of its own, and the rest is placed like a document. Documents are placed by
    length, the longest first, each into the window with the least space that is enough (see `best_fit`). What stays
    empty is padding, a document of its own without targets.

    How long the documents of a window are is the same in every epoch. Which documents of those lengths these are, their
    order in the window and the order of the windows are random. A token file of more than `SHARDS_TOGETHER` shards is
    packed shard by shard, and shards are drawn into groups as in `TrainWindows`.

    Args:
        token_file, seq_len, seed, documents: see `TrainWindows`.

    Attributes:
        windows_per_epoch: the number of windows.

    Raises:
        ConfigError: `seq_len` or `seed` is impossible.
    """

    def __init__(self, token_file: TokenFile, seq_len: int, seed: int, documents: Documents | None = None) -> None:
        check_order(seq_len, seed)
        whole = Documents.of(token_file) if documents is None else documents
        self._documents = whole.cut(seq_len)
        self._cut = whole.taken(whole.lengths > seq_len)
        self._token_file, self._seq_len, self._seed = token_file, seq_len, seed
        many = len(token_file.shards) > SHARDS_TOGETHER
        ends = np.cumsum(token_file.shards) if many else [token_file.num_tokens]
        # the unit, of those that are packed alone, of each document
        self._unit = np.searchsorted(ends, self._documents.starts, side="right")
        by_length = np.lexsort((-self._documents.lengths, self._unit))
        bounds = np.searchsorted(self._unit, np.arange(len(ends) + 1))
        parts, self._unit_ends, opened = [], [], 0
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = best_fit(self._documents.lengths[by_length[start:stop]], seq_len) + opened
            opened = int(part.max()) + 1 if len(part) else opened
            parts.append(part)
            self._unit_ends.append(opened)
        self._window_of_place = np.concatenate(parts)
        self._ends = np.cumsum(np.bincount(self._window_of_place, minlength=opened))
        self.windows_per_epoch = opened
        self._epoch: tuple[int, Documents, np.ndarray] | None = None

    def window(self, epoch: int, index: int) -> Window:
        """The window of number `index` (0 <= index < windows_per_epoch) of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._placed(epoch), self._order(epoch)
        _, documents, order = self._epoch
        number = int(order[index])
        start, stop = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        return documents.taken(slice(start, stop)).window(self._token_file, self._seq_len)

    def sample(self, global_index: int) -> Window:
        """The window at a running index that goes through the epochs one after the other."""
        return self.window(*divmod(global_index, self.windows_per_epoch))

    def held(self) -> Held:
        """What the windows of the first epoch have of its documents."""
        return Held(self._documents.num_tokens, self._cut)

    def _placed(self, epoch: int) -> Documents:
        """The documents in the order in which windows, by their numbers, hold them."""
        turn = permutation(len(self._documents), self._seed, 2 * epoch)
        in_places = np.lexsort((turn, -self._documents.lengths, self._unit))
        within_windows = permutation(len(self._documents), self._seed, PLACE_STREAM + epoch)
        return self._documents.taken(in_places[np.lexsort((within_windows, self._window_of_place))])

    def _order(self, epoch: int) -> np.ndarray:
        order = permutation(self.windows_per_epoch, self._seed, 2 * epoch + 1)
        groups = grouped(len(self._unit_ends), self._seed, epoch)
        if len(groups) == 1:
            return order
        units = np.split(np.arange(self.windows_per_epoch), self._unit_ends[:-1])
        together = [np.concatenate([units[unit] for unit in group]) for group in groups]
        return within(order, np.concatenate(together), [len(group) for group in together])


class UndividedWindows:
    """Windows whose documents are not told apart."""

    def __init__(self, windows: OrderedWindows) -> None:
        self._windows = windows
        self.windows_per_epoch = windows.windows_per_epoch

    def sample(self, global_index: int) -> Window:
        """The window at a running index that goes through the epochs one after the other."""
        return self._windows.sample(global_index)._replace(document_ids=None)


@dataclass(frozen=True)
class Shares:
    """What a packing costs in the first epoch.

    Attributes:
        windows: of the epoch.
        padding: share of the windows' tokens.
        cut_documents: share of the documents that some window has a part of, without the rest, or that are divided.
        dropped_tokens: share of the documents' tokens that are in no window.
    """

    windows: int
    padding: float
    cut_documents: float
    dropped_tokens: float

    def __str__(self) -> str:
        return (
            f"{self.padding:.2%} of the windows is padding, {self.cut_documents:.2%} of the documents are cut, "
            f"{self.dropped_tokens:.2%} of the tokens are dropped"
        )


@dataclass(frozen=True)
class Packing:
    """How documents are put into training windows.

    Attributes:
        packing: "stream", see `TrainWindows`; "best_fit", see `BestFitWindows`; "aligned", see `AlignedWindows`.
        max_document_tokens: longer documents are cut into several of at most that many tokens, separators included.
        long_documents: documents of at least so many tokens are visited several times an epoch.
        long_document_visits: how many times.
        document_mask: whether attention and states end where a document ends.
        positions_go_on: whether the positions of a document that is cut go on in its next part.

    Raises:
        ConfigError: a setting is impossible; names it.
    """

    packing: str = "stream"
    max_document_tokens: int | None = None
    long_documents: int | None = None
    long_document_visits: int = 2
    document_mask: bool = True
    positions_go_on: bool = False

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ConfigError(f"data.packing={self.packing} is unknown; use {', '.join(PACKINGS[:-1])} or aligned.")
        for name in ("max_document_tokens", "long_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value} must be at least 1, or null.")
        if not 1 <= self.long_document_visits <= MOST_VISITS:
            raise ConfigError(f"data.long_document_visits={self.long_document_visits} must be from 1 to {MOST_VISITS}.")
        if self.long_documents is None and self.long_document_visits != type(self).long_document_visits:
            raise ConfigError(
                f"data.long_document_visits={self.long_document_visits} needs data.long_documents, which "
                "says from how many tokens on a document is long."
            )

        if self.positions_go_on and not self.document_mask:
            raise ConfigError(
                "data.positions_go_on=true counts positions in each document, and data.document_mask=false in each "
                "window; leave one of them out."
            )
        if self.positions_go_on and self.packing == "aligned" and self.max_document_tokens is None:
            raise ConfigError(
                "data.positions_go_on=true changes nothing with data.packing=aligned, which drops what it cuts off; "
                "leave it out, or give data.max_document_tokens."
            )

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their defaults, JSON-able."""
        defaults = asdict(Packing())
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    def documents(self, token_file: TokenFile) -> Documents:
        """The documents that an epoch reads."""
        found = Documents.of(token_file)
        if self.long_documents is not None:
            visits = np.where(found.lengths >= self.long_documents, self.long_document_visits, 1)
            found = found.taken(np.repeat(np.arange(len(found)), visits))
        return found if self.max_document_tokens is None else found.cut(self.max_document_tokens)

    def shares(self, windows: TextWindows, token_file: TokenFile, seq_len: int) -> Shares:
        """What the packing costs in windows of a token file."""
        held, offsets = windows.held(), token_file.offsets
        cut = held.cut.starts
        if self.max_document_tokens is not None:
            cut = np.concatenate([cut, offsets[:-1][np.diff(offsets) > self.max_document_tokens]])
        return Shares(
            windows.windows_per_epoch,
            padding=1 - held.tokens / (windows.windows_per_epoch * seq_len),
            cut_documents=len(np.unique(np.searchsorted(offsets, cut, side="right"))) / token_file.num_documents,
            dropped_tokens=1 - held.tokens / self.documents(token_file).num_tokens,
        )

    def windows(self, token_file: TokenFile, seq_len: int, seed: int) -> TextWindows:
        """Shuffled training windows, with ids of documents."""
        kinds: dict[str, type[TrainWindows] | type[BestFitWindows]] = {
            "stream": TrainWindows,
            "best_fit": BestFitWindows,
            "aligned": AlignedWindows,
        }
        return kinds[self.packing](token_file, seq_len, seed, self.documents(token_file))

    def contiguous(self, token_file: TokenFile, seq_len: int, seed: int, rows: int) -> ContiguousWindows:
        """Training windows in which each row of the batch reads on.

        Raises:
            ConfigError: rows cannot read on in windows that hold whole documents.
        """
        self.check_reads_on()
        documents = self.documents(token_file)
        return ContiguousWindows(token_file, seq_len, seed, rows, documents, self.document_mask)

    def check_reads_on(self) -> None:
        """Refuse `data.order=contiguous` with windows that do not go on one in the other.

        Raises:
            ConfigError: names the words.
        """
        if self.packing != "stream":
            raise ConfigError(
                f"data.packing={self.packing} fills windows with documents of their own, and data.order=contiguous has "
                "rows read on from window to window; set data.packing=stream, or data.order=shuffled."
            )
