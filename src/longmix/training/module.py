"""The LightningModule: one call of `training_step` is one optimizer step.

A batch is this process's whole share of the step. The module walks through it in micro-batches itself (Lightning's
manual optimization), which keeps three promises that automatic accumulation does not: the gradient is the mean over all
valid tokens of the global batch, whatever their distribution over micro-batches and processes; a step is either taken
whole or not at all; and every moment Lightning can interrupt lies between two optimizer steps.
"""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed import ProcessGroup

from longmix.batch import Batch, each
from longmix.checkpoints.store import SKIPS_IN_A_ROW
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError, NonFiniteError, SpikeError
from longmix.evaluation.loss import run_whole
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.head import IGNORE_INDEX, SoftTargets
from longmix.recipe import recipe_of, set_recipe
from longmix.training import strategies
from longmix.training.adversarial import AttackedSteps
from longmix.training.averaging import WeightAverage
from longmix.training.carried import CARRIED, CarriedState, Rows, run_on
from longmix.training.diagnosis import first_nonfinite, nonfinite_tensor
from longmix.training.distillation import LAYERS, Distillation
from longmix.training.layerwise import LayerLessons
from longmix.training.optimizers import PEAK
from longmix.training.run_state import SavedRun
from longmix.training.saved_state import named_state, restore_state
from longmix.training.spikes import SPIKES, SpikeGuard
from longmix.training.step_record import Passes, StepRecord
from longmix.wording import counted

OptimizerBuilder = Callable[[dict[str, torch.nn.Parameter]], list[torch.optim.Optimizer]]


