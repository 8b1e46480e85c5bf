"""What happens between two steps, in one place and one order: measure, validate, save, obey signals."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from longmix.checkpoints import CheckpointStore
from longmix.config import tokens_per_step
from longmix.data.datamodule import TokenData
from longmix.errors import Interrupted
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.reporting.metrics import Metrics
from longmix.training import random_state
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
        peak_memory_bytes: the most that a process held while it trained; see `hardware.peak_memory_bytes`.
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
        resume_from: a checkpoint's state to continue from.
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
    ) -> None:
        self.config, self.data, self.store = config, data, store
        self.metric_log, self.progress, self.identity = metric_log, progress, identity
        self.resume_from = resume_from
        self.loop = config["loop"]
        self.signals = SignalWatch()
        self.state = RunState(**resume_from["run"]) if resume_from is not None else RunState()
        self.clock = time.perf_counter()
        self.seconds_since_log, self.steps_since_log = 0.0, 0
        self.last_checkpoint: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers exist now: put everything back, then take the signals over from Lightning."""
        module = cast(TrainingModule, pl_module)
        if self.resume_from is not None:
            module.restore(self.resume_from)
            random_state.restore(self.resume_from["random"])
            self.resume_from = None
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
        stop = self.signals.anywhere(module.device)
        if self._due("checkpoint_every", module.step) or last or stop:
            self.save(trainer, module)
        if stop and not last:
            self._stop(trainer, module)
        self.clock = time.perf_counter()

    def _due(self, key: str, step: int) -> bool:
        every = self.loop[key]
        return every is not None and step % every == 0

    def _stop(self, trainer: Trainer, module: TrainingModule) -> None:
        received = self.signals.received
        self.close(trainer)
        raise Interrupted(
            f"{received.name if received else 'a signal on another process'} ended the run after step {module.step} of "
            f"{module.total_steps}; {self.last_checkpoint} holds its state. Run the same command with resume=auto to "
            "continue."
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
        metrics: Metrics = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),
            "train/bits_per_byte": statistics.summary()["bits_per_byte"],
            "train/learning_rate": module.learning_rate(),
            "train/gradient_norm": record.gradient_norm.item(),
            "train/tokens": module.step * tokens_per_step(self.config),
            "train/steps_skipped": module.steps_skipped,
            **_positions("train", statistics),
            **{f"train/{name}": value.item() for name, value in record.losses.items()},
            **{f"mixer/{name}": value.item() for name, value in record.metrics.items()},
            **self._throughput(trainer, module),
        }
        if trainer.is_global_zero:
            self.metric_log.write(module.step, metrics)
            self.progress.show(module.step, metrics)

    def _throughput(self, trainer: Trainer, module: TrainingModule) -> Metrics:
        rate = self.steps_since_log * tokens_per_step(self.config) / max(self.seconds_since_log, 1e-9)
        self.seconds_since_log, self.steps_since_log = 0.0, 0
        flops = training_flops_per_token(module.model, self.config["seq_len"]) * rate
        peak_memory = peak_memory_bytes(module.device)
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
        per_process = module.micro_batch_size or max(1, self.config["batch_size"] // trainer.world_size)
        batches = self.data.evaluation_loader(
            "validation",
            self.config["seq_len"],
            per_process,
            self.data.validation_tokens,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        statistics = evaluate_loss(
            module.model,
            batches,
            self._statistics(module),
            device=module.device,
            precision=trainer.precision_plugin.forward_context,
            after_batch=lambda: self.signals.received is None or trainer.world_size > 1,
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

    def save(self, trainer: Trainer, module: TrainingModule) -> None:
        """One checkpoint, then old ones go."""
        state = {
            **module.capture(),
            "config": self.config,
            "random": random_state.capture(),
            "run": vars(self.state),
            **self.identity,
        }
        if trainer.is_global_zero:
            validation = self.state.validation if self.state.validation.get("step") == module.step else {}
            tokens = module.step * tokens_per_step(self.config)
            self.last_checkpoint = self.store.save(state, {"tokens": tokens, "validation": validation})
            self.store.prune(self.loop["keep_checkpoints"])
        trainer.strategy.barrier()


def _positions(split: str, statistics: LossStatistics) -> Metrics:
    return {f"{split}/loss_by_position/{row['start']}-{row['end']}": row["loss"] for row in statistics.by_position()}
