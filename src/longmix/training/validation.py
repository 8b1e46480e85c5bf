"""The loss on validation windows during training, over all processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer

from longmix.config import Course, StagePart
from longmix.data.training_data import TrainingData
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.metrics import Metrics
from longmix.training.module import TrainingModule
from longmix.training.run_state import FINAL
from longmix.training.summary import QUALITIES, quality_of


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


@dataclass(frozen=True)
class Validation:
    """The losses on validation windows after a step, of all processes.

    Attributes:
        statistics: of the stage's windows.
        averaged: the same with the averaged weights, where there are any.
        final: after a stage, of windows of the last stage's length, which tell all stages' ends apart.
    """

    statistics: LossStatistics
    averaged: LossStatistics | None
    final: LossStatistics | None

    def summary(self, step: int) -> dict[str, float]:
        """What a checkpoint and the run's summary hold of it."""
        averaged = {} if self.averaged is None else self.averaged.summary()
        names = ("loss", *QUALITIES)
        of_average = {f"ema_{name}": value for name, value in averaged.items() if name in names}
        return {**self.statistics.summary(), **of_average, "step": step}

    def metrics(self) -> Metrics:
        """What the log has of it."""
        parts = {"validation": self.statistics, "validation_ema": self.averaged, FINAL: self.final}
        summaries = {split: part.summary() for split, part in parts.items() if part is not None}
        names = ("loss", "perplexity", quality_of(summaries["validation"])[0])
        metrics = {f"{split}/{name}": found[name] for split, found in summaries.items() for name in names}
        return metrics | positions("validation", self.statistics)

    def line(self, course: Course) -> str:
        """What the terminal shows of it."""
        summary = self.statistics.summary()
        quality, value = quality_of(summary)
        text = f"validation loss {summary['loss']:.4f}  {value:.4f} {QUALITIES[quality]}"
        if self.averaged is not None:
            text += f"; with averaged weights {self.averaged.summary()['loss']:.4f}"
        if self.final is not None:
            text += f"; at {course.parts[-1].config.seq_len:,} tokens {self.final.summary()['loss']:.4f}"
        return text


def validate_all(
    course: Course, module: TrainingModule, measured: Callable[[StagePart], LossStatistics | None]
) -> Validation | None:
    """Measure all losses that are due after the module's last step; None if one was not completed.

    Args:
        course: of the run.
        module: has the model.
        measured: the loss on the windows of a stage, or None if a signal ended it; all processes call it.
    """
    part, last = course.taken(module.step), course.parts[-1]
    statistics = measured(part)
    if statistics is None:
        return None
    averaged = final = None
    if module.average is not None:
        with module.average.in_place(module.model):
            averaged = measured(part)
        if averaged is None:
            return None
    if course.ends_stage(module.step):
        final = statistics if part is last else measured(last)
        if final is None:
            return None
    return Validation(statistics, averaged, final)


def positions(split: str, statistics: LossStatistics) -> Metrics:
    """The loss by position, as the log has it."""
    return {f"{split}/loss_by_position/{row['start']}-{row['end']}": row["loss"] for row in statistics.by_position()}
