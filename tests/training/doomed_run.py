"""Moments at which a process that trains meets its end: `launched.alone` runs train.py with one of them.

The process is really killed (SIGKILL to itself), signalled or starved of disk space; nothing of longmix is replaced but
for the one function whose call is the moment.
"""

import os
import resource
import signal
from pathlib import Path

import torch

STEP = 5
"""Moments in the middle of training come after this many steps; with a checkpoint every 3 steps the last one is 3."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(action) -> None:
    from longmix.training.module import TrainingModule

    original = TrainingModule.training_step

    def training_step(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.step == STEP:
            action()

    TrainingModule.training_step = training_step


def half_written_checkpoint() -> None:
    original = torch.save

    def save(state, stream):
        if state["step"] < 6:
            return original(state, stream)
        original(state, stream)
        stream.flush()
        os.truncate(stream.fileno(), stream.tell() // 2)
        return kill()

    torch.save = save


def before_rename() -> None:
    original = Path.rename

    def rename(self, target):
        if Path(target).name == "step-00000006":
            kill()
        return original(self, target)

    Path.rename = rename


def while_pruning() -> None:
    import shutil

    original = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if Path(path).name.startswith(".step-00000003") and Path(path).exists():
            (Path(path) / "state.pt").unlink()
            kill()
        return original(path, *args, **kwargs)

    shutil.rmtree = rmtree


def full_disk() -> None:
    # past this size every write fails with an OSError, as it does on a full disk
    after_step(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)))


MOMENTS = {
    "between-checkpoints": lambda: after_step(kill),
    "half-written": half_written_checkpoint,
    "before-rename": before_rename,
    "while-pruning": while_pruning,
    "sigterm": lambda: after_step(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "sigint": lambda: after_step(lambda: os.kill(os.getpid(), signal.SIGINT)),
    "full-disk": full_disk,
}