class TrainingModule(LightningModule):
    """A language model with its optimizers and its place in the run.

    Args:
        model: the model.
        build_optimizers: makes the optimizers from the trainable parameters by name.
        schedule: factor on the peak learning rates as a function of (step, total_steps).
        total_steps: optimizer steps of the whole run.
        micro_batch_size: rows of one forward and backward pass; None takes the whole share at once.
        gradient_clip: largest norm of the gradient; None never clips.
        skip_nonfinite: leave a step with a non-finite loss or gradient out and count it, instead of stopping.
        max_skips: the run stops when so many steps in a row are left out.
        slices: how many processes, of neighbouring ranks, share each row of their batch.
        timeout: seconds that they wait for each other.
        processes: all that train.
        carried: what each row goes on from, see `longmix.training.carried`; None lets each window begin anew.
        average: of the weights over the steps; None keeps none.
        z_loss: weight of the mean square of the logarithm of each target's normaliser, added to the loss; the model
            must measure normalisers.
        spikes: tells steps that are left out, or stop the run, for a loss or gradient norm that jumps; None tells none.
        attacks: a second pass of some steps, see `longmix.training.adversarial`; None for no such step.
        distillation: what is learned of a teacher; None trains on the text alone.
    """

    def __init__(
        self,
        model: LanguageModel,
        build_optimizers: OptimizerBuilder,
        schedule: Callable[[int, int], float],
        *,
        total_steps: int,
        micro_batch_size: int | None,
        gradient_clip: float | None,
        skip_nonfinite: bool,
        max_skips: int = 20,
        slices: int = 1,
        timeout: float = 600.0,
        processes: Processes | None = None,
        carried: CarriedState | None = None,
        average: WeightAverage | None = None,
        z_loss: float = 0.0,
        spikes: SpikeGuard | None = None,
        attacks: AttackedSteps | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.recipes = {name: recipe_of(weight) for name, weight in model.named_parameters()}
        self.build_optimizers = build_optimizers
        self.schedule = schedule
        self.total_steps = total_steps
        self.micro_batch_size = micro_batch_size
        self.gradient_clip = gradient_clip
        self.skip_nonfinite = skip_nonfinite
        self.max_skips = max_skips
        self.slices = slices
        self.timeout = timeout
        self.processes = processes or Processes()
        self.carried = carried
        self.average = average
        self.z_loss = z_loss
        self.spikes = spikes
        self.attacks = attacks
        self.distillation = distillation
        self.row_group: ProcessGroup | None = None
        self.steps_taken = 0
        self.steps_skipped = 0
        self.skips_in_a_row = 0
        self.how_to_continue: Callable[[], str] = str
        self.record: StepRecord

    def configure_model(self) -> None:
        """Divide the model if the strategy has a device mesh. Lightning calls this once the processes exist."""
        if self.slices > 1 and self.row_group is None:
            self.row_group = strategies.row_group(self.slices, self.timeout)
        if self.device_mesh is not None and not strategies.is_sharded(self.model):
            strategies.shard(self.model, self.device_mesh["data_parallel"], self._products())
        if self.carried is not None and self.carried.mesh is None and self._world_size() > 1:
            self.carried.mesh = strategies.mesh_of_rows(self.device, self.slices)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Build the optimizers. Lightning calls this after the model is on its device."""
        for name, weight in self.model.named_parameters():
            set_recipe(weight, self.recipes[name])  # sharding and moving replace parameters
        trainable = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if self.average is not None:
            self.average.begin(self.model)
        if self.distillation is not None:
            mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
            self.distillation.place(self.model, mesh, self._products())
        return self.build_optimizers(trainable)

    def _products(self) -> torch.dtype | None:
        """The dtype to which autocast rounds the factors of products; None if it rounds none."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None

    @property
    def step(self) -> int:
        """Batches consumed so far, taken or skipped: the position in the data and in the schedule."""
        return self.steps_taken + self.steps_skipped

    def learning_rate(self) -> float:
        """The rate of the first parameter group."""
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Forward and backward over the micro-batches, then one optimizer step or none."""
        self._set_learning_rates()
        self.record = self._accumulate(batch)
        self._clip(self.record)
        finite, self.record.spike = self._judge(self.record)
        taken = finite and not self.record.spike
        if taken:
            for optimizer in self.trainer.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
            self.steps_taken += 1
            self.skips_in_a_row = 0
        elif finite or self.skip_nonfinite:
            self._check_skips(finite)
            self.steps_skipped += 1
            self.skips_in_a_row += 1
        else:
            raise NonFiniteError(self._nonfinite_report(batch))
        if self.carried is not None:
            if finite:
                self.carried.keep(self.record.carried)
            else:
                self.carried.forget()
        finish_step(self.model, taken, self.sum_over_processes)
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _judge(self, record: StepRecord) -> tuple[bool, str]:
        """Whether a step is finite, and why it is a spike; "" if it is none. One synchronisation a step.

        Raises:
            SpikeError: it is a spike, which is to stop the run.
        """
        finite = torch.isfinite(record.loss) & torch.isfinite(record.gradient_norm)
        if self.spikes is None:
            return bool(finite), ""
        # each process may have rounded its norm in its own way: a spike in one is a spike in all
        spike = self.sum_over_processes(self.spikes.judge(record.loss, record.gradient_norm).float()) > 0
        verdict = int(torch.where(finite, spike.int(), 2))
        if verdict == 2:
            return False, ""
        reason = self.spikes.describe(record.loss, record.gradient_norm) if verdict == 1 else ""
        if reason and self.spikes.stops:
            raise SpikeError(
                f"step {self.step + 1} gave {reason}. The step was not taken. {self.how_to_continue()} "
                "loop.spike_action=skip leaves single steps of this kind out."
            )
        self.spikes.note(record.loss, record.gradient_norm)
        return True, reason

    def _set_learning_rates(self) -> None:
        factor = self.schedule(self.step, self.total_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group[PEAK] * factor

    def _accumulate(self, batch: Batch) -> StepRecord:
        micro_batches = split_batch(batch, self.micro_batch_size)
        if self.distillation is not None and self.distillation.objective == LAYERS:
            return self._learn_layers(batch, micro_batches, self.distillation)
        valid = self._valid_tokens(batch)
        share = 1.0 if self.distillation is None else self.distillation.hard_share
        passes = Passes(valid, len(micro_batches), self.z_loss, share)
        attacks = self.attacks if self.attacks is not None and self.attacks.are_due(self.step + 1) else None
        run, carried = self._run_carrying(micro_batches)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            watching: AbstractContextManager[list[Tensor]] = nullcontext([])
            if attacks is not None:
                watching = attacks.adversary.watching(micro_batch["tokens"])
            with self._gradient_sync(last and attacks is None), watching as zeros:
                self.manual_backward(passes.add(run(micro_batch)))
            if attacks is not None:
                gradients = [zero.grad if zero.grad is not None else torch.zeros_like(zero) for zero in zeros]
                attacking = attacks.adversary.attacking(gradients, micro_batch["document_ids"])
                with self._gradient_sync(last), attacking:
                    self.manual_backward(attacks.weight * passes.add_attacked(run(micro_batch)))
        total = self.sum_over_processes(passes.token_losses().sum()) / self._world_size()
        return passes.record(total / valid, self.own(batch), carried)

    def _learn_layers(self, batch: Batch, micro_batches: list[Batch], distillation: Distillation) -> StepRecord:
        teacher = distillation.model
        assert teacher is not None
        with self._gradient_sync(last=False):  # DDP would wait for gradients that the other weights never get
            lessons = LayerLessons(self.model, teacher, distillation.layers, self.row_group)
            learned = lessons.learn(micro_batches, self.manual_backward)
        if hasattr(self.trainer.model, "no_sync"):
            strategies.average_gradients(self.model.parameters())
        loss = torch.stack(list(learned.layers.values())).mean()
        return StepRecord(
            self.sum_over_processes(loss) / self._world_size(),
            torch.zeros_like(loss),
            loss.new_empty(0),
            self.own(batch),
            metrics=learned.metrics,
            losses=learned.losses,
            layer_losses=learned.layers,
        )

    def _run_carrying(self, batches: list[Batch]) -> tuple[Callable[[Batch], ModelOutput], list[Rows]]:
        """What runs these micro-batches, in their order, and a list that gets the state after each of them."""
        after: list[Rows] = []
        if self.carried is None:
            return self._run_taught, after
        states = iter(self.carried.before(batches))

        def run(batch: Batch) -> ModelOutput:
            output, ended = run_on(self.model, batch, next(states), self.row_group)
            after.append(ended)
            return output

        return run, after

    def begin_rows(self, batch_size: int) -> None:
        """Let rows carry nothing from what came before; from here on there are `batch_size` of them in a step.

        Losses and gradient norms of other rows are no measure of theirs, so that the window of spikes begins anew.
        """
        if self.carried is not None:
            self.carried.begin(batch_size)
        if self.spikes is not None:
            self.spikes.forget()

    def run(self, batch: Batch, soft: SoftTargets | None = None) -> ModelOutput:
        """Run the model, on this process's slice if rows are shared; token losses outside the slice are 0."""
        if self.row_group is not None:
            return strategies.run_slice(self.model, batch, self.row_group, soft=soft)
        return run_whole(self.model, batch, soft)

    def _run_taught(self, batch: Batch) -> ModelOutput:
        """Run the model with the teacher's distributions, where it learns from them."""
        soft = None if self.distillation is None else self.distillation.soft_targets(batch, self.row_group)
        return self.run(batch, soft)

    def own(self, batch: Batch) -> Batch:
        """The batch with only those targets that this process counts."""
        return batch if self.row_group is None else strategies.own_targets(batch, self.row_group)

    def _clip(self, record: StepRecord) -> None:
        weights = list(self.model.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = strategies.whole(torch.nn.utils.get_total_norm(gradients))
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, self.gradient_clip, norm)
        record.gradient_norm = norm

    def _valid_tokens(self, batch: Batch) -> Tensor:
        """Valid targets of the global batch per process: gradients are averaged over processes afterwards."""
        count = batch["targets"].ne(IGNORE_INDEX).sum().float() / self.slices
        return (self.sum_over_processes(count) / self._world_size()).clamp_min(1.0)

    def _world_size(self) -> int:
        return self.trainer.world_size

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum over all processes, which must all call it."""
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self._world_size() > 1 else value

    def _gradient_sync(self, last: bool) -> AbstractContextManager:
        """DDP exchanges gradients with the last micro-batch; FSDP with each, so that none hold undivided ones."""
        no_sync = getattr(self.trainer.model, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def _nonfinite_report(self, batch: Batch) -> str:
        micro_batches = split_batch(batch, self.micro_batch_size)
        where = first_nonfinite(
            self.model,
            micro_batches,
            self._run_carrying(micro_batches)[0],
            self.processes,
            precision=self.trainer.precision_plugin.forward_context,
        )
        return (
            f"step {self.step + 1} gave a loss of {self.record.loss.item():.4g} and a gradient norm of "
            f"{self.record.gradient_norm.item():.4g}. First non-finite: {where or 'not reproduced by a second pass'}. "
            f"The step was not taken. {self.how_to_continue()} The same rate may well end "
            "here again; loop.nonfinite=skip leaves single steps of this kind out."
        )

    def _check_skips(self, finite: bool) -> None:
        """Refuse to skip a step if a weight or optimizer value is not finite: the next step would fail as well.

        Args:
            finite: the step is; then so are those values, of which nothing is read.

        Raises:
            NonFiniteError: a weight or an optimizer's value is not finite, or too many steps in a row were left out.
            SpikeError: too many were left out, the last one as a spike.
        """
        state = None if finite else named_state(self.model, self.trainer.optimizers)
        place = None if state is None else nonfinite_tensor(state, self.processes)
        if place is not None:
            reason = f"{place} is not finite, so that no step from here on can be taken"
        elif self.skips_in_a_row + 1 >= self.max_skips:
            steps, allowed = counted(self.max_skips, "step"), "not finite" if self.spikes is None else "not allowed"
            reason = f"{steps} in a row gave a loss or a gradient that is {allowed} (loop.max_skips)"
        else:
            return
        if finite:
            raise SpikeError(
                f"at step {self.step + 1}, {reason}; it gave {self.record.spike}. {self.how_to_continue()}"
            )
        raise NonFiniteError(f"at step {self.step + 1}, {reason}. {self.how_to_continue()}")

    def capture(self) -> dict[str, Any]:
        """The state of this module for a checkpoint: this process's parts of the tensors, not copied."""
        return {
            **({} if self.carried is None else {CARRIED: self.carried.named(self.device)}),
            **({} if self.average is None else self.average.captured(self.model)),
            **({} if self.spikes is None else {SPIKES: self.spikes.window.tolist()}),
            "step": self.step,
            "steps_skipped": self.steps_skipped,
            SKIPS_IN_A_ROW: self.skips_in_a_row,
            **named_state(self.model, self.trainer.optimizers),
        }

    def restore(self, saved: SavedRun, processes: Processes) -> None:
        """Continue from a state that `capture` made; all processes must call it, once the optimizers exist.

        Args:
            saved: the run.
            processes: all that train.

        Raises:
            CheckpointError: see `restore_state`; or a weight is not finite.
        """
        more: dict[str, Tensor] = {}
        if self.carried is not None:
            carried = self.carried
            processes.each(lambda: more.update(carried.targets(saved.tensors, self.device)))
        averaged = self.average is not None and saved.ema_updates is not None
        if self.average is not None and averaged:
            more |= self.average.targets()
        restore_state(self.model, self.trainer.optimizers, saved.tensors, saved.optimizers, processes, more)
        if self.carried is not None:
            self.carried.restore(more)
        place = nonfinite_tensor(named_state(self.model, self.trainer.optimizers), processes)
        if place is not None:  # earlier versions saved such states
            raise CheckpointError(
                f"{saved.checkpoint} cannot be continued: {place} is not finite. Delete it and continue from an older "
                "checkpoint beside it, or begin a new run with a lower optimizer.learning_rate."
            )
        if self.average is not None:
            if averaged:
                self.average.updates = saved.ema_updates or 0
            else:
                self.average.begin(self.model)
        if self.spikes is not None and saved.spikes is not None:
            self.spikes.restore(saved.spikes)
        self.steps_skipped, self.skips_in_a_row = saved.steps_skipped, saved.skips_in_a_row
        self.steps_taken = saved.step - saved.steps_skipped


def split_batch(batch: Batch, rows: int | None) -> list[Batch]:
    """Cut a batch into micro-batches of `rows` rows, which divides it; None keeps it whole."""
    size = batch["tokens"].shape[0]
    if rows is None or rows == size:
        return [batch]
    cuts = [slice(start, start + rows) for start in range(0, size, rows)]
    return [each(batch, operator.itemgetter(cut)) for cut in cuts]
