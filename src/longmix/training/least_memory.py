"""Refuses a run whose sizes cannot fit into the memory of this machine, before any of it is taken.

Linux promises more memory than there is, so that a batch of a million million windows is not refused when it is asked
for but fills the memory later. What is counted here is less than any run takes: `longmix plan` counts all of it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from longmix.checkpoints import open_checkpoint
from longmix.command_line.program import as_called
from longmix.config import TrainConfig
from longmix.errors import ConfigError
from longmix.evaluation.memory import free_bytes
from longmix.model.build import build_model
from longmix.training.distillation import LAYERS, TOKENS
from longmix.training.hardware import TrainerSettings
from longmix.training.kept_activations import kept_per_token
from longmix.wording import counted

GIB = 2**30


@dataclass(frozen=True)
class LeastMemory:
    """Bytes that the processes of this machine take at least, by what they are for.

    Attributes:
        weights: with gradients, where weights are trained, and those of a teacher.
        batch: tokens and targets of a step, int64.
        activations: what the backward pass needs of a micro-batch: at first what enters each block alone.
    """

    weights: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.batch + self.activations


def least_memory(config: TrainConfig, settings: TrainerSettings, vocab_size: int) -> LeastMemory:
    """The least that the processes of this machine take together.

    Args:
        config: of the run.
        settings: the trainer's.
        vocab_size: token ids, as many as are expected before the data are read.
    """
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    here, apart = settings.devices_here, settings.world_size // settings.slices
    width = 2 if settings.precision_in_use == "bf16-true" else 4
    total = model.parameter_counts()["total"]
    # of layers that learn apart, the mixers alone have gradients, and maybe not all of them
    trained = total if config.trainable == "all" and config.objective != LAYERS else 0
    shards = settings.world_size if settings.strategy == "fsdp" else 1
    rows = config.batch_size // apart
    length = config.seq_len // settings.slices
    layers = min(len(model.blocks), 2) if model.activation_offload and settings.on_gpu else len(model.blocks)
    if config.objective == LAYERS:  # each layer's are gone before the next one's are there
        layers = 1
    entering = layers * model.shape.d_model * (4 if settings.precision_in_use == "32-true" else 2)
    return LeastMemory(
        weights=here * width * (total + trained + _teacher(config)) // shards,
        batch=here * rows * length * 16,
        activations=here * (settings.micro_batch_size or rows) * length * entering,
    )


def _teacher(config: TrainConfig) -> int:
    """The number of a teacher's weights; 0 for a run without."""
    if config.objective == TOKENS or config.origin is None:
        return 0
    shapes = open_checkpoint(Path(config.origin.checkpoint)).shapes
    return sum(shape.numel() for name, shape in shapes.items() if name.startswith("model/"))


MOST_KEPT = 400
"""Times the input of a block that it may keep; where even that fits, nothing more needs to be known."""


def _closer(config: TrainConfig, settings: TrainerSettings, vocab_size: int, least: LeastMemory) -> LeastMemory:
    """The same with all that layers keep for the backward pass; a second of work, where it may make a difference."""
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    rows = settings.micro_batch_size or config.batch_size // (settings.world_size // settings.slices)
    tokens = settings.devices_here * rows * (config.seq_len // settings.slices)
    kept = tokens * kept_per_token(model, settings.precision_in_use)
    return dataclasses.replace(least, activations=max(least.activations, kept))


def check_memory(config: TrainConfig, settings: TrainerSettings, vocab_size: int) -> None:
    """Refuse a run that needs more memory than is free on this machine: on a CPU for all, on GPUs for its batches.

    Raises:
        ConfigError: with the numbers and the words to change.
    """
    least = least_memory(config, settings, vocab_size)
    free = free_bytes(torch.device("cpu"))
    needed = least.batch if settings.on_gpu else least.total
    whole = config.objective != LAYERS
    if whole and free is not None and not settings.on_gpu and needed <= free < needed + MOST_KEPT * least.activations:
        least = _closer(config, settings, vocab_size, least)
        needed = least.total
    if free is not None and needed > free:
        raise _refusal(config, settings, least, free)
    if settings.on_gpu and settings.world_size == 1:  # of several GPUs, each belongs to a process of its own
        memory = torch.cuda.get_device_properties(0).total_memory
        if least.total > memory:
            raise _refusal(config, settings, least, memory)


def _refusal(config: TrainConfig, settings: TrainerSettings, least: LeastMemory, free: int) -> ConfigError:
    windows = settings.micro_batch_size or config.batch_size // (settings.world_size // settings.slices)
    parts = {
        "weights and gradients": least.weights,
        f"the tokens of batch_size={config.batch_size}": least.batch,
        f"what {counted(windows, 'window')} of seq_len={config.seq_len} leave for the backward pass": least.activations,
    }
    largest = max(parts, key=lambda name: parts[name])
    return ConfigError(
        f"training needs at least {least.total / GIB:,.1f} GiB, and {free / GIB:,.1f} GiB are free: {largest} take "
        f"{parts[largest] / GIB:,.1f} GiB. {CURES[list(parts).index(largest)]}; "
        + as_called("python -m longmix.planning tells how much is needed.")
    )


CURES = (
    "Make the model or the vocabulary smaller, or divide it with trainer=fsdp",
    "Make batch_size or seq_len smaller",
    "Make trainer.micro_batch_size, batch_size or seq_len smaller",
)
"""What to change, by the largest part."""
