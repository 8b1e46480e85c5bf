"""Saves while training continues: the step loop waits for copies in CPU memory; a thread hashes and writes them."""

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints.store import CheckpointStore
from longmix.checkpoints.tensors import (
    IN_TENSORS,
    Name,
    is_divided,
    join,
    pieces,
    split,
    whole,
    without_aliases,
)
from longmix.distributed.agreement import Processes
from longmix.errors import StorageError
from longmix.files import storage_errors

State = dict[str, Any]


class Saver:
    """Writes the checkpoints of a run, one at a time; all processes must make the same calls.

    Args:
        store: where they go.
        keep: how many stay beside the best one; older ones go once a newer one is committed.
        processes: those that train. With `asynchronous`, nothing but this object may use their group.
        sharded: each process writes what it has; else the first writes all of it to one file.
        asynchronous: write in a thread.

    Attributes:
        last: the newest checkpoint that was committed.
        saved_step: of the last call of `save`.
    """

    def __init__(
        self, store: CheckpointStore, keep: int, processes: Processes, *, sharded: bool, asynchronous: bool
    ) -> None:
        self.store, self.keep, self.processes = store, keep, processes
        self.sharded, self.asynchronous = sharded, asynchronous
        self.last: Path | None = None
        self.saved_step: int | None = None
        self._memory: dict[Name, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: State, info: dict[str, Any]) -> None:
        """Save a state once the one before is written; it may change as soon as this returns.

        Args:
            state: as `CheckpointStore.save` takes it, but the tensors in "model" and "optimizers" may be divided over
                the processes. Names, shapes and order are the same in all of them, keys above tensors are texts.
            info: see `CheckpointStore.save`.

        Raises:
            StorageError: this checkpoint, or the one before, could not be written; the same in all processes.
        """
        self.wait()  # the thread still reads the memory of the last copies, and may hold an error to raise
        self.saved_step = state["step"]
        parts = {key: state[key] for key in IN_TENSORS if key in state}
        tensors, rest = split(parts)
        # Tied weights are written once; loading gives both names the same tensor.
        tensors, aliases = without_aliases(tensors)
        rest = {**state, **rest}
        if self.asynchronous:  # training changes both while the thread writes
            rest, info = copy.deepcopy(rest), copy.deepcopy(info)
        prepare = self._shards if self.sharded else self._file
        write = prepare(tensors, aliases, rest, info)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._commit(write)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            StorageError: the last checkpoint could not be written; the same in all processes, and once only.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise. Other processes may learn of it a little later; their `wait` raises too."""
        return self._error is not None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _shards(
        self, tensors: dict[Name, Tensor], aliases: dict[Name, Name], rest: State, info: State
    ) -> Callable[[], Path]:
        own = pieces(tensors, self.processes.rank, self.processes.size)
        if self.asynchronous:
            copies = self._copies({name: piece.part for name, piece in own.items()})
            own = {name: replace(piece, part=copies[name]) for name, piece in own.items()}
        return lambda: self.store.save_sharded(own, aliases, rest, info, self.processes)

    def _file(
        self, tensors: dict[Name, Tensor], aliases: dict[Name, Name], rest: State, info: State
    ) -> Callable[[], Path]:
        found = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor)  # all processes take part; one tensor at a time bounds the memory
            if self.processes.is_first:
                found[name] = gathered.cpu() if is_divided(tensor) and not self.asynchronous else gathered
                if self.asynchronous:
                    found |= self._copies({name: gathered})
        state = join(found | {name: found[other] for name, other in aliases.items()}, rest) if found else rest
        target = self.store.path(rest["step"])

        def write() -> Path:
            with storage_errors(target):
                return self.processes.first(lambda: self.store.save(state, info))

        return write

    def _copies(self, tensors: dict[Name, Tensor]) -> dict[Name, Tensor]:
        """Copies in CPU memory, in the memory of the last copies, whose content is on the disk by now."""
        on_gpu = False
        for name, tensor in tensors.items():
            if name not in self._memory or self._memory[name].shape != tensor.shape:  # carried states may grow
                self._memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name].copy_(tensor, non_blocking=True)
            on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # copies are asynchronous, and training goes on at once
        return {name: self._memory[name] for name in tensors}

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._commit(write)
        except BaseException as error:  # the step loop raises it, in `wait`
            self._error = error

    def _commit(self, write: Callable[[], Path]) -> None:
        try:
            self.last = write()
            # Old checkpoints go only once the new one is on the disk, so that a kill never leaves a run without any.
            with storage_errors(self.store.folder):
                self.processes.first(lambda: self.store.prune(self.keep))
        except StorageError as error:
            error.shared = self.processes.size > 1
            raise
