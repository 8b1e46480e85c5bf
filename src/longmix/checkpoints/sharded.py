"""Tensors in shards: planned, written and read by torch.distributed.checkpoint (DCP); its pickles are not trusted.

The steps are those of `torch.distributed.checkpoint.save` and `load`. They are taken here one by one, so that a failure
in any process is the same error in all of them, and `.metadata` is read without running code.
"""

import errno
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType

from longmix.checkpoints.tensor_files import check_archive
from longmix.checkpoints.tensors import Name, Piece
from longmix.checkpoints.verify import (
    ALIASES,
    INFO_FILE,
    Facts,
    as_state,
    check_file,
    check_size,
    cure,
    facts_of,
    read_info,
    reading,
)
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError
from longmix.progress import Advance, silent

METADATA_FILE, RUN_FILE = ".metadata", "run.pt"
"""What says where tensors lie, as DCP writes it; and everything else of a state."""

SLACK_BYTES = 64 << 20
"""The most that tensors may exceed the size of their files; larger claims are refused, not allocated."""

_METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What says where tensors lie. `BytesStorageMetadata` is not among them: such entries are pickles of their own, which
torch would run."""


def write_shards(folder: Path | str, pieces: dict[Name, Piece], processes: Processes) -> dict[str, Facts]:
    """Write each process's pieces to a file of its own and to the disk; all processes must call it.

    Returns:
        Size and SHA-256 of the files of all processes, by name; each has hashed its own.

    Raises:
        OSError: in all processes, naming the rank that could not write and why.
    """
    folder = Path(folder)
    planner, writer = _PiecePlanner(), _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    planner.set_up_planner(dict(pieces), is_coordinator=processes.is_first)
    writer.set_up_storage_writer(processes.is_first)

    def plan_own() -> SavePlan:
        if not folder.is_dir():  # DCP would make a missing folder
            raise OSError(errno.ENOENT, "the folder is not on a disk that all processes share")
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = processes.each(plan_own)
    plans, metadata = planner.create_global_plan(plans)
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[processes.rank])
    results = processes.each(lambda: writer.write_data(plan, planner).value())
    processes.first(lambda: writer.finish(metadata, results))

    def facts() -> dict[str, Facts]:
        own = sorted(folder.glob(f"__{processes.rank}_*"))
        return {path.name: facts_of(path) for path in own + [folder / METADATA_FILE] * processes.is_first}

    return {name: found for files in processes.each(facts) for name, found in files.items()}


class ShardedCheckpoint:
    """A checkpoint of format 2. Names and shapes of its tensors are read at once, their values on demand.

    Args:
        checkpoint: its folder.

    Attributes:
        shapes, dtypes: of all tensors, by name.

    Raises:
        CheckpointError: a file is missing or truncated, or `.metadata` is damaged; shards are not read yet.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self.checkpoint = checkpoint = Path(checkpoint)
        self.files = _files_of(checkpoint)
        for name in {METADATA_FILE, RUN_FILE, *self.files}:
            check_size(checkpoint / name, self.files.get(name, {}))
        self._check(METADATA_FILE)
        self._metadata = read_metadata(checkpoint, set(self.files))
        entries: dict[Name, Any] = self._metadata.state_dict_metadata
        with reading(checkpoint / METADATA_FILE, "description of shards", f"; {cure(checkpoint).rstrip('.')}"):
            self.shapes: dict[Name, torch.Size] = {name: torch.Size(entry.size) for name, entry in entries.items()}
            self.dtypes: dict[Name, torch.dtype] = {name: entry.properties.dtype for name, entry in entries.items()}
            needed = sum(self.dtypes[name].itemsize * math.prod(shape) for name, shape in self.shapes.items())
            if needed > sum(facts["bytes"] for facts in self.files.values()) + SLACK_BYTES:
                raise ValueError("its tensors need more bytes than its files have")

    def rest(self) -> dict[str, Any]:
        """The state without weights and without the optimizers' tensors.

        Raises:
            CheckpointError: its file is damaged.
        """
        self._check(RUN_FILE)
        path = self.checkpoint / RUN_FILE
        with reading(path, "state", f"; {cure(self.checkpoint).rstrip('.')}"):
            check_archive(path)
            return as_state(torch.load(path, map_location="cpu", weights_only=True))

    def aliases(self) -> dict[Name, Name]:
        """Further names of tensors, each with the one that they are stored by."""
        found = self.rest().get(ALIASES)
        with reading(self.checkpoint / RUN_FILE, "state", f"; {cure(self.checkpoint).rstrip('.')}"):
            if not isinstance(found, dict) or not set(found.values()) <= set(self.shapes):
                raise ValueError("its aliases name what is not there")
            return found

    def verify(self) -> None:
        """Verify all shards, in one process.

        Raises:
            CheckpointError: one is damaged.
        """
        for name in self.files:
            self._check(name)

    def read(self, targets: dict[Name, Tensor]) -> None:
        """Fill `targets` in one process, after `verify`.

        Raises:
            CheckpointError: a shard does not hold what is asked for.
        """
        self._read(targets, silent)

    def read_into(self, targets: dict[Name, Tensor], processes: Processes, advance: Advance = silent) -> None:
        """Fill `targets`, once each shard has been verified by one of the processes; all processes must call it.

        A process reads the shards that overlap with what it has of each target, and tells `advance` how many bytes it
        has verified and read.

        Raises:
            CheckpointError: a shard is damaged or does not hold what is asked for; the same in all processes.
        """
        shards = sorted(set(self.files) - {METADATA_FILE, RUN_FILE}, key=lambda name: -self.files[name]["bytes"])

        def check() -> None:
            for name in shards[processes.rank :: processes.size]:
                self._check(name)
                advance(self.files[name]["bytes"])

        processes.each(check)
        processes.each(lambda: self._read(targets, advance))

    def _check(self, name: str) -> None:
        check_file(self.checkpoint / name, self.files[name])

    def _read(self, targets: dict[Name, Tensor], advance: Advance) -> None:
        with reading(self.checkpoint, "such tensors", f"; {cure(self.checkpoint).rstrip('.')}"):
            planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.advance = advance
            planner.set_up_planner(dict(targets), self._metadata, is_coordinator=True)
            reader = FileSystemReader(self.checkpoint)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
            reader.read_data(plan, planner).wait()


