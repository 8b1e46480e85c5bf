"""Context parallelism: the rows of a batch cut into slices of equal length, one for each process of a group.

A slice goes on from what earlier slices leave, as generation goes on from a prompt. So to a model `Slices` are a state,
the one before this process's slice, which a mixer asks for what it needs of earlier tokens:

    keys and values    the rows of all earlier slices, or the last few of them, come from the processes that have them
    recurrence         each process says what its slice does to a state, S -> M S + R, and each folds what is before it
    token shift        the last few inputs before the slice

Everything is exact, and gradients go the same way back. Each process has the documents of the whole rows, which say
what goes on across a border; nothing of that is exchanged.

    slices = Slices(seq_len, document_ids, group)
    output = model(slices.own(tokens), slices.own(targets), state=model.slice_state(slices), document_ids=slices.ids)

A parameter's gradient is the sum over the processes, for a loss that is: divide token losses by the number of targets
in the whole rows, and auxiliary losses, which are means over a slice, by the number of slices.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longmix.distributed.exchange import exchanged, mean_over, rows_before
from longmix.errors import ConfigError

BALANCED_FROM = 8192
"""By then what balance saves of exact attention, 2 T^2 (W - 1) D operations for each head of size D, outweighs moving
about 4 T (W - 1) D more numbers: at 400 TFLOP/s and 300 GB/s from T = 5,000 on. Packed documents save less."""


class Slices:
    """The slice of each row that this process has; a mixer that gets it as its state returns none.

    Args:
        seq_len: tokens of a whole row.
        document_ids: int32 [B, seq_len], non-decreasing along the row; None means every row is one document.
        group: the processes, slices in order of rank; None for all there are.
        balanced: whether exact attention shares its work equally (`longmix.distributed.balance`), which takes slices
            of an even length; None where that pays, in slices of `BALANCED_FROM` tokens without documents.

    Raises:
        ConfigError: the rows cannot be cut into slices of equal length.

    Attributes:
        rank, size: which slice is this process's, and how many there are.
        length: tokens of a slice.
        ids: int32 [B, length], documents of this slice, or None.
        last_id: int32 [B], the document of the token before this slice, -1 before the first; None without documents.
        next_position: int64 [B], or [1] without documents: the position of the first token if its document goes on.
        filled: bool [B, size], whether a slice has only the document that the one before it ended with; None if all do.
        carried: a layer's state before the rows, of all their channels, alike in all processes; None where rows begin
            anew. See `carrying`.
    """

    def __init__(
        self,
        seq_len: int,
        document_ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        balanced: bool | None = None,
    ) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        check_slices(seq_len, self.size)
        self.length = seq_len // self.size
        wanted = self.length >= BALANCED_FROM and document_ids is None if balanced is None else balanced
        self.balanced = wanted and self.length % 2 == 0
        self.whole_ids = None if document_ids is None else document_ids.int()
        self.ids: Tensor | None = None
        self.last_id: Tensor | None = None
        self.filled: Tensor | None = None
        self.carried: Any = None
        self.next_position = torch.tensor([self.start])
        if self.whole_ids is not None:
            self.ids, self.last_id = self.own(self.whole_ids), self.ids_before(1)[:, 0]
            self.next_position = (self.whole_ids[:, : self.start] == self.last_id[:, None]).sum(1)
            last = self.whole_ids[:, self.length - 1 :: self.length]
            self.filled = F.pad(last[:, 1:] == last[:, :-1], (1, 0), value=True)

    def carrying(self, state: Any) -> "Slices":
        """The same slices of rows that go on from a layer's state, as if it were that of a slice before the first.

        Args:
            state: with `last_id` and `next_position`; the ids of these rows go on from its.
        """
        assert self.whole_ids is not None and self.last_id is not None and self.filled is not None
        found = copy.copy(self)
        number = torch.full_like(self.last_id, -1) if state.last_id is None else state.last_id
        first = self.rank == 0
        found.carried = state
        found.last_id = number if first else self.last_id
        found.next_position = self.next_position + torch.where(found.last_id == number, state.next_position, 0)
        begun = self.whole_ids[:, self.length - 1] == number
        found.filled = torch.cat([begun[:, None], self.filled[:, 1:]], 1)
        return found

    def goes_on(self) -> Tensor:
        """bool [B]: whether the rows' first token is of the document that `carried` ended with."""
        assert self.whole_ids is not None and self.carried is not None
        if self.carried.last_id is None:
            return torch.zeros_like(self.whole_ids[:, 0], dtype=torch.bool)
        return self.whole_ids[:, 0] == self.carried.last_id

    def own(self, x: Tensor) -> Tensor:
        """This process's slice of `x` [B, seq_len, ...]."""
        return x[:, self.start : self.start + self.length]

    def placed(self, x: Tensor, elsewhere: float) -> Tensor:
        """Whole rows [B, seq_len] with `x` [B, length] in its place and a fill value elsewhere."""
        after = self.length * (self.size - self.rank - 1)
        return F.pad(x, (self.start, after), value=elsewhere)

    @property
    def start(self) -> int:
        """The position in the row of this slice's first token."""
        return self.rank * self.length

    def ids_before(self, count: int) -> Tensor:
        """int32 [B, count], the documents of the last `count` tokens before this slice, -1 before the first."""
        assert self.whole_ids is not None
        return F.pad(self.whole_ids, (count, 0), value=-1)[:, self.start : self.start + count]

    def ids_from(self, limit: int | None) -> Tensor | None:
        """Documents of the rows that `before` gives and of this slice; None without documents."""
        if self.whole_ids is None:
            return None
        first = 0 if limit is None else max(0, self.start - limit)
        return self.whole_ids[:, first : self.start + self.length]

    def before(self, x: Tensor, limit: int | None = None) -> Tensor:
        """Rows of earlier slices of `x` [B, T, ...], T the same in all: the last `limit`, or all; see `rows_before`."""
        return rows_before(x, limit, self.group)

    def whole(self, x: Tensor) -> Tensor:
        """The whole rows [B, seq_len, ...] of which `x` [B, T, ...] is this process's slice."""
        return exchanged(x, [(0, self.length)] * self.size, [self.length] * self.size, self.group)

    def just_before(self, x: Tensor, count: int) -> Tensor:
        """[B, count, C], the last `count` rows before those of `x` [B, T, C]; zero before the first."""
        rows = self.before(x, count)
        return F.pad(rows, (0, 0, count - rows.shape[1], 0))

    def each_before(self, x: Tensor) -> Tensor:
        """The `x` [B, ...] of each earlier slice: [B, rank, ...]."""
        return self.before(x.unsqueeze(1))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all slices, where an auxiliary loss is no mean over tokens itself; see `mean_over`."""
        return mean_over(x, self.group)


def check_slices(seq_len: int, size: int) -> None:
    """Refuse rows that cannot be cut into `size` slices of equal length.

    Raises:
        ConfigError: naming the length.
    """
    if seq_len % size or seq_len < size:
        raise ConfigError(
            f"seq_len={seq_len} does not divide into slices for {size} processes; use a multiple of {size}, as "
            f"seq_len={-(-seq_len // size) * size}, or fewer processes to a row."
        )
