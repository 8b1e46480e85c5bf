"""The machine: its peak arithmetic, the memory in use, and the trainer settings."""

import contextlib
import importlib.util
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from longmix.accelerators import by_driver_name
from longmix.distributed.ranks import MOST_ON_A_MACHINE, own_ranks
from longmix.errors import ConfigError
from longmix.machine_memory import give_back_freed_memory
from longmix.wording import counted


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak floating-point operations per second, or None when it is not known: never a guess."""
    if device.type != "cuda" or not precision.startswith("bf16"):
        return None
    accelerator = by_driver_name(torch.cuda.get_device_name(device))
    return None if accelerator is None else accelerator.bf16_flops


def reset_peak_memory(device: torch.device) -> None:
    """Begin to watch the peak anew, for one run of a sweep."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        give_back_freed_memory()
        with contextlib.suppress(OSError):  # where Linux does not let us, the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held since `reset_peak_memory`: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class TrainerSettings:
    """Where and how the steps run; none of it changes what is computed, but for rounding.

    Attributes:
        accelerator: "auto" takes a CUDA device if there is one.
        devices: how many devices on this machine; None takes as many as torchrun or srun started processes for, else
            one, or every GPU for a strategy of several processes.
        num_nodes: how many machines; torchrun and srun say it themselves.
        strategy: "single", "ddp" or "fsdp".
        context_parallel: how many of the processes share each row, a slice for each (`longmix.distributed.slices`);
            None for all of them.
        precision: "auto" is bf16-mixed on a GPU and 32-true on a CPU, where bf16 is emulated.
        compile: torch.compile each block; None does so on a GPU.
        micro_batch_size: windows of one forward and backward pass; None takes a process's whole share of `batch_size`.
        num_threads: CPU threads; None leaves torch's choice.
        timeout: seconds that a process waits for another before the run ends.

    Raises:
        ConfigError: no GPU though one is asked for, a count below 1, or not as many processes as were started.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | None = None
    num_nodes: int = 1
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    context_parallel: int | None = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    compile: bool | None = None
    micro_batch_size: int | None = None
    num_threads: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for key in ("devices", "num_nodes", "context_parallel", "micro_batch_size", "num_threads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"trainer.{key}={value} must be at least 1.")
        for key in ("devices", "num_threads"):
            value = getattr(self, key)
            if value is not None and value > MOST_ON_A_MACHINE:
                raise ConfigError(f"trainer.{key}={value} must be at most {MOST_ON_A_MACHINE:,} on one machine.")
        if self.timeout <= 0:
            raise ConfigError(f"trainer.timeout={self.timeout:g} must be seconds above 0.")
        self._check_ranks()
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ConfigError(
                "trainer.accelerator=gpu, but torch sees no CUDA device; use trainer=cpu or trainer=auto."
            )
        if self.on_gpu and self.compiles and importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "trainer.compile needs Triton on a GPU, which is not installed: pip install triton, or set "
                "trainer.compile=false."
            )
        if self.strategy == "single" and self.world_size > 1:
            raise ConfigError(
                f"trainer.strategy=single runs one process, but {self.world_size} are asked for; use trainer=ddp or "
                "trainer=fsdp."
            )
        if self.world_size % self.slices:
            raise ConfigError(
                f"trainer.context_parallel={self.context_parallel} does not divide the {self.world_size} processes; "
                "give trainer.devices, or trainer.context_parallel=null for all."
            )
        if self.on_gpu and self.devices is not None and self.devices > torch.cuda.device_count():
            raise ConfigError(
                f"trainer.devices={self.devices}, but torch sees {torch.cuda.device_count()} CUDA devices."
            )

    def _check_ranks(self) -> None:
        ranks = own_ranks()
        if ranks is None:
            return
        if self.strategy == "single" and ranks.world_size > 1:
            raise ConfigError(
                f"{ranks.world_size} processes were started, and trainer.strategy=single runs one; use trainer=ddp, "
                "trainer=fsdp or trainer=context_parallel."
            )
        if self.devices is not None and ranks.world_size != self.world_size:
            raise ConfigError(
                f"{ranks.world_size} processes were started, but trainer.devices={self.devices} and "
                f"trainer.num_nodes={self.num_nodes} ask for {self.world_size}; leave them out, or start as many."
            )

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that does not divide over the processes, those that share rows as one, and micro-batches.

        Raises:
            ConfigError: naming the keys.
        """
        apart = self.world_size // self.slices
        share, rest = divmod(batch_size, apart)
        if rest or not share:
            together = "" if self.slices == 1 else f" groups of {self.slices}"
            raise ConfigError(f"batch_size={batch_size} does not divide over {apart}{together} processes.")
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            raise ConfigError(
                f"trainer.micro_batch_size={self.micro_batch_size} does not divide the "
                f"{counted(share, 'window')} that each of "
                f"{counted(apart, 'process', 'processes')} has of batch_size={batch_size}."
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the run uses CUDA."""
        return self.accelerator == "gpu" or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def compiles(self) -> bool:
        """`compile` with None decided."""
        return self.on_gpu if self.compile is None else self.compile

    @property
    def devices_here(self) -> int:
        """Processes on this machine."""
        if self.devices is not None:
            return self.devices
        ranks = own_ranks()
        if ranks is not None:
            return ranks.local_world_size
        return max(1, torch.cuda.device_count()) if self.on_gpu and self.strategy != "single" else 1

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        ranks = own_ranks()
        if self.devices is None and ranks is not None:
            return ranks.world_size
        return self.devices_here * self.num_nodes

    @property
    def slices(self) -> int:
        """Processes that share each row."""
        return self.world_size if self.context_parallel is None else self.context_parallel

    @property
    def precision_in_use(self) -> Literal["32-true", "bf16-mixed", "bf16-true"]:
        """`precision` with "auto" decided."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self.on_gpu else "32-true"
