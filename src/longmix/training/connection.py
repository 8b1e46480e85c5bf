"""Connects the processes of one run, and explains the loss of one to the user."""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from longmix.checkpoints import CheckpointStore
from longmix.distributed.agreement import Processes
from longmix.distributed.ranks import Ranks, end_with_parent, own_ranks
from longmix.errors import ProcessLost
from longmix.training.hardware import TrainerSettings

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment

TRANSPORT = re.compile("gloo|nccl|socket|store", re.IGNORECASE)
LOSS = re.compile("time(d )?out|peer|pipe|refused|closed|abort|remote process", re.IGNORECASE)
"""Texts in errors about a lost process: Gloo raises plain RuntimeErrors, for other reasons too."""


def cluster_environment() -> "ClusterEnvironment":
    """Tells Lightning who started the processes, so that it neither guesses nor requeues jobs itself."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    ranks = own_ranks()
    if ranks is None:
        return LightningEnvironment()
    return SLURMEnvironment(auto_requeue=False) if ranks.launcher == "srun" else TorchElasticEnvironment()


def connect(settings: TrainerSettings) -> Processes:
    """Meet the other processes, to decide alike with them; Lightning finds them connected.

    From here on this process is asked to stop when the one that started it ends.

    Raises:
        ProcessLost: they did not all come within `settings.timeout` seconds, or their launcher is gone.
    """
    ranks = own_ranks()
    assert ranks is not None
    end_with_parent()
    device = torch.device("cuda", ranks.local_rank) if settings.on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    environment = cluster_environment()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    timeout = timedelta(seconds=settings.timeout)
    store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
    # torchrun's store outlives a restart, and what it holds of processes that are gone must not be taken for new
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=device,
    )
    return Processes(dist.group.WORLD if device is None else dist.new_group(backend="gloo", timeout=timeout))


def disconnect() -> None:
    """Disconnect from the other processes after the last exchange."""
    dist.destroy_process_group()


@contextlib.contextmanager
def losses_explained(timeout: float, folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the transport about a lost or silent process into one error.

    Args:
        timeout: seconds that `trainer.timeout` allows.
        folder: of the run, as far as known; holds the last checkpoint.

    Raises:
        ProcessLost: says what happened and how to continue.
    """
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not _is_of_transport(cause):
            cause = cause.__cause__ or cause.__context__
        ranks = own_ranks()
        if cause is None or ranks is None:
            raise
        raise ProcessLost(_explained(cause, ranks, timeout, folder)) from error


def _explained(cause: BaseException, ranks: Ranks, timeout: float, folder: Path | None) -> str:
    reason = re.sub(r"^\[\S+\] ", "", str(cause).strip().splitlines()[0]).split(". ")[0]  # without a place in C++
    if re.search(r"time(d )?out(?! connecting)", reason, re.IGNORECASE):
        what = (
            f"another process gave no sign for trainer.timeout={timeout:g} seconds; if it was at work, give more with "
            f"trainer.timeout={4 * timeout:g}"
        )
    else:
        what = "another process is gone"
    return f"process {ranks.rank} of {ranks.world_size}: {what} ({reason}). {how_to_continue(folder)}"


def how_to_continue(folder: Path | None) -> str:
    """The sentence that names the last checkpoint of the run in `folder`, and the word that continues from it."""
    checkpoint = None if folder is None else CheckpointStore(folder / "checkpoints").latest()
    if checkpoint is None:
        return "There is no checkpoint yet; run the same command again."
    return (
        f"The last checkpoint is {checkpoint}; run the same command with resume=auto to continue. With other settings, "
        f"such as a lower optimizer.learning_rate, it goes on with resume={folder}."
    )


def _is_of_transport(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or LOSS.search(str(error)) is None:
        return False
    return isinstance(error, dist.DistError) or TRANSPORT.search(str(error)) is not None
