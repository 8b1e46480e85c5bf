"""`train.py` in several processes as torchrun starts them, without its seconds of imports: they are forked."""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
PRELOADED = ["torch", "lightning.pytorch", "longmix.training.run"]
SECONDS = 300


def train(size: int, words: list[str], folder: Path) -> None:
    """Run `train.py` with words in `folder`, in `size` processes.

    Raises:
        RuntimeError: one of them failed, with what it wrote; or they did not end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    processes = [context.Process(target=_train, args=(rank, size, port, words, str(folder))) for rank in range(size)]
    for process in processes:
        process.start()
    running = list(processes)
    while running and all(process.exitcode in (None, 0) for process in processes):
        ended = wait([process.sentinel for process in running], SECONDS)
        running = [process for process in running if process.sentinel not in ended] if ended else []
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    written = [(folder / f"{rank}.txt").read_text() for rank in range(size)]
    for process, text in zip(processes, written, strict=True):
        if process.exitcode:
            raise RuntimeError(f"{process.exitcode}: {text}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _train(rank: int, size: int, port: int, words: list[str], folder: str) -> None:
    os.chdir(folder)
    written = os.open(f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if size > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {name: str(value) for name, value in (places | meeting).items()}
    sys.argv = [str(TRAIN), *words]
    runpy.run_path(str(TRAIN), run_name="__main__")
