"""`train.py` in several processes of which one meets a fault, for real: killed, stopped, NaN, or without disk space.

`python faulty.py WORDS...` runs train.py in this process; so does each process that `start` forks, which saves seconds
of imports. Whether and when something happens is said in the environment: FAULT="kill:1" is for the process of rank 1.
Nothing of longmix is replaced but for the training step whose end or beginning is the moment.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

TRAIN = Path(__file__).parents[2] / "train.py"
PRELOADED = ["torch", "lightning.pytorch", "longmix.training.run"]
STEP = 5
"""The fault comes once so many steps are taken; with a checkpoint every 3 steps the last one is of step 3."""


def at(step: int, action: Callable) -> None:
    """Call `action(module)` when `step` steps are taken and the next begins."""
    from longmix.training.module import TrainingModule

    original = TrainingModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == step:
            action(self)
        original(self, batch, batch_idx)

    TrainingModule.training_step = training_step


def end_with(number: signal.Signals) -> None:
    at(STEP, lambda _: os.kill(os.getpid(), number))


def stopped_in_a_step() -> None:
    """The others wait for it wherever they exchange next: for gradients, weights or parts of a row."""

    def stop(module) -> None:
        module.model.blocks[0].mlp.down.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))

    at(STEP, stop)


def kill_first_attempt() -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        end_with(signal.SIGKILL)


def full_disk() -> None:
    # past this size every write fails with an OSError, as it does on a full disk
    at(STEP, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


def nan_output() -> None:
    """In one step, and again when that step is looked into, a layer's output is NaN."""

    def spoil(module) -> None:
        def hook(_layer, _inputs, output):
            return output * float("nan") if module.step == STEP else output

        module.model.blocks[0].mlp.down.register_forward_hook(hook)

    at(STEP, spoil)


def nan_gradient() -> None:
    """Likewise for the gradient that a layer gets, with finite outputs."""

    def spoil(module) -> None:
        def hook(_layer, _inputs, output):
            if module.step == STEP:
                output.register_hook(lambda gradient: gradient * float("nan"))

        module.model.blocks[0].mlp.down.register_forward_hook(hook)

    at(STEP, spoil)


def handler_before() -> None:
    """Someone has SIGUSR2 before the run, as submitit does; the run is told to end by it."""

    def requeue(number, _frame):
        saved = sorted(path.name for path in Path().glob("runs/*/checkpoints/step-*"))
        print(f"handed on {signal.Signals(number).name} with {saved}", flush=True)

    signal.signal(signal.SIGUSR2, requeue)
    if os.environ["RANK"] == "0":
        end_with(signal.SIGUSR2)


FAULTS = {
    "kill": lambda: end_with(signal.SIGKILL),
    "kill-once": kill_first_attempt,
    "stop": stopped_in_a_step,
    "sigusr1": lambda: end_with(signal.SIGUSR1),
    "sigusr2": handler_before,
    "nan-output": nan_output,
    "nan-gradient": nan_gradient,
    "full-disk": full_disk,
}


def print_weights_at_the_end() -> None:
    """A number that two processes print alike if all their weights are the same bits."""
    import torch

    from longmix.training.module import TrainingModule

    def on_train_end(self) -> None:
        weights = torch.cat([weight.detach().flatten().view(torch.int32) for weight in self.model.parameters()])
        print(f"weights {int((weights.long() * torch.arange(1, len(weights) + 1)).sum())}", flush=True)

    if "FAULT" in os.environ:
        TrainingModule.on_train_end = on_train_end


def run_train(words: list[str]) -> None:
    """train.py, with the fault if it is this process's."""
    from longmix.training.place import own_place, process_rank

    fault, _, rank = os.environ.get("FAULT", "").partition(":")
    if fault and own_place() is not None and rank in (str(process_rank()), "all"):
        FAULTS[fault]()
    print_weights_at_the_end()
    sys.argv = [sys.argv[0], *words]
    runpy.run_path(str(TRAIN), run_name="__main__")


class Ended(NamedTuple):
    """A process that ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    text: str


def torchrun_places(size: int, port: int) -> list[dict[str, str]]:
    """What torchrun tells each of `size` processes on one machine."""
    same = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    return [{name: str(n) for name, n in (same | {"RANK": r, "LOCAL_RANK": r}).items()} | texts for r in range(size)]


def start(words: list[str], folder: Path, places: list[dict[str, str]]) -> list:
    """Run train.py with `words` in `folder`, in a process for each place's environment; rank r writes to r.txt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=_train, args=(words, str(folder / f"{rank}.txt"), str(folder), place))
        for rank, place in enumerate(places)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: list, folder: Path, count: int | None = None, seconds: float = 100) -> list[Ended | None]:
    """What became of the processes once `count` of them, or all, have ended; None for those that run on."""
    count = len(processes) if count is None else count
    deadline = time.monotonic() + seconds
    while sum(process.exitcode is not None for process in processes) < count and time.monotonic() < deadline:
        wait([process.sentinel for process in processes if process.exitcode is None], 1)
    return [
        None if process.exitcode is None else Ended(process.exitcode, (folder / f"{rank}.txt").read_text())
        for rank, process in enumerate(processes)
    ]


def end(processes: list) -> None:
    """Kill what is left."""
    for process in processes:
        process.kill()
        process.join()


def _train(words: list[str], output: str, folder: str, place: dict[str, str]) -> None:
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ |= place
    run_train(words + os.environ.get("OWN_WORDS", "").split())


if __name__ == "__main__":
    run_train(sys.argv[1:])
