"""The course of a run: which stage each of its steps belongs to. A run without stages is one stage."""

import dataclasses
import functools
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from longmix.config.border import plain
from longmix.config.choices import Choice, choice_or_pattern
from longmix.config.commands import TrainConfig
from longmix.config.stages import STAGES, settings_of_stages, with_stage
from longmix.wording import counted

SEEDS = 1 << 32
"""Seeds of a run lie below it. The data of stage k are ordered by seed + k * SEEDS: the first stage's like those of a
run without stages, each other's in an order of its own that earlier and later stages leave alone."""


@dataclass(frozen=True)
class StagePart:
    """The part of a run that one stage takes.

    Attributes:
        number: counted from 0.
        start: steps of the run before it.
        steps: its own.
        config: a run of this stage alone.
        begins_schedule: a new course of the learning rate begins with it.
        learning_rate_scale: factor on all learning rates.
    """

    number: int
    start: int
    steps: int
    config: TrainConfig
    begins_schedule: bool
    learning_rate_scale: float

    @property
    def stop(self) -> int:
        """Steps of the run when it ends."""
        return self.start + self.steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one of its optimizer steps, over all processes."""
        return tokens_per_step(self.config)

    @property
    def data_seed(self) -> int:
        """The seed that orders its data."""
        return self.config.seed + self.number * SEEDS

    @property
    def micro_batch_size(self) -> int | None:
        """Windows of one forward and backward pass; None for a process's whole share."""
        value = self.config.trainer.settings.get("micro_batch_size")
        return value if isinstance(value, int) else None

    def __str__(self) -> str:
        scale = f", learning rate x {self.learning_rate_scale:g}" if self.learning_rate_scale != 1 else ""
        learned = "" if self.config.objective == "tokens" else f", objective {self.config.objective}"
        windows = f"{counted(self.config.batch_size, 'window')} of {counted(self.config.seq_len, 'token')}"
        return f"{counted(self.steps, 'step')} of {windows}{scale}{learned}"


@dataclass(frozen=True)
class Course:
    """All parts of a run, in order.

    Attributes:
        parts: at least one.
        staged: the run has stages.
    """

    parts: tuple[StagePart, ...]
    staged: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.parts[-1].stop

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens(self.total_steps)

    @cached_property
    def _starts(self) -> list[int]:
        return [part.start for part in self.parts]

    @cached_property
    def _tokens(self) -> list[int]:
        return [0, *accumulate(part.steps * part.tokens_per_step for part in self.parts)]

    def taking(self, step: int) -> StagePart:
        """The part of the step that is taken after `step` others; behind the end the last one."""
        return self.parts[bisect_right(self._starts, step) - 1]

    def taken(self, step: int) -> StagePart:
        """The part of the last step, if `step` were taken; before any the first one."""
        return self.taking(max(0, step - 1))

    def tokens(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        part = self.taken(step)
        return self._tokens[part.number] + (step - part.start) * part.tokens_per_step

    def ends_stage(self, step: int) -> bool:
        """Whether a stage, be it the last, ends with the first `step` steps."""
        return self.staged and step > 0 and self.taken(step).stop == step

    def begun(self, step: int) -> int:
        """The number of stages that one of the first `step` steps belongs to."""
        return self.taken(step).number + 1 if step else 0


def course_of(config: TrainConfig) -> Course:
    """The course of a run.

    Raises:
        ConfigError: a stage makes no choice of what is one in the whole run.
    """
    if config.stages is None:
        return Course((StagePart(0, 0, _steps(config), config, True, 1.0),), staged=False)
    parts: list[StagePart] = []
    for number, stage in enumerate(settings_of_stages(plain(config))):
        settings = stage.settings
        own = dataclasses.replace(
            config,
            stages=None,
            seq_len=settings["seq_len"],
            batch_size=settings["batch_size"],
            max_steps=settings["max_steps"],
            max_tokens=settings["max_tokens"],
            data=Choice.of(_key(config, number, "data"), settings["data"]),
            mixer=with_stage(number, functools.partial(choice_or_pattern, "mixer", settings["mixer"])),
            schedule=Choice.of(_key(config, number, "schedule"), settings["schedule"]),
            trainer=Choice.of("trainer", settings["trainer"]),
            objective=settings["objective"],
        )
        start = parts[-1].stop if parts else 0
        parts.append(StagePart(number, start, _steps(own), own, stage.begins_schedule, stage.learning_rate_scale))
    return Course(tuple(parts), staged=True)


def _key(config: TrainConfig, number: int, word: str) -> str:
    """The place of a choice, for messages: in the stage if it says something of it."""
    stages = config.stages or []
    return f"{STAGES}[{number}].{word}" if getattr(stages[number], word) is not None else word


def _steps(config: TrainConfig) -> int:
    return min(step_limits(config).values())


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens of one optimizer step over all processes, of a run without stages."""
    return config.seq_len * config.batch_size


def step_limits(config: TrainConfig) -> dict[str, int]:
    """Optimizer steps of a run without stages by each of `max_steps` and `max_tokens` that is set."""
    return limits_of(config.max_steps, config.max_tokens, tokens_per_step(config))


def limits_of(max_steps: int | None, max_tokens: int | None, tokens_of_a_step: int) -> dict[str, int]:
    """Optimizer steps by each of two limits that is set."""
    limits = {}
    if max_steps is not None:
        limits["max_steps"] = max_steps
    if max_tokens is not None:
        limits["max_tokens"] = -(-max_tokens // tokens_of_a_step)
    return limits
