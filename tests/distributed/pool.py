"""Processes that work on slices of the same rows: started once, and given one function after the other."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed", "longmix.model.build", "longmix.training.supervisor"]
SIZES = (2, 4)
"""Processes that the same rows are cut for, where nothing else is said."""

MOST = 4


class Pool:
    """`MOST` processes, of which the first few work together."""

    def __init__(self, meeting_place: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(meeting_place), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(group, *arguments)` in the first `size` processes; their results by rank.

        Raises:
            RuntimeError: it raised in some of them, or did not end within a minute.
        """
        for pipe in self.pipes[:size]:
            pipe.send_bytes(pickle.dumps((size, function, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(60):
                self.close()  # what it answers later would be taken for the answer to another call
                raise RuntimeError(f"process {rank} is still waiting for the others")
            answers.append(pickle.loads(pipe.recv_bytes()))
        for rank, (failure, _) in enumerate(answers):
            if failure:
                raise RuntimeError(f"process {rank}: {failure}")
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(rank: int, meeting_place: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=MOST)
    groups = {size: dist.new_group(range(size), backend="gloo") for size in range(1, MOST + 1)}
    while True:
        try:
            size, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = "", function(groups[size], *arguments)
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))
