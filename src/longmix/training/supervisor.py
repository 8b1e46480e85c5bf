"""What happens between two steps, in one place and one order: measure, validate, save, obey signals."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from longmix.checkpoints import Checkpoint, CheckpointStore
from longmix.checkpoints.processes import Processes
from longmix.checkpoints.saver import Saver
from longmix.config import tokens_per_step
from longmix.data.datamodule import TokenData
from longmix.errors import Interrupted
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.mixers.measures import figures
from longmix.reporting.metrics import Metrics
from longmix.training import parallel, random_state
from longmix.training.hardware import peak_flops, peak_memory_bytes, reset_peak_memory
from longmix.training.loggers import MetricLog
from longmix.training.module import TrainingModule
from longmix.training.progress import ProgressDisplay
from longmix.training.signals import SignalWatch
from longmix.training.summary import training_flops_per_token


@dataclass
class RunState:
    """What outlives a process besides the module: figures that a resumed run continues.

    Attributes:
        training_seconds: time spent in steps, over all processes of the run's history.
        peak_memory_bytes: the most that any process held while it trained; see `hardware.peak_memory_bytes`.
        validation: the last validation's figures, empty before the first.
        validation_by_position: its loss by position.
    """

    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    validation_by_position: list[dict[str, Any]] = field(default_factory=list)


class Supervisor(Callback):
    """Logs, validates, saves and stops between steps.

    Args:
        config: the resolved configuration; it is saved in every checkpoint.
        data: gives validation batches and the bytes of each token.
        store: where checkpoints go.
        metric_log: where metrics go.
        progress: what the terminal shows.
        identity: further entries of every checkpoint (tokenizer, data fingerprint, versions).
        resume_from: a checkpoint's state to continue from, without what is in `saved`.
        saved: the checkpoint's weights and optimizers' tensors.
    """

    def __init__(
        self,
        config: dict[str, Any],
        data: TokenData,
        store: CheckpointStore,
        metric_log: MetricLog,
        progress: ProgressDisplay,
        identity: dict[str, Any],
        resume_from: dict[str, Any] | None,
        saved: Checkpoint | None = None,
    ) -> None:
        self.config, self.data, self.store = config, data, store
        self.metric_log, self.progress, self.identity = metric_log, progress, identity
        self.resume_from, self.saved = resume_from, saved
        self.loop = config["loop"]
        self.signals = SignalWatch()
        self.state = RunState(**resume_from["run"]) if resume_from is not None else RunState()
        self.clock = time.perf_counter()
        self.seconds_since_log, self.steps_since_log = 0.0, 0
        self.saver: Saver | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers exist now: put everything back, then take the signals over from Lightning."""
        module = cast(TrainingModule, pl_module)
        processes = Processes(parallel.own_group(module.timeout))
        if self.resume_from is not None and self.saved is not None:
            module.restore(self.resume_from, self.saved, processes)
            random_state.restore(random_state.of_process(self.resume_from["random"], processes.rank))
            self.resume_from = self.saved = None
        wanted = self.loop["sharded_checkpoints"]
        self.saver = Saver(
            self.store,
            self.loop["keep_checkpoints"],
            processes,
            sharded=parallel.is_sharded(module.model) if wanted is None else wanted,
            asynchronous=self.loop["async_checkpoints"],
        )
        reset_peak_memory(module.device)
        # says what validation covers, before the bar takes the terminal
        self.data.evaluation_windows("validation", self.config["seq_len"], self.data.validation_tokens)
        self.signals.install()
        self.progress.open()
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The step is over; the clock stands still until the end of this method."""
        module = cast(TrainingModule, pl_module)
        elapsed = time.perf_counter() - self.clock
        self.seconds_since_log += elapsed
        self.steps_since_log += 1
        self.state.training_seconds += elapsed
        last = module.step == module.total_steps
        self.progress.advance(module.step)
        if self._due("log_every", module.step) or last:
            self._log(trainer, module)
        if self._due("validate_every", module.step) or last:
            self.validate(trainer, module)
        assert self.saver is not None
        stop = self.signals.anywhere(module.device, self.saver.failed)  # if a checkpoint failed, saving says so
        if self._due("checkpoint_every", module.step) or last or stop:
            self.save(module)
        if last or stop:
            self.saver.wait()
        if stop and not last:
            self._stop(trainer, module)
        self.clock = time.perf_counter()

    def _due(self, key: str, step: int) -> bool:
        every = self.loop[key]
        return every is not None and step % every == 0

    def _stop(self, trainer: Trainer, module: TrainingModule) -> None:
        received, hand_on = self.signals.received, self.signals.earlier_handler()
        assert received is not None and self.saver is not None
        self.close(trainer)
        raise Interrupted(
            f"{received.name} ended the run after step {module.step} of {module.total_steps}; {self.saver.last} "
            "holds its state. Run the same command with resume=auto to continue.",
            hand_on,
        )

    def close(self, trainer: Trainer) -> None:
        """Give the terminal and the signals back, however the run ended."""
        self.progress.close()
        self.signals.remove()

    def _log(self, trainer: Trainer, module: TrainingModule) -> None:
        record = module.record
        statistics = self._statistics(module)
        statistics.update(record.token_losses, record.batch["targets"], record.batch["document_ids"])
        statistics.reduce()
        loss = record.loss.item()
        measured = {f"train/{name}": measure for name, measure in record.losses.items()}
        measured |= {f"mixer/{name}": measure for name, measure in record.metrics.items()}
        metrics: Metrics = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),
            "train/bits_per_byte": statistics.summary()["bits_per_byte"],
            "train/learning_rate": module.learning_rate(),
            "train/gradient_norm": record.gradient_norm.item(),
            "train/tokens": module.step * tokens_per_step(self.config),
            "train/steps_skipped": module.steps_skipped,
            **_positions("train", statistics),
            **figures(measured, module.sum_over_processes),
            **self._throughput(trainer, module),
        }
        if trainer.is_global_zero:
            self.metric_log.write(module.step, metrics)
            self.progress.show(module.step, metrics)

    def _throughput(self, trainer: Trainer, module: TrainingModule) -> Metrics:
        rate = self.steps_since_log * tokens_per_step(self.config) / max(self.seconds_since_log, 1e-9)
        self.seconds_since_log, self.steps_since_log = 0.0, 0
        flops = training_flops_per_token(module.model, self.config["seq_len"]) * rate
        peak_memory = parallel.largest(peak_memory_bytes(module.device), module.device)
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

    def _statistics(self, module: TrainingModule) -> LossStatistics:
        token_bytes = torch.as_tensor(self.data.token_bytes)
        return LossStatistics(token_bytes, self.config["seq_len"], module.device)

    def validate(self, trainer: Trainer, module: TrainingModule) -> None:
        """Loss on the validation windows; a signal ends it early and leaves the last figures as they were."""
        groups = trainer.world_size // module.slices
        batches = self.data.evaluation_loader(
            "validation",
            self.config["seq_len"],
            module.micro_batch_size or max(1, self.config["batch_size"] // groups),
            self.data.validation_tokens,
            rank=trainer.global_rank // module.slices,
            world_size=groups,
        )
        statistics = evaluate_loss(
            module.model,
            batches,
            self._statistics(module),
            device=module.device,
            precision=trainer.precision_plugin.forward_context,
            after_batch=lambda: self.signals.received is None or trainer.world_size > 1,
            run=module.run,
            own=module.own,
        )
        if self.signals.received is not None and trainer.world_size == 1:
            return
        statistics.reduce()
        self.state.validation = {**statistics.summary(), "step": module.step}
        self.state.validation_by_position = statistics.by_position()
        if not trainer.is_global_zero:
            return
        names = ("loss", "perplexity", "bits_per_byte")
        metrics = {f"validation/{name}": self.state.validation[name] for name in names}
        self.metric_log.write(module.step, metrics | _positions("validation", statistics))
        self.progress.message(
            f"step {module.step}/{module.total_steps}  validation loss {metrics['validation/loss']:.4f}  "
            f"{metrics['validation/bits_per_byte']:.4f} bits/byte"
        )

    def save(self, module: TrainingModule) -> None:
        """One checkpoint, then old ones go; all processes must call it."""
        assert self.saver is not None
        self.saver.wait()
        state = {
            **module.capture(),
            "config": self.config,
            "random": self.saver.processes.each(random_state.capture),
            "run": vars(self.state),
            **self.identity,
        }
        validation = self.state.validation if self.state.validation.get("step") == module.step else {}
        self.saver.save(state, {"tokens": module.step * tokens_per_step(self.config), "validation": validation})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that fails leaves the checkpoint that is being written; one that is interrupted twice does not wait."""
        if self.saver is not None and isinstance(exception, Exception):
            with contextlib.suppress(Exception):  # what ended the run is what its user should hear of
                self.saver.wait()


def _positions(split: str, statistics: LossStatistics) -> Metrics:
    return {f"{split}/loss_by_position/{row['start']}-{row['end']}": row["loss"] for row in statistics.by_position()}