def _files_of(checkpoint: Path) -> dict[str, Facts]:
    """Size and SHA-256 of each file, by plain names without a path."""
    files = read_info(checkpoint).get("files", {})
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise CheckpointError(f"{checkpoint / INFO_FILE} does not say which files there are. {cure(checkpoint)}")
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CheckpointError(f"{checkpoint / INFO_FILE} names {name!r}, which is no file. {cure(checkpoint)}")
    return files


class _Unpickler(pickle.Unpickler):
    path: Path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self.path} names {module}.{name}, which no checkpoint of longmix does: it could run any code. "
            f"{cure(self.path.parent)}"
        )


def read_metadata(checkpoint: Path | str, files: set[str]) -> Metadata:
    """Where the tensors of a sharded checkpoint lie, read without running code.

    Args:
        checkpoint: its folder.
        files: the names of the files there are to read.

    Raises:
        CheckpointError: it is damaged, or names another class, or a file outside `files`.
    """
    checkpoint = Path(checkpoint)
    path = checkpoint / METADATA_FILE
    with reading(path, "description of shards", f"; {cure(checkpoint).rstrip('.')}"), path.open("rb") as stream:
        unpickler = _Unpickler(stream)
        unpickler.path = path
        metadata = unpickler.load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise ValueError("an entry that is no tensor")
        named = {stored.relative_path for stored in metadata.storage_data.values()}
    if named - files:
        raise CheckpointError(
            f"{path} names {sorted(named - files)[0]}, which is not one of the files of this checkpoint. "
            f"{cure(checkpoint)}"
        )
    return metadata


class _PiecePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, piece) for name, piece in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].part


class _LoadPlanner(DefaultLoadPlanner):
    advance: Advance = staticmethod(silent)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Called by DCP when it has filled this part of a tensor."""
        self.advance(tensor.nbytes)


def _item(name: Name, piece: Piece) -> WriteItem:
    start = torch.Size(piece.start)
    return WriteItem(
        index=MetadataIndex(name, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=start, sizes=piece.part.shape),
            properties=TensorProperties(dtype=piece.part.dtype),
            size=piece.shape,
        ),
    )


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """None, since the folder's name at this time is not its last one."""
