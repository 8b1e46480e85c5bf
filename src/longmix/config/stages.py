"""The stages of a run: what each may say, and the settings that follow from it and from the words of the whole run.

What a stage does not say is as the whole run has it. All of this works on settings as dicts, since a run's files, which
any version may have written, are read the same way as the words of a command.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from longmix.config.rules import Rule, at_least, word
from longmix.config.values import as_given
from longmix.errors import CheckpointError, LongmixError

Objective = Literal["tokens", "layers", "logits"]
"""What is learned; see docs/distillation.md."""

STAGES, STAGE = "stages", "stage"
"""Entries of a configuration: the stages, and in a checkpoint's the number of the one that it was saved in, from 0."""

LIMITS = ("max_steps", "max_tokens")
MERGED = ("data", "mixer", "schedule")
"""Words of a stage that hold settings of a choice; they replace those of the whole run one by one."""

NO_SETTINGS = "holds no settings; write them like {NAME:VALUE}."

LONGEST_SHOWN = 80
"""Characters of a file's value in messages."""

Plain = dict[str, Any]
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The words of one stage; null is as in the whole run.

    Attributes:
        seq_len: tokens in a training window.
        batch_size: windows per optimizer step, over all devices.
        max_steps: optimizer steps of this stage.
        max_tokens: tokens of this stage; with max_steps beside it the smaller counts.
        micro_batch_size: windows of one forward and backward pass, in place of trainer.micro_batch_size.
        learning_rate_scale: factor on all learning rates in this stage.
        schedule: begins a new course of the learning rate, with warm-up and all, that lasts to the next stage that
            begins one; its settings replace those of the run's schedule. {} begins it with the same settings.
        data: settings that replace those of the run's data, such as {weights:{code:2}}.
        mixer: settings of the mixer that replace the run's; only those that leave its weights as they are.
        objective: what is learned in this stage, as the word of the whole run.
    """

    words_as_written: ClassVar[str] = "{seq_len:4096,max_tokens:1e9}"

    seq_len: int | None = word(None, at_least(1))
    batch_size: int | None = word(None, at_least(1))
    max_steps: int | None = word(None, at_least(1))
    max_tokens: int | None = word(None, at_least(1))
    micro_batch_size: int | None = word(None, at_least(1))
    learning_rate_scale: float = word(1.0, Rule(lambda value: value > 0, "must be above 0."))
    schedule: dict[str, Any] | None = word(None, misfit=NO_SETTINGS)
    data: dict[str, Any] | None = word(None, misfit=NO_SETTINGS)
    mixer: dict[str, Any] | None = word(None, misfit=NO_SETTINGS)
    objective: Objective | None = None

    @property
    def is_limited(self) -> bool:
        """Whether it says itself how long it is."""
        return self.max_steps is not None or self.max_tokens is not None


@dataclass(frozen=True)
class StageSettings:
    """The settings of one stage.

    Attributes:
        settings: those of a run that has nothing but this stage, as `config.yaml` would have them.
        begins_schedule: a new course of the learning rate begins with it.
        learning_rate_scale: factor on all learning rates.
    """

    settings: Plain
    begins_schedule: bool
    learning_rate_scale: float


def settings_of_stages(written: Mapping[str, Any]) -> list[StageSettings]:
    """The settings of each stage of a run; of a run without stages, which is one stage, its own.

    Args:
        written: the run's configuration as dicts.

    Raises:
        CheckpointError: a file's `stages` are something else.
    """
    whole = {key: value for key, value in written.items() if key not in (STAGES, STAGE)}
    stages = written.get(STAGES)
    if not stages:
        return [StageSettings(whole, True, 1.0)]
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise CheckpointError(f"the configuration's {STAGES}={as_given(stages)[:LONGEST_SHOWN]} is no list of stages.")
    found: list[StageSettings] = []
    schedule = whole.get("schedule")
    for number, stage in enumerate(stages):
        own = {key: value for key, value in stage.items() if value is not None}
        settings = whole | {key: own[key] for key in ("seq_len", "batch_size", "objective") if key in own}
        if any(key in own for key in LIMITS):
            settings |= {key: own.get(key) for key in LIMITS}
        settings |= {key: merged(whole.get(key), own[key]) for key in MERGED if key in own}
        begins = number == 0 or "schedule" in own
        schedule = settings["schedule"] = settings.get("schedule") if begins else schedule
        if "micro_batch_size" in own:
            settings["trainer"] = merged(whole.get("trainer"), {"micro_batch_size": own["micro_batch_size"]})
        found.append(StageSettings(settings, begins, float(own.get("learning_rate_scale", 1.0))))
    return found


def merged(whole: Any, own: Any) -> Any:
    """Settings with those that replace them, in all levels; a choice of another class replaces all of them."""
    if not isinstance(whole, Mapping) or not isinstance(own, Mapping):
        return own
    if "_target_" in own and own["_target_"] != whole.get("_target_"):
        return own
    return {**whole, **{key: merged(whole.get(key), value) for key, value in own.items()}}


def reached(written: Mapping[str, Any]) -> Plain:
    """The configuration of a checkpoint with the settings of the stage that it was saved in, and no stages any more."""
    stages = settings_of_stages(written)
    number = written.get(STAGE)
    at = number if isinstance(number, int) and 0 <= number < len(stages) else -1
    return stages[at].settings


def with_stage(number: int, action: Callable[[], Made]) -> Made:
    """What `action` returns; its errors say which stage they are about, unless they do already.

    Raises:
        LongmixError: of the same kind as that of `action`.
    """
    try:
        return action()
    except LongmixError as error:
        if STAGES in str(error):
            raise
        raise type(error)(f"{STAGES}[{number}]: {error}") from error
