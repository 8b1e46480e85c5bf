"""Reads `.metadata` of torch.distributed.checkpoint, a pickle that may name any function; here only a few."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from longmix.checkpoints.verify import cure, reading
from longmix.errors import CheckpointError

FILE = ".metadata"

_CLASSES = {
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


class _Unpickler(pickle.Unpickler):
    path: Path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
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
    path = checkpoint / FILE
    with reading(path, "description of shards", f"; {cure(checkpoint).rstrip('.')}"), path.open("rb") as stream:
        unpickler = _Unpickler(stream)
        unpickler.path = path
        metadata = unpickler.load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise ValueError("an entry that is no tensor")
        named = {place.relative_path for place in metadata.storage_data.values()}
    if named - files:
        raise CheckpointError(
            f"{path} names {sorted(named - files)[0]}, which is not one of the files of this checkpoint. "
            f"{cure(checkpoint)}"
        )
    return metadata
