"""Training under a teacher: which objective each stage has, and the teacher beside the model that learns.

The teacher is no part of the module that Lightning knows, nor of a checkpoint: it has no gradients and no optimizer,
and a run that continues loads it again. Its weights have the dtype of the student's. They are divided over the
processes where the student's are (fsdp), and whole in each otherwise.
"""

import functools

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longmix.batch import Batch
from longmix.config import Course, DistilConfig, StagePart, TrainConfig, with_stage
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import check_model
from longmix.model.head import SoftTargets
from longmix.training import strategies
from longmix.training.layerwise import layers_that_learn

TOKENS, LAYERS, LOGITS = "tokens", "layers", "logits"


class Distillation:
    """A student's teacher and what is learned of it.

    Args:
        student: the model that is trained.
        teacher: without gradients.
        course: of the run.
        step: steps already taken.

    Raises:
        ConfigError: the teacher has another vocabulary, or, for layers, other sizes; or no layer differs from its.
    """

    layers: list[int]
    """Those that learn, in a stage of layers."""

    def __init__(self, student: LanguageModel, teacher: LanguageModel, course: Course, step: int) -> None:
        self.taught = [part for part in course.parts if part.config.objective != TOKENS]
        check_teacher(student, teacher, {part.config.objective for part in self.taught})
        check_lessons(course, teacher, step)
        self.student = student
        self.model: LanguageModel | None = teacher.eval().requires_grad_(False)
        self.objective: str
        self.words: DistilConfig
        self.enter(course.taking(step) if step < course.total_steps else course.parts[-1])

    def enter(self, part: StagePart) -> None:
        """Learn what a stage has as its objective. A teacher that no later stage needs is let go.

        Args:
            part: the stage, whose settings the student has by now.
        """
        self.objective, self.words = part.config.objective, part.config.distil
        if part.number > self.taught[-1].number:
            self.model = None
        if self.model is not None and self.objective == LAYERS:
            self.layers = layers_that_learn(self.student, self.model)

    @property
    def hard_share(self) -> float:
        """Weight of the loss on the targets."""
        return self.words.hard_share if self.objective == LOGITS else 1.0

    def place(self, student: LanguageModel, mesh: DeviceMesh | None, products: torch.dtype | None) -> None:
        """Put the teacher where the student is, and divide it over `mesh` if the student is divided.

        Args:
            student: on its device.
            mesh, products: see `strategies.shard`.
        """
        if self.model is None:
            return
        weight = student.embedding.weight
        self.model.to(device=weight.device, dtype=weight.dtype)
        if mesh is not None and not strategies.is_sharded(self.model):
            strategies.shard(self.model, mesh, products)

    @torch.no_grad()
    def soft_targets(self, batch: Batch, group: ProcessGroup | None) -> SoftTargets | None:
        """The teacher's distributions on a batch, in this process's slice of it; None in stages without.

        Args:
            batch: any.
            group: the processes that share the rows; None if none do.
        """
        if self.objective != LOGITS or self.model is None:
            return None
        hidden = strategies.hidden(self.model, batch, group)
        weight = strategies.whole(self.model.head.weight)
        return SoftTargets(hidden, weight, self.model.logit_softcap, self.words.temperature)


def check_teacher(student: LanguageModel, teacher: LanguageModel, objectives: set[str]) -> None:
    """Refuse a teacher from which a student cannot learn.

    Raises:
        ConfigError: naming what differs.
    """
    sizes = {"tokens in the vocabulary": (student.vocab_size, teacher.vocab_size)}
    if LAYERS in objectives:
        sizes["layers (model.num_layers)"] = student.shape.num_layers, teacher.shape.num_layers
        sizes["channels (model.d_model)"] = student.shape.d_model, teacher.shape.d_model
    for what, (own, theirs) in sizes.items():
        if own != theirs:
            raise ConfigError(
                f"objective={LAYERS if LAYERS in objectives else LOGITS}: the teacher has {theirs} {what}, and the "
                f"model {own}; they must be equal."
            )


def check_lessons(course: Course, teacher: LanguageModel, step: int = 0) -> None:
    """Refuse stages of layers in which no layer has anything to learn.

    Args:
        course: of the run.
        teacher: which may be without memory.
        step: steps already taken; stages that have ended count no more.

    Raises:
        ConfigError: of a run with stages, it names the stage.
    """

    def check(part: StagePart) -> None:
        if not layers_that_learn(check_model(part.config), teacher):
            raise ConfigError(
                "objective=layers: every layer's mixer is that of the teacher, so that none has anything to learn. "
                "Give another mixer, or another objective."
            )

    for part in course.parts:
        if part.config.objective != LAYERS or part.stop <= step:
            continue
        if course.staged:
            with_stage(part.number, functools.partial(check, part))
        else:
            check(part)


def check_objective(config: TrainConfig, course: Course) -> None:
    """Refuse objectives that have no meaning in this run.

    Args:
        config, course: of the run.

    Raises:
        ConfigError: naming the words.
    """
    check_company(config, course)
    taught = next((part.config.objective for part in course.parts if part.config.objective != TOKENS), None)
    if taught is not None and config.checkpoint is None:
        raise ConfigError(f"objective={taught} learns from a teacher: give checkpoint=, the run or folder that has it.")


def check_company(config: TrainConfig, course: Course) -> None:
    """Refuse words that have no effect with a run's objectives, or cannot be had with them.

    Args:
        config, course: of the run, whose teacher is known or not.

    Raises:
        ConfigError: naming the words.
    """
    objectives = [part.config.objective for part in course.parts]
    if LOGITS not in objectives:
        for name, default in vars(DistilConfig()).items():
            if getattr(config.distil, name) != default:
                raise ConfigError(
                    f"distil.{name} has no effect without objective={LOGITS}. Add it, or leave {name} out."
                )
    if config.loop.z_loss and set(objectives) == {LAYERS}:
        raise ConfigError(
            f"loop.z_loss={config.loop.z_loss:g} has no effect with objective={LAYERS}, which forms no logits; leave "
            "it out."
        )
    taught = next((objective for objective in objectives if objective != TOKENS), None)
    reasons = {
        "loop.carry_state=true": (
            config.loop.carry_state,
            "the teacher would need a carried state too, which of full attention grows without bound",
        ),
        "adversarial.xi": (config.adversarial.xi is not None, "an attack is on the loss of the text's own tokens"),
        "trainable=states": (
            config.trainable == "states" and LAYERS in objectives,
            "it trains states before documents, and a layer learns by its mixer's weights",
        ),
    }
    for other, (is_given, reason) in reasons.items():
        if is_given and taught is not None:
            raise ConfigError(f"objective={taught} cannot be had with {other}: {reason}; leave one out.")


def needs_teacher(course: Course, step: int = 0) -> bool:
    """Whether the steps after `step` learn from a teacher."""
    return any(part.config.objective != TOKENS and part.stop > step for part in course.parts)
