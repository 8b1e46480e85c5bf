"""`train.py` in one process or in several as torchrun starts them, without its seconds of imports: they are forked."""

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from doomed_run import MOMENTS
from faulty import run_train

PRELOADED = ["torch", "lightning.pytorch", "longmix.training.run"]


class Ended(NamedTuple):
    """A process that ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    text: str


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun_places(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of `size` processes on one machine."""
    same = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "MASTER_PORT": free_port()}
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


def ended(processes: list, folder: Path, count: int | None = None, seconds: float = 400) -> list[Ended | None]:
    """What became of the processes once `count` of them, or all, have ended; None for those that run on."""
    count = len(processes) if count is None else count
    deadline = time.monotonic() + seconds
    while sum(process.exitcode is not None for process in processes) < count and time.monotonic() < deadline:
        wait([process.sentinel for process in processes if process.exitcode is None], 1)
    return [
        None if process.exitcode is None else Ended(process.exitcode, (folder / f"{rank}.txt").read_text())
        for rank, process in enumerate(processes)
    ]


def together(words: list[str], folder: Path, places: list[dict[str, str]], count: int | None = None) -> list:
    """`start`, and what has become of the processes when `count` of them, or all, have ended; the others are killed."""
    processes = start(words, folder, places)
    try:
        return ended(processes, folder, count)
    finally:
        for process in processes:
            process.kill()
            process.join()


def alone(words: list[str], folder: Path, moment: str = "") -> Ended:
    """Run train.py with `words` in `folder`, in one process that meets its end at a moment of `doomed_run`, if any.

    Raises:
        RuntimeError: it did not end.
    """
    (end,) = together(words, folder, [{"MOMENT": moment}])
    if end is None:
        raise RuntimeError("did not end")
    return end


def train(size: int, words: list[str], folder: Path) -> None:
    """Run train.py with `words` in `folder`, in `size` processes.

    Raises:
        RuntimeError: one of them failed, with what it wrote; or they did not end.
    """
    for end in together(words, folder, torchrun_places(size) if size > 1 else [{}]):
        if end is None or end.code:
            raise RuntimeError("did not end" if end is None else f"{end.code}: {end.text}")


def _train(words: list[str], output: str, folder: str, place: dict[str, str]) -> None:
    # Workers that read batches are forked, as those of train.py; this process's own way would import all anew in each.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ |= place
    if moment := place.get("MOMENT"):
        MOMENTS[moment]()
    run_train(words + os.environ.get("OWN_WORDS", "").split())
