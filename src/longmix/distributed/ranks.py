"""The ranks of this process among those of a run, as torchrun, srun or our own launcher tell it in the environment.

Nothing heavy is imported here, as the entry points ask before anything else.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from longmix.errors import ConfigError, ProcessLost

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHER_PID = "LONGMIX_LAUNCHER_PID"
"""Set for the processes that `longmix.training.process_launcher` starts: the process that waits for them."""

MOST_ON_A_MACHINE = 4096
"""The most processes or threads that a word may ask for; a mistyped number would bring the machine to a halt."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Ranks:
    """A process among those that a launcher started for one run.

    Attributes:
        rank, world_size: of all processes.
        local_rank, local_world_size: of those on this machine.
        launcher: who started them.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Literal["longmix", "torchrun", "srun"]


def local_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment of one of `count` processes on this machine: its ranks and the port where all meet."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: str(number) for name, number in (numbers | {"MASTER_PORT": port}).items()} | {
        "MASTER_ADDR": "127.0.0.1"
    }


def own_ranks() -> Ranks | None:
    """The ranks of this process; None if it was started alone.

    Raises:
        ConfigError: srun does not say how many processes a machine has.
    """
    environment = os.environ
    if all(name in environment for name in TORCH_VARIABLES):
        rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in TORCH_VARIABLES)
        launcher: Literal["longmix", "torchrun"] = "longmix" if LAUNCHER_PID in environment else "torchrun"
        return Ranks(rank, world_size, local_rank, local_world_size, launcher)
    # a batch script has SLURM_NTASKS too; only what srun starts has the number of tasks of its step
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return None
    if "SLURM_NTASKS_PER_NODE" not in environment:
        raise ConfigError("srun started several tasks; say how many on each machine with --ntasks-per-node.")
    numbers = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in numbers)
    return Ranks(rank, world_size, local_rank, local_world_size, "srun")


def process_rank() -> int:
    """This process's rank over all machines, known before any process group exists."""
    ranks = own_ranks()
    return 0 if ranks is None else ranks.rank


def end_with_parent() -> None:
    """Let SIGTERM stop this process when torchrun or our launcher ends before it; on Linux only.

    Raises:
        ProcessLost: our own launcher has ended already.
    """
    waits_for_us = LAUNCHER_PID in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "linux" and waits_for_us:  # Linux means the thread that started us, which others may end
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        raise ProcessLost(f"process {launcher}, which started this one, is gone.")


def leave(code: int = 0) -> None:
    """End this process at once if torchrun or our launcher waits for it: its work is done, or another one is lost.

    Gloo's threads may outlive the interpreter's way out, whereupon C++ aborts a process that had succeeded (seen once
    in some hundred runs), and those that wait would take the run for failed. Behind a lost process they take seconds.
    """
    ranks = own_ranks()
    if ranks is None or ranks.launcher == "srun":
        return
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def was_restarted() -> bool:
    """Whether torchrun or Slurm started this command before and runs it again."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
