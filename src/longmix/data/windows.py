"""Windows: fixed-length pieces of the packed stream of documents, as a pure function of a seed and an index.

Nothing here keeps a position. The same (seed, epoch, index) gives the same window on every machine and in every
process, so a run resumes from a step counter alone and the number of loader workers changes nothing.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.documents import Documents, Held, Window
from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError

SHARDS_TOGETHER = 16
"""Shards whose documents are mixed: 4 GiB of the usual size, 2 billion tokens of uint16."""

SHARD_STREAM = 1 << 41
"""The random stream that orders shards; epochs use the streams from 0, mixtures those from 2**40."""


class OrderedWindows(Protocol):
    """Training windows in an order without end, each a pure function of its running index."""

    @property
    def windows_per_epoch(self) -> int:
        """Windows of one epoch."""
        ...

    def sample(self, global_index: int, /) -> Window:
        """The window at a running index that goes through the epochs one after the other."""


class TextWindows(OrderedWindows, Protocol):
    """Training windows that are cut from documents."""

    def held(self) -> Held:
        """What the windows of the first epoch have of its documents."""
        ...


class FiniteWindows(Protocol):
    """The windows of an evaluation, numbered from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Window: ...


class PackedStream:
    """Documents of a token file, one after the other in a given order, cut into windows of `seq_len`.

    Window w has the tokens [w * seq_len, (w + 1) * seq_len) of the stream as inputs and their successors as targets.
    A last window that the stream does not fill is padded with separators, which form a document of their own and have
    no target. So each token of the stream is an input exactly once, and each but the first is a target exactly once:
    the very last input has none.

    Args:
        token_file: what the tokens are read from.
        documents: in the order of the stream.
        seq_len: tokens per window.
        begins: where in the stream each window begins instead, ascending.
    """

    def __init__(
        self, token_file: TokenFile, documents: Documents, seq_len: int, begins: np.ndarray | range | None = None
    ) -> None:
        self._token_file, self._documents, self._seq_len, self._begins = token_file, documents, seq_len, begins
        self._ends = np.cumsum(documents.lengths)

    def window(self, index: int) -> Window:
        """Window `index` of `num_windows`."""
        start = self._begin(index)
        total = int(self._ends[-1])
        stop = min(start + self._seq_len, total)
        window = self._between(start, stop).window(self._token_file, self._seq_len)
        if stop == total:
            window.targets[stop - start - 1] = IGNORE_INDEX
        return window

    def held(self) -> Held:
        """What the windows have of the documents."""
        total = int(self._ends[-1])
        begins = np.arange(0, total, self._seq_len) if self._begins is None else np.asarray(self._begins)
        ends = np.minimum(begins + self._seq_len, total)
        document_begins = self._ends - self._documents.lengths
        first = np.searchsorted(begins, document_begins, side="right") - 1
        last = np.searchsorted(begins, self._ends - 1, side="right") - 1
        is_whole = (first == last) & (self._ends <= ends[last])
        is_dropped = (first == last) & (document_begins >= ends[first])
        return Held(int((ends - begins).sum()), self._documents.taken(~is_whole & ~is_dropped))

    def is_inside_a_document(self, index: int) -> bool:
        """Whether window `index` begins after the first token of a document."""
        begin = self._begin(index)
        document = np.searchsorted(self._ends, begin - 1, side="right")
        return bool(self._ends[document] > begin)

    def _begin(self, index: int) -> int:
        return index * self._seq_len if self._begins is None else int(self._begins[index])

    def _between(self, start: int, stop: int) -> Documents:
        """What documents have of the tokens [start, stop) of the stream."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        here = slice(int(first), int(last) + 1)
        ends = self._ends[here]
        begins = ends - self._documents.lengths[here]
        skipped = np.maximum(start - begins, 0)
        return Documents(self._documents.starts[here] + skipped, np.minimum(ends, stop) - begins - skipped)


@dataclass
class _Epoch:
    number: int
    stream: PackedStream
    order: np.ndarray


class TrainWindows:
    """Shuffled training windows.

    Every epoch the documents are put in a new random order, joined into one stream and cut into windows (see
    `PackedStream`), and the windows are visited in a random order. Over an epoch nothing is dropped: every token of
    the split is an input exactly once and, but for the first token of the epoch's stream, a target exactly once.

    A token file of more than `SHARDS_TOGETHER` shards is shuffled in groups of so many: the shards are drawn into
    groups at random, the groups come one after the other, and only within a group are documents and windows mixed. So
    few shards are in use at a time, wherever they lie; for one group this is the same as above.

    Args:
        token_file: the split to train on.
        seq_len: tokens per window, at least 1.
        seed: together with epoch and index it fixes every window; 0 <= seed < 2**63.
        documents: that an epoch reads; those of the token file when not given.

    Raises:
        ConfigError: `seq_len` or `seed` is impossible.
    """

    def __init__(self, token_file: TokenFile, seq_len: int, seed: int, documents: Documents | None = None) -> None:
        check_order(seq_len, seed)
        self._documents = Documents.of(token_file) if documents is None else documents
        self._token_file, self._seq_len, self._seed = token_file, seq_len, seed
        self._epoch: _Epoch | None = None
        self.windows_per_epoch = self._count()

    def _count(self) -> int:
        return -(-self._documents.num_tokens // self._seq_len)

    def window(self, epoch: int, index: int) -> Window:
        """The window of number `index` (0 <= index < windows_per_epoch) of an epoch."""
        shuffled = self._shuffled(epoch)
        return shuffled.stream.window(int(shuffled.order[index]))

    def held(self) -> Held:
        """What the windows of the first epoch have of its documents."""
        return self._shuffled(0).stream.held()

    def sample(self, global_index: int) -> Window:
        """The window at a running index that goes through the epochs one after the other."""
        return self.window(*divmod(global_index, self.windows_per_epoch))

    def ordered(self, epoch: int) -> tuple[Documents, np.ndarray]:
        """The documents in the order of an epoch, and how many each group of shards has."""
        groups = shard_groups(self._token_file, self._documents.starts, self._seed, epoch)
        order = permutation(len(self._documents), self._seed, 2 * epoch)
        if len(groups) > 1:
            order = within(order, np.concatenate(groups), [len(group) for group in groups])
        return self._documents.taken(order), np.array([len(group) for group in groups])

    def begins(self, documents: Documents) -> np.ndarray:
        """Where windows begin in the stream of ordered documents."""
        return np.arange(0, documents.num_tokens, self._seq_len)

    def _shuffled(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self._shuffle(epoch)
        return self._epoch

    def _shuffle(self, epoch: int) -> _Epoch:
        documents, sizes = self.ordered(epoch)
        begins = self.begins(documents)
        windows = permutation(len(begins), self._seed, 2 * epoch + 1)
        if len(sizes) > 1:
            tokens = np.cumsum(documents.lengths)[np.cumsum(sizes) - 1]
            ends = np.searchsorted(begins + self._seq_len, tokens, side="right")
            ends[-1] = len(begins)
            windows = within(windows, np.arange(len(begins)), np.diff(ends, prepend=0).tolist())
        return _Epoch(epoch, PackedStream(self._token_file, documents, self._seq_len, begins), windows)


def shard_groups(token_file: TokenFile, starts: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """Numbers of the documents that begin at `starts`, for each group of shards of an epoch."""
    bounds = np.searchsorted(starts, np.cumsum([0, *token_file.shards]))
    shards = [np.arange(start, stop) for start, stop in pairwise(bounds.tolist())]
    return [np.concatenate([shards[s] for s in group]) for group in grouped(len(shards), seed, epoch)]


def grouped(shards: int, seed: int, epoch: int) -> list[list[int]]:
    """The shards of each group of an epoch."""
    if shards <= SHARDS_TOGETHER:
        return [list(range(shards))]
    order = permutation(shards, seed, SHARD_STREAM + epoch).tolist()
    return [order[start : start + SHARDS_TOGETHER] for start in range(0, len(order), SHARDS_TOGETHER)]


def order_key(token_file: TokenFile) -> str:
    """What fixes the windows of a token file, besides seed and length: its content, and its shards if they matter."""
    key = token_file.manifest["key"]
    return key if len(token_file.shards) <= SHARDS_TOGETHER else f"{key} in shards of {token_file.shards}"


class ContiguousWindows:
    """Training windows in which each row of the batch reads on in a long stretch of the corpus of its own.

    Every epoch the documents are put in a new random order and joined into one stream, which is cut into windows (see
    `PackedStream`). Each row has a stretch of consecutive windows, and row r of step s + 1 goes on where row r of step
    s ended. Stretches differ by at most one window: in an epoch's last step, a row whose stretch has ended has padding
    without targets. So, as in `TrainWindows`, an epoch has every token as an input once.

    Args:
        token_file: the split to train on.
        seq_len: tokens per window, at least 1.
        seed: together with step and row it fixes every window; 0 <= seed < 2**63.
        rows: of a batch; step s has the running indices from s * rows on.
        documents: that an epoch reads; those of the token file when not given.
        document_mask: whether documents are told apart; without, a row goes on over their borders.

    Attributes:
        steps_per_epoch: windows of the longest stretch.
        windows_per_epoch: of all rows, padding included.

    Raises:
        ConfigError: a number is impossible, or there are fewer windows than rows.
    """

    def __init__(
        self,
        token_file: TokenFile,
        seq_len: int,
        seed: int,
        rows: int,
        documents: Documents | None = None,
        document_mask: bool = True,
    ) -> None:
        check_order(seq_len, seed)
        self._documents = Documents.of(token_file) if documents is None else documents
        windows = -(-self._documents.num_tokens // seq_len)
        if windows < rows:
            raise ConfigError(
                f"data.order=contiguous gives each of batch_size={rows} rows a stretch of its own, and there are only "
                f"{windows} windows of seq_len={seq_len}; take a smaller batch_size or seq_len, or more text."
            )
        self.steps_per_epoch = -(-windows // rows)
        self.windows_per_epoch = self.steps_per_epoch * rows
        self._bounds = [row * windows // rows for row in range(rows + 1)]
        self._token_file, self._seq_len, self._seed, self._mask = token_file, seq_len, seed, document_mask
        self._stream: tuple[int, PackedStream] | None = None

    def sample(self, global_index: int) -> Window:
        """The window at a running index, which counts the rows of a step, then the steps."""
        epoch, index = self._place(global_index)
        if index is None:
            window = _padding(self._seq_len, self._token_file.separator_id)
        else:
            window = self._stream_of(epoch).window(index)
        return window if self._mask else window._replace(document_ids=None)

    def held(self) -> Held:
        """What the windows of the first epoch have of its documents."""
        return self._stream_of(0).held()

    def continues(self, global_index: int) -> bool:
        """Whether the window's first document is the one that its row's window of the step before ended with."""
        epoch, index = self._place(global_index)
        if index is None or index in self._bounds:
            return False
        return not self._mask or self._stream_of(epoch).is_inside_a_document(index)

    def _place(self, global_index: int) -> tuple[int, int | None]:
        """The epoch, and the number of the window in its stream; None where the row's stretch has ended."""
        step, row = divmod(global_index, len(self._bounds) - 1)
        epoch, within = divmod(step, self.steps_per_epoch)
        index = self._bounds[row] + within
        return epoch, index if index < self._bounds[row + 1] else None

    def _stream_of(self, epoch: int) -> PackedStream:
        if self._stream is None or self._stream[0] != epoch:
            documents = self._documents.taken(permutation(len(self._documents), self._seed, 2 * epoch))
            self._stream = epoch, PackedStream(self._token_file, documents, self._seq_len)
        return self._stream[1]


