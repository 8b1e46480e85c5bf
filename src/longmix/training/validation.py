"""The loss on validation windows during training, over all processes."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from longmix.config import StagePart
from longmix.data.training_data import TrainingData
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.training.module import TrainingModule


def empty_statistics(data: TrainingData, part: StagePart, module: TrainingModule) -> LossStatistics:
    """Statistics of windows of a stage's length, before any."""
    return LossStatistics(torch.as_tensor(data.token_bytes), part.config.seq_len, module.device)


def validated(
    data: TrainingData, part: StagePart, trainer: Trainer, module: TrainingModule, goes_on: Callable[[], bool]
) -> LossStatistics | None:
    """The loss on the validation windows of a stage; all processes must call it.

    Args:
        data: the stage's.
        part: the stage.
        trainer: knows the processes.
        module: has the model.
        goes_on: asked after each batch, in all processes at once.

    Returns:
        The statistics of all processes, or None if `goes_on` ended it.
    """
    stopped = False

    def after_batch() -> bool:
        nonlocal stopped
        stopped = not goes_on()
        return not stopped

    groups = trainer.world_size // module.slices
    batches = data.evaluation_loader(
        "validation",
        part.config.seq_len,
        part.micro_batch_size or max(1, part.config.batch_size // groups),
        data.validation_tokens,
        rank=trainer.global_rank // module.slices,
        world_size=groups,
    )
    statistics = evaluate_loss(
        module.model,
        batches,
        empty_statistics(data, part, module),
        device=module.device,
        precision=trainer.precision_plugin.forward_context,
        after_batch=after_batch,
        run=module.run,
        own=module.own,
    )
    if stopped:
        return None
    statistics.reduce()
    return statistics
