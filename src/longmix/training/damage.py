"""What a model loses when one of its layers gets another mixer: the measure by which `keep=N` chooses layers.

The damage of a layer is the held-out loss of the whole model in which that layer alone is converted, minus the
teacher's. Before, the new mixer may learn its layer's outputs for a few tokens, as `objective=layers` does: no layer
learns through another, so all of them learn while the teacher runs once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch

from longmix.batch import Batch, each
from longmix.config import Choice, ModelConfig
from longmix.conversion.transfer import transfer
from longmix.data.training_data import TrainingData
from longmix.distributed.agreement import Processes
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.model.build import build_model
from longmix.training.layerwise import LayerLessons, layers_that_learn
from longmix.training.optimizers import PEAK, adamw

LEARNING_RATE = 1e-3
"""Of AdamW at first, as in `experiment=convert`; it falls to 0 along a line."""

Precision = Callable[[], AbstractContextManager[Any]]
Loss = Callable[[LanguageModel], float]


@dataclass(frozen=True)
class Damage:
    """What the conversion of each layer alone does to a model.

    Attributes:
        before: held-out loss of the teacher, in nats per token.
        losses: the same with each layer converted.
        learned: tokens from which each new mixer learned its layer's outputs.
    """

    before: float
    losses: tuple[float, ...]
    learned: int

    @property
    def of_layers(self) -> list[float]:
        """The damage of each layer, in nats per token; infinite if the loss is not finite."""
        return [loss - self.before if math.isfinite(loss) else math.inf for loss in self.losses]

    def report(self) -> dict[str, Any]:
        """It as an entry of JSON, in which null stands for what is not finite."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        damage = [each if math.isfinite(each) else None for each in self.of_layers]
        return {"damage": {"before": self.before, "losses": losses, "damage": damage, "learned": self.learned}}

    @property
    def order(self) -> list[int]:
        """The layers, the largest damage first."""
        damage = self.of_layers
        return sorted(range(len(damage)), key=lambda layer: -damage[layer])

    def largest(self, count: int) -> list[int]:
        """The layers of the largest damage, in order of their numbers.

        Raises:
            ConfigError: a layer that would be among them has the damage of one that would not.
        """
        damage, order = self.of_layers, self.order
        last, next_ = order[count - 1], order[count]
        if damage[last] == damage[next_]:
            named = str(sorted(order[:count])).replace(" ", "")
            raise ConfigError(
                f"keep={count}: layers {min(last, next_)} and {max(last, next_)} have the same damage, "
                f"{damage[last]:.4g} nats; name the layers, such as keep={named}."
            )
        return sorted(order[:count])


def measure(
    teacher: LanguageModel,
    config: ModelConfig,
    new: Choice,
    lessons: Iterable[Batch],
    loss: Loss,
    *,
    steps: int,
    seed: int,
    precision: Precision = nullcontext,
    done: Callable[[], None] = lambda: None,
    processes: Processes | None = None,
) -> Damage:
    """The damage of each layer; the random state is as before, and so is the teacher.

    Each of several processes holds both models and learns from the same lessons; the layers are divided among them.

    Args:
        teacher: in evaluation, without gradients, on its device.
        config: its model and mixer.
        new: the mixer that layers get.
        lessons: batches, each one step of learning.
        loss: of a model on held-out text, in nats per token.
        steps: how many of the lessons are taken; 0 for the transfer alone.
        seed: of what is new in the mixers.
        precision: makes the context of a forward pass.
        done: called after each layer is measured here, for a progress bar.
        processes: that measure together, each a share of the layers; all of them must call this.

    Raises:
        ConfigError: the mixer has settings that the model cannot take.
    """
    processes = processes or Processes()
    own = range(processes.rank, len(teacher.blocks), processes.size)
    device = teacher.embedding.weight.device

    def measured() -> tuple[float, dict[int, float], int]:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            student = build_model(ModelConfig(mixer=new, model=config.model), teacher.vocab_size)
            student.to(device=device, dtype=teacher.embedding.weight.dtype)
            transfer(student, teacher.state_dict(), config)
            learned = learn(student, teacher, lessons, steps, precision)
            student.eval()
            before, losses = loss(teacher), {}
            for layer in own:
                with converted(teacher, student, layer):
                    losses[layer] = loss(teacher)
                done()
        return before, losses, learned

    shares = processes.each(measured)
    losses = {layer: found for _, share, _ in shares for layer, found in share.items()}
    before, _, learned = shares[0]
    return Damage(before, tuple(losses[layer] for layer in range(len(losses))), learned)


@contextmanager
def converted(teacher: LanguageModel, student: LanguageModel, layer: int) -> Iterator[None]:
    """Within the context one layer of the teacher has the student's mixer."""
    block, new = cast(Block, teacher.blocks[layer]), cast(Block, student.blocks[layer])
    own = block.mixer
    try:
        block.mixer = new.mixer
        yield
    finally:
        block.mixer = own


def learn(
    student: LanguageModel, teacher: LanguageModel, lessons: Iterable[Batch], steps: int, precision: Precision
) -> int:
    """Let each new mixer learn the outputs of its layer; returns the number of tokens.

    Args:
        student: its mixers learn; other weights get no gradient.
        teacher: without gradients.
        lessons, steps, precision: see `measure`.
    """
    layers = layers_that_learn(student, teacher) if steps else []
    if not layers:
        return 0
    mixers = {layer: student.mixers()[layer] for layer in layers}
    weights = {
        f"{layer}.{name}": weight
        for layer, mixer in mixers.items()
        for name, weight in mixer.named_parameters()
        if weight.requires_grad
    }
    optimizers = adamw(weights, learning_rate=LEARNING_RATE, weight_decay=0.0)
    learner = LayerLessons(student.train(), teacher, layers)
    device, tokens = teacher.embedding.weight.device, 0
    for step, batch in zip(range(steps), lessons, strict=False):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group[PEAK] * (1 - step / steps)
        with precision():
            learner.learn([to_device(batch, device)], lambda loss: loss.backward())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finish_step(student, True, lambda seen: seen)  # all processes have the same lessons
        tokens += batch["tokens"].numel()
    return tokens


def lessons_of(data: TrainingData, steps: int) -> Iterator[Batch]:
    """The first windows of training, one at a time: the same whatever `batch_size` is.

    Args:
        data: prepared.
        steps: at most so many windows.
    """
    batches = -(-steps // data.batch_size)
    for batch in data.train_loader(0, batches) if steps else ():
        for row in range(len(batch["tokens"])):
            yield each(batch, lambda x, row=row: x[row : row + 1])  # type: ignore[misc]