class EvaluationWindows:
    """The windows of a split in the order of its documents; see `PackedStream`.

    A window begins `stride` tokens after the one before. It has targets only where that one ends and behind, so every
    token is a target once, and all but those of the first window have at least `seq_len - stride` tokens before them
    in their window. These are the windows of Hugging Face's recipe for the perplexity of models of fixed length.

    Args:
        token_file: the split to evaluate.
        seq_len: tokens per window, at least 1.
        max_tokens: if given and the split is longer, only `max_tokens // stride` windows (at least one), spread
            evenly over the split, are taken; always the same ones.
        stride: tokens from one window's begin to the next one's; None takes `seq_len`, so that windows do not overlap.

    Attributes:
        covered_tokens: tokens whose successor is a target in these windows, or would be if there were one.
        total_tokens: tokens of the split.

    Raises:
        ConfigError: `seq_len`, `max_tokens` or `stride` is impossible.
    """

    def __init__(
        self, token_file: TokenFile, seq_len: int, max_tokens: int | None = None, stride: int | None = None
    ) -> None:
        check_seq_len(seq_len)
        stride = seq_len if stride is None else stride
        check_stride(stride, seq_len)
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, or null for all of the split, got {max_tokens}")
        self.total_tokens = token_file.num_tokens
        total = 1 + max(0, -(-(self.total_tokens - seq_len) // stride))
        wanted = total if max_tokens is None else min(total, max(1, max_tokens // stride))
        self._indices = range(total) if wanted == total else [number * total // wanted for number in range(wanted)]
        begins = range(0, total * stride, stride)
        self._stream = PackedStream(token_file, Documents.of(token_file), seq_len, begins)
        self._context = seq_len - stride
        self.covered_tokens = sum(
            min(seq_len, self.total_tokens - index * stride) - self._seen(index) for index in self._indices
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> Window:
        window = self._stream.window(self._indices[number])
        window.targets[: self._seen(self._indices[number])] = IGNORE_INDEX
        return window

    def _seen(self, index: int) -> int:
        """How many targets at the front of a window are targets of the one before."""
        return self._context if index else 0


def check_seq_len(seq_len: int) -> None:
    """Refuse a window length that is not positive.

    Raises:
        ConfigError: names the key.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len must be at least 1, got {seq_len}")


def check_stride(stride: int, seq_len: int, key: str = "stride") -> None:
    """Refuse a stride at which windows would leave tokens out.

    Raises:
        ConfigError: names the key.
    """
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"{key}={stride} must be from 1 to seq_len={seq_len}, so that no token is left out.")


def check_order(seq_len: int, seed: int) -> None:
    """Refuse a window length or seed that is impossible.

    Raises:
        ConfigError: names the key.
    """
    check_seq_len(seq_len)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be between 0 and 2**63 - 1, got {seed}")


def _padding(seq_len: int, separator_id: int) -> Window:
    """A window of separators without targets."""
    ids = np.zeros(seq_len, np.int32)
    return Window(np.full(seq_len, separator_id, np.int64), np.full(seq_len, IGNORE_INDEX, np.int64), ids)


def within(order: np.ndarray, items: np.ndarray, sizes: list[int]) -> np.ndarray:
    """`items` in runs of `sizes`; within each run they follow `order`."""
    turn = np.empty_like(order)
    turn[order] = np.arange(len(order))
    runs = np.split(items, np.cumsum(sizes)[:-1])
    return np.concatenate([run[np.argsort(turn[run], kind="stable")] for run in runs])


def permutation(size: int, seed: int, stream: int) -> np.ndarray:
    """A random order of 0..size-1, int64 [size], fixed by (seed, stream).

    Sorts raw Philox output, because NumPy promises that those bits stay the same in later versions but not that
    `Generator.permutation` does.
    """
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")
