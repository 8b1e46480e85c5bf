"""`python train.py` on several devices of one machine: starts a process for each, and answers for them all.

The process that the user started takes no part in training. So whichever process of the run is killed or stalls, there
is one that notices, ends the others, says what happened and leaves nothing behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from longmix.distributed.ranks import LAUNCHER_PID, local_environment
from longmix.distributed.signals import SignalWatch, process_watch
from longmix.errors import Interrupted, NonFiniteError, ProcessLost
from longmix.locks import Lock
from longmix.training.claims import PASSED_ON
from longmix.training.connection import how_to_continue

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Seconds for the others to notice that one is gone; a process that waits on a GPU never would."""

CLOSING_SECONDS = 60.0
"""Seconds for the others to end once a signal has ended one; they may have to send a log."""

TOGETHER = (0, NonFiniteError.exit_code, Interrupted.exit_code)
"""Exit codes that all processes reach by themselves; the others may still be closing their logs."""


@dataclass
class Worker:
    """One process of the run."""

    rank: int
    process: subprocess.Popen

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def is_stopped(self) -> bool:
        """Whether a signal has suspended the process, as far as the system tells."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False


def launch(command: Sequence[str], count: int, timeout: float, folder: Path, lock: Lock | None = None) -> None:
    """Run `command` as `count` processes that find each other, and wait for all of them.

    Signals that ask for an end are passed on, and the run saves and ends as one process would.

    Args:
        command: program and arguments.
        count: processes.
        timeout: seconds that a process waits for another, for messages.
        folder: of the run; holds its checkpoints.
        lock: of that folder; the first process takes it over, and this one holds it no longer.

    Raises:
        ProcessLost: one was killed or stalled.
        Interrupted: a signal ended them before the first of them could say so.
        SystemExit: one ended with an error, and has said so; the exit code is its.
    """
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives any of the processes
    signals = process_watch()
    workers: list[Worker] = []
    with signals.noting():
        try:
            for rank in range(count):
                environment, passed = _environment(rank, count, meeting.port), []
                if rank == 0 and lock is not None:
                    environment[PASSED_ON] = f"{lock.descriptor}:{lock.path.absolute()}"
                    passed = [lock.descriptor]
                process = subprocess.Popen(command, env=environment, pass_fds=passed)
                workers.append(Worker(rank, process))  # each at once, for the case that starting the next one fails
                if passed and lock is not None:
                    lock.forget()
            _wait(workers, signals)
            interrupted = _were_interrupted(workers, signals)
            failure = Interrupted.exit_code if interrupted else _failure(workers, timeout)
            name = "a signal" if signals.received is None else signals.received.name
            hand_on = signals.earlier_handler()
        finally:
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.wait()
    if interrupted and workers[0].code != Interrupted.exit_code:  # which speaks for all
        raise Interrupted(f"{name} ended the run. {how_to_continue(folder)}", hand_on)
    if isinstance(failure, int) and failure:
        sys.exit(failure)
    if isinstance(failure, str):
        raise ProcessLost(f"{failure} {how_to_continue(folder)}")


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    own = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the first process joins the meeting place as all others do
        LAUNCHER_PID: str(os.getpid()),
    }
    return os.environ | local_environment(rank, count, port) | own


def _wait(workers: list[Worker], signals: SignalWatch) -> None:
    """Wait until all have ended, or one has failed and the others had time to notice."""
    deadline, closing, passed_on = None, None, False
    while any(worker.code is None for worker in workers):
        number = signals.received
        if any(worker.code == Interrupted.exit_code for worker in workers):
            number = number or signal.SIGTERM  # one was signalled alone, and the others may wait for it
            closing = time.monotonic() + CLOSING_SECONDS if closing is None else closing
            if time.monotonic() > closing:
                return
        if deadline is None and any(worker.code not in (None, *TOGETHER) for worker in workers):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return
        if number is not None and not passed_on:
            passed_on = True
            for worker in workers:
                worker.process.send_signal(number)
        time.sleep(POLL_SECONDS)


def _were_interrupted(workers: list[Worker], signals: SignalWatch) -> bool:
    """Whether a signal ended them, sent to us or to one of them; the others may be lost without that one."""
    codes = {worker.code for worker in workers}
    if signals.received is None and Interrupted.exit_code not in codes:
        return False
    early = -(signals.received or signal.SIGTERM)  # it came before Python had begun to watch for it
    return codes != {0} and codes <= {0, Interrupted.exit_code, ProcessLost.exit_code, early}


def _failure(workers: list[Worker], timeout: float) -> str | int:
    """A sentence about the first failure, or the exit code of a process that has printed its own message."""
    codes = [worker.code for worker in workers]
    killed = [worker for worker in workers if (worker.code or 0) < 0]
    for worker in killed:
        if worker.code != -signal.SIGABRT:  # with which NCCL ends those that wait for a process too long
            return _killed(worker, len(workers))
    own = [code for code in codes if code is not None and code > 0 and code != ProcessLost.exit_code]
    if own:
        return own[0]
    silent = [worker for worker in workers if worker.code is None]
    if silent:
        worker = silent[0]
        state = ", which a signal has stopped," if worker.is_stopped() else ""
        return (
            f"process {worker.rank} of {len(workers)} (pid {worker.process.pid}){state} gave the others no sign for "
            f"trainer.timeout={timeout:g} seconds; all were ended. If it was at work, give it more time."
        )
    if killed:
        return _killed(killed[0], len(workers))
    return "the processes lost touch with each other." if any(codes) else 0


def _killed(worker: Worker, count: int) -> str:
    name = signal.Signals(-(worker.code or 0)).name
    hint = ", as the system kills what takes too much memory" if name == "SIGKILL" else ""
    return f"process {worker.rank} of {count} (pid {worker.process.pid}) was killed by {name}{hint}; all were ended."
