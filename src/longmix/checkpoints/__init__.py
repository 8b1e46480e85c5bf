"""Checkpoints that are whole or not there, in one of two forms.

A checkpoint is a folder `step-<number>`. It is filled under another name and renamed once everything is on the disk,
so a folder of that name is complete. `info.json` (step, validation results) holds the bytes and the SHA-256 of every
other file, which are verified before anything is loaded; loading one runs no code.

    format 1, whole      state.pt: all of the state, written by one process
    format 2, sharded    __<rank>_0.distcp and .metadata: tensors, by torch.distributed.checkpoint; each process writes
                         the parts it has. run.pt: everything else (config, tokenizer, random states, position)

Either can be continued on any number of processes. `python -m longmix.checkpoints consolidate` makes format 1 of 2.
"""

from longmix.checkpoints.find import chosen_checkpoint, find_checkpoint
from longmix.checkpoints.load import Checkpoint, load_checkpoint, open_checkpoint
from longmix.checkpoints.store import CheckpointStore
from longmix.checkpoints.tensor_files import load_foreign_tensors, load_tensors, save_tensors
from longmix.checkpoints.verify import read_info, reading

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "chosen_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "load_foreign_tensors",
    "load_tensors",
    "open_checkpoint",
    "read_info",
    "reading",
    "save_tensors",
]
