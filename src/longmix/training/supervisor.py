"""What happens between two steps, in one place and one order: measure, validate, save, obey signals."""

import contextlib
import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from longmix.checkpoints import CheckpointStore
from longmix.checkpoints.contents import rebuilding
from longmix.checkpoints.saver import Saver
from longmix.checkpoints.store import SKIPS_IN_A_ROW
from longmix.checkpoints.tensors import TRAINED
from longmix.checkpoints.verify import read_info
from longmix.config import STAGE, StagePart, TrainConfig, course_of, plain
from longmix.data.staged import StagedData
from longmix.data.training_data import TrainingData
from longmix.distributed.agreement import Processes
from longmix.distributed.signals import process_watch
from longmix.errors import Interrupted, NonFiniteError
from longmix.evaluation.statistics import LossStatistics
from longmix.metrics import LAYERS_LOSS, Metrics
from longmix.mixers.parts.metrics import figures
from longmix.progress import ProgressDisplay
from longmix.training import random_state, strategies
from longmix.training.connection import how_to_continue
from longmix.training.diagnosis import nonfinite_tensor
from longmix.training.ending import Ending
from longmix.training.hardware import peak_flops, peak_memory_bytes, reset_peak_memory
from longmix.training.loggers import MetricLog
from longmix.training.module import TrainingModule
from longmix.training.run_state import BY_POSITION, FINAL, STAGE_RESULTS, Provenance, RunState, SavedRun
from longmix.training.space import checkpoint_bytes, warn_of_space
from longmix.training.stages import draws, enter
from longmix.training.summary import quality_of, training_flops_per_token
from longmix.training.validation import empty_statistics, positions, validate_all, validated

if TYPE_CHECKING:
    from longmix.training.tasks_during import TasksDuring


