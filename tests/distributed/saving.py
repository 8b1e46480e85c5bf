"""Small models that are trained, saved and restored in one process and in several; run by a pool's processes too."""

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longmix.checkpoints import CheckpointStore, open_checkpoint, sharded
from longmix.checkpoints.saver import Saver
from longmix.checkpoints.tensors import is_divided, split, whole
from longmix.distributed.agreement import Processes
from longmix.errors import LongmixError
from longmix.mixers.flash import Flash
from longmix.mixers.routing import Routing
from longmix.model.backbone import LanguageModel
from longmix.recipe import recipe_of, set_recipe
from longmix.training import strategies
from longmix.training.optimizers import muon
from longmix.training.saved_state import named_state, restore_state


@dataclass(frozen=True)
class Form:
    """How a model lies in its processes, and how it is saved.

    Attributes:
        processes: how many.
        divided: FSDP; else each has all of it.
        sharded: a file for each process; else one.
    """

    processes: int
    divided: bool
    sharded: bool


FORMS = {
    "single": Form(1, False, False),
    "single-shards": Form(1, False, True),
    "ddp-2": Form(2, False, False),
    "ddp-4-shards": Form(4, False, True),
    "fsdp-2-shards": Form(2, True, True),
    "fsdp-4-shards": Form(4, True, True),
    "fsdp-4-whole": Form(4, True, False),
}


class Training:
    """A model with Muon and AdamW after some steps.

    No size divides by 4, so that shards are uneven and some are empty; head and embedding are one tensor, and routing
    has buffers.
    """

    def __init__(self, group: dist.ProcessGroup | None, form: Form, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LanguageModel(
            lambda shape, index: Flash(shape, index) if index else Routing(shape, index, clusters=3, window=4),
            13,
            d_model=12,
            num_layers=2,
            num_heads=2,
            mlp_hidden=10,
            tie_head=True,
        )
        recipes = {name: recipe_of(weight) for name, weight in self.model.named_parameters()}
        if form.divided:
            assert group is not None
            strategies.shard(self.model, DeviceMesh.from_group(group, "cpu"))
        for name, weight in self.model.named_parameters():
            set_recipe(weight, recipes[name])
        self.optimizers = muon(dict(self.model.named_parameters()), learning_rate=1e-2)
        self.steps = 0

    def step(self, count: int) -> "Training":
        """Take steps on tokens that are the same in all processes."""
        for _ in range(count):
            self.steps += 1
            tokens = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(self.steps))
            self.model(tokens[:, :-1], tokens[:, 1:]).token_losses.mean().backward()
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = 1e-2 / self.steps
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():  # a validation, behind which FSDP leaves whole weights
            self.model(torch.zeros(2, 9, dtype=torch.int64))
        return self

    def state(self) -> dict[str, Any]:
        """As a run saves it."""
        return {"step": self.steps, **named_state(self.model, self.optimizers), "text": ["ü", None, (1, 2.5)]}

    def restore(self, checkpoint: Path, processes: Processes) -> "Training":
        """Continue from a checkpoint."""
        saved = open_checkpoint(checkpoint)
        rest = saved.rest()
        restore_state(self.model, self.optimizers, saved, rest["optimizers"], processes)
        self.steps = rest["step"]
        return self

    def everything(self) -> dict[str, Any]:
        """Copies of all tensors, whole, and the optimizers' settings; all processes must call it."""
        tensors, rest = split(self.state())
        rates = [group["lr"] for content in rest["optimizers"] for group in content["param_groups"]]
        return {name: whole(tensor).clone() for name, tensor in tensors.items()} | {"rates": rates, "step": self.steps}


def saver(
    folder: Path, group: dist.ProcessGroup | None, form: Form, asynchronous: bool = False, keep: int = 2
) -> Saver:
    """What a run of this form saves with."""
    store = CheckpointStore(folder)
    return Saver(store, keep, Processes(group), sharded=form.sharded, asynchronous=asynchronous)


def save(group: dist.ProcessGroup | None, form: Form, folder: Path) -> dict[str, Any]:
    """Train two steps and save; what was saved."""
    training = Training(group, form, seed=0).step(2)
    saver(folder, group, form).save(training.state(), {})
    return training.everything()


def restore(group: dist.ProcessGroup | None, form: Form, checkpoint: Path) -> dict[str, Any]:
    """What is there after restoring into a model that was trained from other weights."""
    training = Training(group, form, seed=5).step(1).restore(checkpoint, Processes(group))
    for optimizer in training.optimizers:
        for weight, values in optimizer.state.items():
            for value in values.values():
                assert value.shape != weight.shape or is_divided(value) == form.divided, "more than this process's part"
    return training.everything()


