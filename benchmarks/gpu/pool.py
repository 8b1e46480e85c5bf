"""Processes that carry cases out side by side, each with its own context on the device.

A process that crashes, or takes longer than its case may, costs that case and is replaced. The parent never touches the
device, so nothing that happens there can end the command.
"""

import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gpu.case import CRASHED, LATE, Case, Result, carry_out, ended


class Pool:
    """Processes for cases, with the environment that this one has when they start.

    Args:
        log: file that takes what they print.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._workers: list[_Worker] = []

    def run(self, cases: Sequence[Case], count: int, until: float, report: Callable[[Result], None]) -> Sequence[Case]:
        """Carry cases out in their order, and return those for which no time was left.

        Args:
            cases: what to do.
            count: how many processes share them.
            until: no case begins that would not end by then, in `time.monotonic()`.
            report: is given each result, one at a time.
        """
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)
        left: list[Case] = []
        while len(self._workers) < min(count, len(cases)):
            self._workers.append(_Worker(self._log))
        lock = threading.Lock()

        def serve(worker: _Worker) -> None:
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                remaining = until - time.monotonic()
                if case.seconds > remaining:
                    with lock:
                        left.append(case)
                    continue
                result = worker.carry_out(case, min(case.most, remaining))
                with lock:
                    report(result)

        threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in self._workers[:count]]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without end would hold signals back
                thread.join(0.2)
        return left

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


class _Worker:
    """A process, and the next one where it ended."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def carry_out(self, case: Case, most: float) -> Result:
        """Have a case done within so many seconds."""
        began = time.monotonic()
        connection = self._started()
        try:
            connection.send(case)
            if connection.poll(most):
                result: Result = connection.recv()
                return result
        except (EOFError, OSError):
            code = self._exit_code()
            return ended(case, CRASHED, time.monotonic() - began, f"its process ended with exit code {code}")
        self.stop()
        return ended(case, LATE, time.monotonic() - began, f"not done in {most:.0f} s")

    def _started(self) -> Connection:
        if self._process is not None and self._process.is_alive() and self._connection is not None:
            return self._connection
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self._log)), daemon=True)
        self._process.start()
        theirs.close()
        return self._connection

    def _exit_code(self) -> int | None:
        assert self._process is not None
        self._process.join(5.0)
        return self._process.exitcode

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5.0)
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, log: str) -> None:
    """A process's life: cases in, results out."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    while True:
        try:
            case: Case = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(carry_out(case))