class Supervisor(Callback):
    """Logs, validates, saves and stops between steps.

    Args:
        config: the run's; it is saved in every checkpoint.
        data: gives validation batches and the bytes of each token.
        store: where checkpoints go.
        metric_log: where metrics go.
        progress: what the terminal shows.
        provenance: what every checkpoint says of data and software.
        saved: the run to continue; None for a fresh one.
        tasks: what validations run besides; None for nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        store: CheckpointStore,
        metric_log: MetricLog,
        progress: ProgressDisplay,
        provenance: Provenance,
        saved: SavedRun | None,
        tasks: "TasksDuring | None" = None,
    ) -> None:
        self.config, self.data, self.store = config, data, store
        self.metric_log, self.progress, self.provenance = metric_log, progress, provenance
        self.saved, self.tasks = saved, tasks
        self.loop = config.loop
        self.course = course_of(config)
        self.ending = Ending(self.course.total_steps, config.loop.stop_at_recall)
        self.part = self.course.taken(0 if saved is None else saved.step)
        self.signals = process_watch()
        self.state = RunState() if saved is None else dataclasses.replace(saved.run)
        if saved is not None and not self.is_validated(saved.step):
            info = read_info(saved.checkpoint)  # a validation may have followed
            if info.get("validation", {}).get("step") == saved.step and BY_POSITION in info:
                self.state.validation, self.state.validation_by_position = info["validation"], info[BY_POSITION]
                self.state.stages = info.get(STAGE_RESULTS, self.state.stages)
        self.clock = time.perf_counter()
        self.seconds_since_log, self.tokens_since_log = 0.0, 0
        self.saver: Saver | None = None
        self.first_step = 0
        self.save_is_due = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate a run that took all its steps and lacks the last validation; there is nothing left to train."""
        module = cast(TrainingModule, pl_module)
        if self.saved is not None and self.saved.step == module.total_steps:
            self._begin(trainer, module)

    def has_ended(self, step: int) -> bool:
        """Whether nothing is left to do after `step` steps: they are all, or enough, and were validated."""
        return self.is_validated(step) and self.ending.is_at(step, self.state.validation)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state. The optimizers exist by now, and nothing draws random numbers before the first step."""
        self._begin(trainer, cast(TrainingModule, pl_module))
        self.clock = time.perf_counter()

    def _begin(self, trainer: Trainer, module: TrainingModule) -> None:
        """Restore the state, then repeat a validation that a signal cut short."""
        processes = Processes(strategies.own_group(module.timeout))
        module.how_to_continue = lambda: self._how_to_continue(module)
        module.begin_rows(self.part.config.batch_size)
        if self.saved is not None:
            module.restore(self.saved, processes)
            with rebuilding(self.saved.checkpoint):
                random_state.restore(random_state.of_process(self.saved.random, processes.rank))
                if processes.rank >= self.saved.processes and draws(module.model, self.course):
                    random_state.diverge(self.config.seed, processes.rank, self.saved.step)
            self.saved = None
            self.first_step = module.step
        if self.course.staged:
            enter(self.part, module, self.config)
        wanted = self.loop.sharded_checkpoints
        self.saver = Saver(
            self.store,
            self.loop.keep_checkpoints,
            processes,
            sharded=strategies.is_sharded(module.model) if wanted is None else wanted,
            asynchronous=self.loop.async_checkpoints,
        )
        reset_peak_memory(module.device)
        # says what validation covers, before the bar takes the terminal
        for part in self.course.parts:
            self._data(part).evaluation_windows("validation", part.config.seq_len, self.data.validation_tokens)
        if self.signals.anywhere(module.device):
            raise Interrupted(self.signals.before_the_first_step(), self.signals.earlier_handler())
        self.signals.worth_saving = True  # and all processes have come this far
        self.progress.open()
        last = module.step == module.total_steps
        due = last or _due(self.loop.validate_every, module.step) or self.course.ends_stage(module.step)
        if (due if module.step else self.config.convert) and not self.is_validated(module.step):
            self._validate_and_keep(trainer, module)

    def _how_to_continue(self, module: TrainingModule) -> str:
        """The advice after a failed step. If it is the first after a checkpoint, the cure is an older checkpoint."""
        begun = self.store.path(self.first_step)
        older = [path for path in self.store.all() if path.name < begun.name]
        if module.step - module.skips_in_a_row > self.first_step or not older:
            return how_to_continue(self.store.folder.parent)
        which = "No step was taken since" if module.skips_in_a_row else "It is the first step from"
        return (
            f"{which} {begun}, from which nothing goes on; go back with resume={older[-1]} "
            f"name={self.config.name} and a lower optimizer.learning_rate."
        )

    def is_validated(self, step: int) -> bool:
        """Whether the last validation is of `step`."""
        return self.state.validation.get("step") == step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin the stage of the next step."""
        module = cast(TrainingModule, pl_module)
        part = self.course.taking(module.step)
        if part is not self.part:
            enter(part, module, self.part.config)
            self.part = part
            module.begin_rows(part.config.batch_size)
        if self.course.staged and module.step in (self.first_step, part.start):
            self.progress.message(f"stage {part.number + 1} of {len(self.course.parts)}: {part}")

    def _data(self, part: StagePart) -> TrainingData:
        """The data of a stage."""
        return self.data.parts[part.number] if isinstance(self.data, StagedData) else self.data

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log, save, obey signals and validate after a step, in this order. The clock of the speed stands still.

        The state is saved before anything is shown, and before a last validation, which may take long.
        """
        module = cast(TrainingModule, pl_module)
        elapsed = time.perf_counter() - self.clock
        self.seconds_since_log += elapsed
        self.tokens_since_log += self.part.tokens_per_step
        self.state.training_seconds += elapsed
        if module.step == self.first_step + 1 and trainer.is_global_zero:
            self._warn_of_space(module)
        last = module.step == module.total_steps
        assert self.saver is not None
        if module.record.spike:
            self.state.spikes = [*self.state.spikes, module.step]
            self.progress.message(f"step {module.step} was left out: it gave {module.record.spike}.")
        # First the signals: all processes learn of one here, so that none enters a collective that another has left.
        # A failed checkpoint counts as one, since saving raises its error.
        stop = self.signals.anywhere(module.device, self.saver.failed)
        rate = self._rate()
        # The row is written before the checkpoint: a resumed run drops rows behind its checkpoint, but makes up none.
        ends_stage = self.course.ends_stage(module.step)
        logs = last or ends_stage or _due(self.loop.log_every, module.step)
        metrics = self._log(trainer, module) if logs else None
        validates = last or ends_stage or _due(self.loop.validate_every, module.step)
        self.save_is_due = self.save_is_due or ends_stage or _due(self.loop.checkpoint_every, module.step)
        saves = self.save_is_due and not module.skips_in_a_row  # a step left out changed no weight
        # Saved before the end by a signal, and before the last validation, so that neither can lose a step. Otherwise a
        # step that is validated is saved after it, and the checkpoint holds the validation.
        if last or stop or (saves and not validates):
            self.save(module)
        if self.progress.is_live:
            self.progress.advance(module.step, module.record.loss.item(), rate)
        if metrics is not None and trainer.is_global_zero:
            self.progress.show(module.step, metrics)
        if stop:  # only now: the state is on its way to the disk, and the last loss is shown
            self._stop(module)
        if validates:
            self._validate_and_keep(trainer, module, save=saves and not last)
        self.clock = time.perf_counter()

    def _warn_of_space(self, module: TrainingModule) -> None:
        """Warn after the first step, because optimizers have no state before it."""
        every = self.loop.checkpoint_every or module.total_steps
        to_write = -(-module.total_steps // every) - self.first_step // every
        warn_of_space(self.store, checkpoint_bytes(module.capture()), self.loop.keep_checkpoints, to_write)

    def _validate_and_keep(self, trainer: Trainer, module: TrainingModule, save: bool = False) -> None:
        """Validate; a signal ends that, and the run. A step that is saved already gets the result into its checkpoint.

        Args:
            save: save the step after its validation.

        Raises:
            NonFiniteError: the last validation gave no number.
        """
        assert self.saver is not None
        done = self.validate(trainer, module)
        ended = done and self.has_ended(module.step)
        if save or not (self._is_saved(module.step) or (done and not ended)):
            self.save(module)
        if not done:
            self._stop(module)
        if ended:
            self.saver.wait()
            self._check_last_validation(module)
            trainer.should_stop = True
        if not save and self._is_saved(module.step):
            self._add_to_checkpoint(module)

    def _is_saved(self, step: int) -> bool:
        return self.saver is not None and step in (self.first_step, self.saver.saved_step)

    def _check_last_validation(self, module: TrainingModule) -> None:
        loss = self.state.validation["loss"]
        if math.isfinite(loss):
            return
        raise NonFiniteError(
            f"the validation after the last step, {module.step}, gave a loss of {loss:.4g}, although all weights are "
            "finite: what the model computes of them is not. Begin a new run with a lower optimizer.learning_rate, or "
            "from an older checkpoint."
        )

    def _add_to_checkpoint(self, module: TrainingModule) -> None:
        assert self.saver is not None
        self.saver.wait()
        checkpoint = self.store.path(module.step)
        figures: dict[str, Any] = {
            "validation": self.state.validation,
            BY_POSITION: self.state.validation_by_position,
        }
        if self.state.stages:
            figures[STAGE_RESULTS] = self.state.stages
        self.saver.processes.first(lambda: self.store.add_info(checkpoint, figures) if checkpoint.is_dir() else None)

    def _stop(self, module: TrainingModule) -> None:
        received = self.signals.received
        assert received is not None and self.saver is not None
        self.saver.wait()
        self.progress.close()
        last = module.step == module.total_steps
        when = ", before its last validation was done" if last else f" after step {module.step} of {module.total_steps}"
        raise Interrupted(
            f"{received.name} ended the run{when}; {self.store.path(module.step)} "
            "holds its state. Run the same command with resume=auto to continue.",
            self.signals.earlier_handler(),
        )

    def close(self) -> None:
        """Remove the bar from the terminal, whatever ended the run."""
        self.progress.close()

    def _log(self, trainer: Trainer, module: TrainingModule) -> Metrics:
        record = module.record
        metrics: Metrics = {
            **self._losses(module),
            "train/learning_rate": module.learning_rate(),
            "train/gradient_norm": record.gradient_norm.item(),
            "train/tokens": self.course.tokens(module.step),
            **({"train/stage": self.part.number + 1} if self.course.staged else {}),
            "train/steps_skipped": module.steps_skipped,
            **({} if module.spikes is None else {"train/spikes": len(self.state.spikes)}),
            **figures(record.measured(), module.sum_over_processes),
            **self._throughput(trainer, module),
        }
        if trainer.is_global_zero:
            self.metric_log.write(module.step, metrics)
        return metrics

    def _losses(self, module: TrainingModule) -> Metrics:
        """The step's loss on the text, as numbers and by position; or that of its layers, which know no text."""
        record = module.record
        if record.layer_losses:
            return {LAYERS_LOSS: record.loss.item()}
        statistics = empty_statistics(self._data(self.part), self.part, module)
        statistics.update(record.token_losses, record.batch["targets"], record.batch["document_ids"], record.hits)
        statistics.reduce()
        loss, quality = record.loss.item(), quality_of(statistics.summary())
        return {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),
            f"train/{quality[0]}": quality[1],
            **positions("train", statistics),
        }

    def _rate(self) -> float:
        """Tokens per second since the last row of the log."""
        return self.tokens_since_log / max(self.seconds_since_log, 1e-9)

    def _throughput(self, trainer: Trainer, module: TrainingModule) -> Metrics:
        rate = self._rate()
        self.seconds_since_log, self.tokens_since_log = 0.0, 0
        flops = training_flops_per_token(module.model, self.part.config.seq_len) * rate
        peak_memory = strategies.largest(peak_memory_bytes(module.device), module.device)
        self.state.peak_memory_bytes = max(self.state.peak_memory_bytes, peak_memory)
        metrics = {
            "throughput/tokens_per_second": rate,
            "throughput/model_tflops_per_second": flops / 1e12,
            "memory/peak_gib": peak_memory / 2**30,
        }
        peak = peak_flops(module.device, trainer.precision)
        if peak is not None:
            metrics["throughput/mfu"] = flops / (peak * trainer.world_size)
        return metrics

    def validate(self, trainer: Trainer, module: TrainingModule) -> bool:
        """Measure the loss on validation windows; a signal to any process ends it in all, and keeps the last result.

        It is measured with averaged weights too, where there are any, and after a stage on windows of the last stage's
        length, which tell all stages' ends apart.

        Returns:
            Whether it was completed.
        """

        def measured(part: StagePart) -> LossStatistics | None:
            return validated(self._data(part), part, trainer, module, lambda: not self.signals.anywhere(module.device))

        found = validate_all(self.course, module, measured)
        if found is None:
            return False
        summary = found.summary(module.step)
        tasks = self._tasks(trainer, module, summary)
        if tasks is None:
            return False
        self.state.validation = summary
        self.state.validation_by_position = found.statistics.by_position()
        if not module.step:  # it came before the first step, of what a transfer left
            self.state.transferred = self.state.validation
        if found.final is not None:
            self.state.stages = {
                **self.state.stages,
                str(self.part.number): {"validation": self.state.validation, FINAL: found.final.summary()},
            }
        if trainer.is_global_zero:
            self.metric_log.write(module.step, found.metrics() | tasks)
            self.progress.message(f"step {module.step}/{module.total_steps}  {found.line(self.course)}")
            if module.step < module.total_steps and self.has_ended(module.step):
                self.progress.message(f"recall is at least {self.loop.stop_at_recall}: the run ends here.")
        return True

    def _tasks(self, trainer: Trainer, module: TrainingModule, validation: Metrics) -> Metrics | None:
        """The numbers of the tasks that are due with a validation; None if a signal ended them."""
        last = module.step if self.ending.is_at(module.step, validation) else module.total_steps
        if self.tasks is None or not self.tasks.are_due(module.step, last):
            return {}
        assert self.saver is not None
        return self.tasks.measured(
            module.model,
            self.part,
            self._data(self.part),
            *(module.step, module.device, str(trainer.precision)),
            processes=self.saver.processes,
            goes_on=lambda: not self.signals.anywhere(module.device),
        )

    def save(self, module: TrainingModule) -> None:
        """Save a checkpoint, then delete old ones; all processes must call it.

        Raises:
            NonFiniteError: the state is not finite. It is not saved, as nothing could continue from it.
            StorageError: it cannot be written.
        """
        assert self.saver is not None
        self.saver.wait()
        self.save_is_due = False
        state = {
            **module.capture(),
            "config": plain(self.config) | self._stage(),
            "random": self.saver.processes.each(random_state.capture),
            "run": self.state.entries(),
            **vars(self.provenance),
        }
        place = nonfinite_tensor({key: state[key] for key in TRAINED}, self.saver.processes)
        if place is not None:
            raise NonFiniteError(
                f"after step {module.step}, {place} is not finite, and no checkpoint was written. "
                f"{how_to_continue(self.store.folder.parent)} A lower optimizer.learning_rate may prevent it."
            )
        validation = self.state.validation if self.is_validated(module.step) else {}
        info = {"tokens": self.course.tokens(module.step), "validation": validation, **self._stage()}
        skips = {SKIPS_IN_A_ROW: module.skips_in_a_row} if module.skips_in_a_row else {}
        self.saver.save(state, info | skips)

    def _stage(self) -> dict[str, int]:
        return {STAGE: self.part.number} if self.course.staged else {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the checkpoint that is being written, unless the run was interrupted twice."""
        if self.saver is not None and isinstance(exception, Exception):
            with contextlib.suppress(Exception):  # what ended the run is what its user should hear of
                self.saver.wait()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