def continued(group: dist.ProcessGroup | None, form: Form, checkpoint: Path | None) -> dict[str, Any]:
    """Four steps, the last two of them after a restart if there is a checkpoint."""
    training = Training(group, form, seed=0)
    training = training.step(4) if checkpoint is None else training.restore(checkpoint, Processes(group)).step(2)
    return training.everything()


def save_while_training(group: dist.ProcessGroup | None, form: Form, folder: Path) -> dict[str, Any]:
    """Save twice in the background; the first time training goes on before anything is written.

    For all processes of a pool, which have a second group then, or for one.

    Returns:
        What was to be saved each time, and which checkpoints there were before and after the first was written.
    """
    keeper = saver(folder, None if group is None else dist.group.WORLD, form, asynchronous=True)
    training, gates = Training(group, form, seed=0).step(2), (threading.Event(), threading.Event())
    found: dict[str, Any] = {"first": training.everything()}
    with held_back(*gates):
        keeper.save(training.state(), {})
        training.step(1)
        found["second"] = training.everything()
        found["in flight"] = [path.name for path in keeper.store.all()], keeper.store.latest(), keeper.last
        threading.Timer(0.2, gates[0].set).start()
        keeper.save(training.state(), {})  # waits for the first
        found["after"] = [path.name for path in keeper.store.all()], keeper.last
        training.step(1)
        gates[1].set()
        keeper.wait()
    found["end"] = [path.name for path in keeper.store.all()], keeper.last
    return found


@contextlib.contextmanager
def held_back(*gates: threading.Event) -> Iterator[None]:
    """Each checkpoint is begun when its gate opens."""
    from longmix.checkpoints import store

    original, waiting = store.atomic_directory, iter(gates)

    def waits(target: Path) -> contextlib.AbstractContextManager[Path]:
        next(waiting).wait(30)
        return original(target)

    with patch.object(store, "atomic_directory", waits):
        yield


def save_on_full_disk(
    group: dist.ProcessGroup | None, form: Form, folder: Path, full: int, asynchronous: bool
) -> tuple[str, bool, list[str], float]:
    """Save one checkpoint, and one more when the disk is full for one rank; then a third on a disk with room again.

    Returns:
        The error, whether it is one that all processes have, what lies in the folder after it, and the seconds it took.
    """
    training, keeper = Training(group, form, seed=0).step(1), saver(folder, group, form, asynchronous)
    keeper.save(training.state(), {})
    keeper.wait()
    training.step(1)
    began, rank = time.monotonic(), 0 if group is None else dist.get_rank(group)
    with no_room(rank == full):
        message, shared = "", False
        try:
            keeper.save(training.state(), {})
            keeper.wait()
        except LongmixError as error:
            message, shared = f"{type(error).__name__}: {error}", error.shared
        seconds = time.monotonic() - began
    left = Processes(group).first(lambda: sorted(path.name for path in folder.iterdir()))
    training.step(1)
    keeper.save(training.state(), {})
    keeper.wait()
    return message, shared, left, seconds


@contextlib.contextmanager
def no_room(full: bool) -> Iterator[None]:
    """Let every write past some bytes fail in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_on_own_disks(group: dist.ProcessGroup, form: Form, folder: Path) -> str:
    """What is said where the last process does not see what the first one makes."""
    training, original = Training(group, form, seed=0).step(1), sharded.write_shards

    def write(target: Path, pieces: dict[str, Any], processes: Processes) -> dict[str, Any]:
        last = processes.rank == processes.size - 1
        return original(target.parent / "elsewhere" if last else target, pieces, processes)

    with patch.object(sharded, "write_shards", write):
        try:
            saver(folder, group, form).save(training.state(), {})
        except LongmixError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def error_of_restoring(group: dist.ProcessGroup | None, form: Form, checkpoint: Path) -> tuple[str, bool]:
    """What is said of a damaged checkpoint, and whether all processes say it."""
    try:
        restore(group, form, checkpoint)
    except LongmixError as error:
        return f"{type(error).__name__}: {error}", error.shared
    return "", False


def fails(group: dist.ProcessGroup, rank: int, error: Exception) -> str:
    """What `Processes.each` raises if one rank's work fails."""
    processes = Processes(group)

    def work() -> int:
        if processes.rank == rank:
            raise error
        return processes.rank

    try:
        return str(processes.each(work))
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    return [
        name
        for name in {**ours, **theirs}
        if name not in ours
        or name not in theirs
        or (
            not torch.equal(ours[name], theirs[name]) or ours[name].dtype != theirs[name].dtype
            if isinstance(ours[name], Tensor)
            else ours[name] != theirs[name]
        )
    ]
