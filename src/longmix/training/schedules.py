"""Learning-rate schedules as pure functions of the step, so that resuming needs nothing but the step."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from longmix.config import Course, with_stage
from longmix.errors import ConfigError

Schedule = Callable[[int, int], float]
"""Factor on the peak learning rates at (step, total_steps), the step counted from 0."""


def _steps(amount: float, total_steps: int) -> float:
    """A fraction below 1 of all steps, or a whole number of steps."""
    return amount * total_steps if amount < 1 else amount


class _Warmup:
    def __init__(self, warmup: float, final: float) -> None:
        if warmup < 0:
            raise ConfigError(f"schedule.warmup={warmup} must not be negative.")
        if not 0 <= final <= 1:
            raise ConfigError(f"schedule.final={final} must lie between 0 and 1.")
        self.warmup, self.final = warmup, final

    def warmup_factor(self, step: int, total_steps: int) -> float:
        """(step + 1) / warm-up steps, at most 1; the first step already moves."""
        return min(1.0, (step + 1) / max(1.0, _steps(self.warmup, total_steps)))


class WarmupCosine(_Warmup):
    """Linear warm-up, then half a cosine from 1 down to `final` (Loshchilov & Hutter 2017, arXiv 1608.03983).

    Args:
        warmup: fraction of all steps if below 1, else a number of steps.
        final: factor at the last step.
    """

    def __init__(self, warmup: float = 0.05, final: float = 0.1) -> None:
        super().__init__(warmup, final)

    def __call__(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate at `step`, counted from 0."""
        start = _steps(self.warmup, total_steps)
        progress = min(1.0, max(0.0, step - start) / max(1.0, total_steps - 1 - start))
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.warmup_factor(step, total_steps) * cosine


class WarmupStableDecay(_Warmup):
    """Linear warm-up, a plateau, and a decay at the end (Hu et al. 2024, arXiv 2404.06395).

    Args:
        warmup: fraction of all steps if below 1, else a number of steps.
        decay: length of the decay, likewise.
        final: factor that the decay reaches as the run ends, after the last step.
        shape: "linear", or "sqrt" for 1 - sqrt(progress) (Haegele et al. 2024, arXiv 2405.18392).
    """

    def __init__(
        self,
        warmup: float = 0.05,
        decay: float = 0.2,
        final: float = 0.0,
        shape: Literal["linear", "sqrt"] = "linear",
    ) -> None:
        super().__init__(warmup, final)
        if decay < 0:
            raise ConfigError(f"schedule.decay={decay} must not be negative.")
        self.decay, self.shape = decay, shape

    def __call__(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate at `step`, counted from 0."""
        length = max(1.0, _steps(self.decay, total_steps))
        progress = min(1.0, max(0.0, step - (total_steps - length)) / length)
        fall = math.sqrt(progress) if self.shape == "sqrt" else progress
        return self.warmup_factor(step, total_steps) * (1 - (1 - self.final) * fall)


@dataclass(frozen=True)
class Section:
    """Some steps of a run that go through a schedule, or through a part of it, at one scale.

    Attributes:
        start: steps of the run before it.
        begun: steps of the run before the schedule that it is in began.
        stop: steps of the run at the end of that schedule.
        schedule: that one.
        scale: factor on all that the schedule says.
    """

    start: int
    begun: int
    stop: int
    schedule: Schedule
    scale: float


class Sections:
    """The schedule of a run with stages: sections one after the other, the first of which begins at 0."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = tuple(sections)
        self._starts = [section.start for section in self.sections]

    def __call__(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate at `step`, counted from 0."""
        section = self.sections[bisect_right(self._starts, step) - 1]
        return section.scale * section.schedule(step - section.begun, section.stop - section.begun)


@dataclass(frozen=True)
class Span:
    """The steps of a stage, as far as the learning rate goes.

    Attributes:
        start: steps of the run before it.
        steps: its own.
        begins_schedule: a new schedule begins with it.
        scale: factor on all learning rates in it.
    """

    start: int
    steps: int
    begins_schedule: bool
    scale: float


def sections(spans: Sequence[Span], build: Callable[[int], Schedule]) -> Sections:
    """The schedule of a run with stages.

    Args:
        spans: of the stages in order; the first one begins a schedule.
        build: makes the schedule that begins with the stage of a number.
    """
    found: list[Section] = []
    firsts = [number for number, span in enumerate(spans) if span.begins_schedule]
    for first, behind in zip(firsts, [*firsts[1:], len(spans)], strict=True):
        schedule, begun = build(first), spans[first].start
        stop = spans[behind - 1].start + spans[behind - 1].steps
        found += [Section(span.start, begun, stop, schedule, span.scale) for span in spans[first:behind]]
    return Sections(found)


def schedule_of(course: Course) -> Schedule:
    """The schedule of a run: one over all of its steps, unless stages begin new ones or scale it.

    Raises:
        ConfigError: a setting of a schedule is wrong.
    """
    if not course.staged:
        schedule: Schedule = course.parts[0].config.schedule.build()
        return schedule
    spans = [Span(part.start, part.steps, part.begins_schedule, part.learning_rate_scale) for part in course.parts]
    return sections(spans, lambda number: with_stage(number, course.parts[number].config.schedule.build))
