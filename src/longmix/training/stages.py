"""Stages of a run: what is refused before any work, and what changes where one begins."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch

from longmix.config import STAGES, Course, ModelConfig, Stage, StagePart, TrainConfig, with_stage
from longmix.config.stages import LIMITS
from longmix.distributed.slices import check_slices
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import check_model
from longmix.model.changes import changed_mixer, take_settings
from longmix.training.hardware import TrainerSettings
from longmix.training.least_memory import check_memory
from longmix.training.module import TrainingModule

SWITCHES = {"loop.spike_sigma": ("loop.spike_window", "loop.spike_action"), "loop.tasks": ("loop.tasks_every",)}
"""Words without which others have no effect."""

REPLACED = {
    "seq_len": "seq_len",
    "batch_size": "batch_size",
    "objective": "objective",
    "trainer.micro_batch_size": "micro_batch_size",
}
"""Words of the command line with a single value, and the words of a stage that take their place."""

OF_THE_RUN = ("num_workers", "validation_tokens", "cache_dir", "order")
"""Settings of data that are the same in all stages."""


def check_words_have_effect(config: TrainConfig, words: Iterable[str]) -> None:
    """Refuse words of the command line that every stage replaces, or that lack the word without which they do nothing.

    Raises:
        ConfigError: names the word.
    """
    given = {name.lstrip("+"): value for name, _, value in (word.partition("=") for word in words)}
    for switch, dependent in SWITCHES.items():
        for name in dependent:
            if name in given and switch not in given and not getattr(config.loop, switch.removeprefix("loop.")):
                raise ConfigError(f"{name}={given[name]} has no effect without {switch}. Add it, or leave {name} out.")
    if config.stages is None:
        return
    for name, value in given.items():
        if value != "null" and all(_replaces(stage, name) for stage in config.stages):
            raise ConfigError(f"{name} has no effect: every stage of {STAGES} has its own. Leave it out.")


def _replaces(stage: Stage, word: str) -> bool:
    """Whether a stage has a value of its own in place of a word of the command line."""
    if word in LIMITS:
        return stage.is_limited
    group, _, setting = word.partition(".")
    if group == "schedule":
        return setting in (stage.schedule or {})
    return word in REPLACED and getattr(stage, REPLACED[word]) is not None


def check_stages(config: TrainConfig, course: Course, settings: TrainerSettings) -> None:
    """Refuse what cannot work in one of the stages; a run without stages is one.

    Raises:
        ConfigError: names the word, and of a run with stages the stage.
    """
    each_part(course, lambda part: _check(config, part, settings))


def check_memory_of_stages(course: Course, settings: TrainerSettings, vocab_size: int) -> None:
    """Refuse a run of which a stage needs more memory than is free on this machine; see `check_memory`.

    Raises:
        ConfigError: with the numbers and the words to change.
    """
    each_part(course, lambda part: check_memory(part.config, of_part(settings, part), vocab_size))


def each_part(course: Course, action: Callable[[StagePart], None]) -> None:
    """Call `action` for each part of a run; in a run with stages, its errors say which stage they are about."""
    for part in course.parts:
        if course.staged:
            with_stage(part.number, functools.partial(action, part))
        else:
            action(part)


def of_part(settings: TrainerSettings, part: StagePart) -> TrainerSettings:
    """The trainer's settings in a stage."""
    return dataclasses.replace(settings, micro_batch_size=part.micro_batch_size)


def check_mixer(config: TrainConfig, number: int) -> None:
    """Refuse settings of a stage's mixer on which the weights depend.

    Raises:
        ConfigError: names the setting.
    """
    own = (config.stages or [])[number].mixer
    if own is not None:
        changed_mixer(config.mixer, own, "the whole run")


def _check(config: TrainConfig, part: StagePart, settings: TrainerSettings) -> None:
    if config.stages is not None:
        own = config.stages[part.number]
        for name in OF_THE_RUN:
            if name in (own.data or {}):
                key = f"{STAGES}[{part.number}].data.{name}"
                raise ConfigError(f"{key}: it is the same in all stages; give data.{name}.")
        check_mixer(config, part.number)
        if own.mixer is not None:
            check_model(part.config)
    of_part(settings, part).check_batch(part.config.batch_size)
    check_slices(part.config.seq_len, settings.slices)


def draws(model: LanguageModel, course: Course) -> bool:
    """Whether training draws random numbers in any part of a run, as dropout does that only a later stage has.

    Args:
        model: as it begins.
        course: of the run.
    """
    return model.draws() or (course.staged and any(check_model(part.config).draws() for part in course.parts))


def enter(part: StagePart, module: TrainingModule, before: ModelConfig) -> None:
    """Make a module that has left one stage ready for the steps of the next.

    Compiled blocks are compiled anew in each stage, for its shapes alone: a run that is continued inside a stage then
    takes the same steps as one that came from the stage before.

    Args:
        part: the next stage.
        module: has the settings of `before`.
        before: the configuration of the stage that it has left, or that it was built with.
    """
    take_settings(module.model, before, part.config)
    module.micro_batch_size = part.micro_batch_size
    if module.distillation is not None:
        module.distillation.enter(part)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # pieces of memory for the old shapes would lie between those for the new ones
