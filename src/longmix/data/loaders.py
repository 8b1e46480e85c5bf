"""Batches: the rows that one process takes of each optimizer step, and of an evaluation."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from longmix.batch import IGNORE_INDEX, Batch
from longmix.data.documents import Window
from longmix.data.windows import ContiguousWindows, FiniteWindows, OrderedWindows
from longmix.errors import ConfigError, LongmixError

MOST_COMMON = 16
"""Rows of 16,384 tokens of speeches, articles or code hold up to about so many documents: fewer cost no other shape."""

TOKENS_PER_START = 128
"""Starts that a row does not need are kept to one for so many tokens; each has FlashAttention look for work in vain."""


def collate(windows: Iterable[Window], positions_go_on: bool = False) -> Batch:
    """Stack windows. Rows that may be packed have ids in every batch, so that all batches take one path.

    Args:
        windows: of equal lengths.
        positions_go_on: whether the batch has `positions_before`.
    """
    rows = list(windows)
    tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*(row[:2] for row in rows), strict=True))
    packed = [row.document_ids for row in rows if row.document_ids is not None]
    if not packed:
        return Batch(tokens=tokens, targets=targets, document_ids=None, document_starts=None)
    ids = np.stack([np.zeros_like(packed[0]) if row.document_ids is None else row.document_ids for row in rows])
    starts = torch.from_numpy(document_starts(ids))
    batch = Batch(tokens=tokens, targets=targets, document_ids=torch.from_numpy(ids), document_starts=starts)
    if positions_go_on:
        before = [np.zeros_like(ids[0]) if row.positions_before is None else row.positions_before for row in rows]
        batch["positions_before"] = torch.from_numpy(np.stack(before))
    return batch


def document_starts(document_ids: np.ndarray) -> np.ndarray:
    """Where the documents of each row [b, T] start, int32 [b, N], with T for all that a row lacks.

    N is the number of documents of the row with the most of them, rounded up to a power of two: so it takes few values,
    and graphs made for one serve most batches. Long rows have at least `MOST_COMMON`.
    """
    rows, length = document_ids.shape
    row, before = np.nonzero(document_ids[:, 1:] != document_ids[:, :-1])
    further = np.bincount(row, minlength=rows)
    most = max(int(further.max()), min(MOST_COMMON, length // TOKENS_PER_START) - 1, 0)
    starts = np.full((rows, 1 << most.bit_length()), length, np.int32)
    starts[:, 0] = 0
    number = np.arange(len(row)) - np.repeat(further.cumsum() - further, further)
    starts[row, number + 1] = before + 1
    return starts


def local_share(batch_size: int, rank: int, world_size: int) -> range:
    """The rows of a step that `rank` takes: an equal, contiguous part of `batch_size`.

    Raises:
        ConfigError: `batch_size` is not a multiple of `world_size`.
    """
    if batch_size < 1 or batch_size % world_size != 0:
        raise ConfigError(
            f"batch_size counts the sequences of all ranks together and must be a multiple of their number: got "
            f"{batch_size} for {world_size} rank{'s' if world_size > 1 else ''}"
        )
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


class TrainSteps(Dataset[Batch]):
    """Item `step` is one process's share of that optimizer step, wherever the run started.

    Step s covers the running samples [s * batch_size, (s + 1) * batch_size) of `windows`.
    """

    def __init__(
        self, windows: OrderedWindows, batch_size: int, rank: int, world_size: int, positions_go_on: bool = False
    ) -> None:
        self._windows = windows
        self._positions_go_on = positions_go_on
        self._batch_size = batch_size
        self._share = local_share(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Batch:
        numbers = [step * self._batch_size + number for number in self._share]
        batch = collate((self._windows.sample(number) for number in numbers), self._positions_go_on)
        if isinstance(self._windows, ContiguousWindows):
            batch["continues"] = torch.tensor([self._windows.continues(number) for number in numbers])
        return batch


class EvaluationBatches(Dataset[Batch]):
    """One process's share of some evaluation windows, in batches; the last may be smaller.

    All processes have equally many batches, since models divided over processes must run in step. Where a process has
    no window left, its batch is a window without targets.
    """

    def __init__(self, windows: FiniteWindows, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self._windows = windows
        self._batch_size = batch_size
        self._indices = range(rank, len(windows), world_size)
        largest_share = -(-len(windows) // world_size)
        self._length = -(-largest_share // batch_size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        indices = self._indices[index * self._batch_size : (index + 1) * self._batch_size]
        if not indices:
            spare = self._windows[0]
            return collate([spare._replace(targets=np.full_like(spare.targets, IGNORE_INDEX))])
        return collate(self._windows[number] for number in indices)


@dataclass(frozen=True)
class _Failed:
    """An error that a worker returns in place of a batch; torch would wrap the text of one that is raised there."""

    error: LongmixError


class _Careful(Dataset[Any]):
    """Batches, or in place of a batch the error meant for the user that its making raised."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, item: int) -> Batch | _Failed:
        try:
            return self._batches[item]
        except LongmixError as error:
            return _Failed(error)


class _Loader(DataLoader[Any]):
    """A loader that raises a worker's error as the worker raised it."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, _Failed):
                raise batch.error
            yield batch


def load(batches: Dataset[Batch], items: range, num_workers: int) -> DataLoader[Any]:
    """A sized loader over `items` of `batches`; the number of workers changes its speed and nothing else.

    A `LongmixError` arrives as it was raised, from a worker too.
    """
    if num_workers > 0:
        # Workers never tokenise; unless told, tokenizers < 0.23 warns in each one forked after it ran in parallel.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _Loader(
        _Careful(batches),
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # A generator of its own, because the default would draw from the global one and so change dropout.
        generator=torch.Generator(),
    )
