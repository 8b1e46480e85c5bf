"""The words of a plan: those of `train.py`, and the machines."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from longmix.accelerators import ACCELERATORS, Accelerator, by_word
from longmix.command_line import values
from longmix.command_line.catalogue import CATALOGUE
from longmix.composing import composed
from longmix.config import Choice, ModelConfig, Pattern, TrainConfig, course_of, with_stage
from longmix.config import read as read_config
from longmix.config.choices import choice_or_pattern
from longmix.conversion.keeping import with_kept_first
from longmix.data.training_data import TrainingData, build_data
from longmix.errors import ConfigError
from longmix.machine_memory import total_bytes
from longmix.model.backbone import Checkpointing, LanguageModel
from longmix.model.build import build_model, check_model
from longmix.model.matching import match_parameters
from longmix.planning.dry_run import Precision
from longmix.training.carried import check_carries
from longmix.training.distillation import LAYERS, TOKENS, check_company
from longmix.training.hardware import TrainerSettings
from longmix.training.layerwise import layers_that_learn
from longmix.training.stages import check_mixer, check_words_have_effect
from longmix.training.warm_start import check_keep
from longmix.wording import counted, did_you_mean, nearest

Strategy = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Variant:
    """The settings that may be changed so that a run fits.

    Attributes:
        seq_len: tokens of a window.
        strategy: "single", "ddp" or "fsdp".
        context_parallel: processes that share a window.
        micro_batch_size: windows of one forward and backward pass.
        activation_checkpointing: what blocks keep for the backward pass, as in `LanguageModel`.
        activation_offload: keep it in the host's memory.
    """

    seq_len: int
    strategy: Strategy
    context_parallel: int
    micro_batch_size: int
    activation_checkpointing: Checkpointing
    activation_offload: bool


@dataclass(frozen=True)
class Trainer:
    """Settings of a `TrainerSettings` that a plan depends on; unlike there, this machine need not have the devices."""

    devices: int | None
    num_nodes: int
    strategy: Strategy
    context_parallel: int | None
    precision: Precision | Literal["auto"]
    compile: bool | None
    micro_batch_size: int | None

    @classmethod
    def of(cls, choice: Choice) -> "Trainer":
        """The settings of the choice `trainer` of a configuration, whose types have been checked.

        Raises:
            ConfigError: one is below 1.
        """
        usual = {entry.name: entry.default for entry in dataclasses.fields(TrainerSettings)}
        settings: dict[str, Any] = usual | choice.settings
        for key in ("devices", "num_nodes", "context_parallel", "micro_batch_size"):
            if settings[key] is not None and settings[key] < 1:
                raise ConfigError(f"trainer.{key}={settings[key]} must be at least 1.")
        return cls(**{entry.name: settings[entry.name] for entry in dataclasses.fields(cls)})

    @property
    def gpus(self) -> int:
        """Devices of all machines, where no word says how many."""
        return (self.devices or 1) * self.num_nodes


@dataclass(frozen=True)
class Request:
    """A run to plan.

    Attributes:
        config: its words, `match` carried out.
        trainer: those of its trainer.
        labels: the words for mixer and model.
        vocab_size: token ids.
        accelerator: of the table; None for a CPU.
        memory_bytes: of one device.
        gpus: devices of all machines together, one process each.
        given_batch_size: windows of a step over all processes; None gives each replica one.
        precision: as in `TrainerSettings`.
        variant: what was asked for.
        notes: what was chosen because no word said it.
        teacher: the mixer of the model that teaches; None without one.
    """

    config: TrainConfig
    trainer: Trainer
    labels: tuple[str, str]
    vocab_size: int
    accelerator: Accelerator | None
    memory_bytes: int
    gpus: int
    given_batch_size: int | None
    precision: Precision
    variant: Variant
    notes: tuple[str, ...]
    teacher: Choice | Pattern | None = None

    def teacher_model(self) -> LanguageModel | None:
        """The teacher on the meta device, which has the model's sizes; None of a run that learns from the text."""
        if self.teacher is None:
            return None
        with torch.device("meta"):
            return build_model(ModelConfig(mixer=self.teacher, model=self.config.model), self.vocab_size)

    def model(self) -> LanguageModel:
        """The model on the meta device, in the dtype of its weights."""
        with torch.device("meta"):
            model = build_model(self.config, self.vocab_size)
        model.measures_normalisers = self.config.loop.z_loss > 0
        return model

    def rows(self, variant: Variant) -> int:
        """Windows of a step that one process, or the processes that share windows, take.

        Raises:
            ConfigError: something does not divide; names the words.
        """
        replicas = self._replicas(variant)
        if variant.seq_len % variant.context_parallel:
            raise ConfigError(
                f"trainer.context_parallel={variant.context_parallel} does not divide seq_len={variant.seq_len}: every "
                "process has an equal slice."
            )
        batch_size = self.batch_size(variant)
        rows, rest = divmod(batch_size, replicas)
        if rest or not rows:
            raise ConfigError(
                f"batch_size={batch_size} does not divide over {counted(replicas, 'replica')} (gpus={self.gpus}, "
                f"trainer.context_parallel={variant.context_parallel}); give a multiple of {replicas}."
            )
        if rows % variant.micro_batch_size:
            raise ConfigError(
                f"trainer.micro_batch_size={variant.micro_batch_size} does not divide the "
                f"{counted(rows, 'window')} that each of "
                f"{counted(replicas, 'replica')} has of batch_size={batch_size}."
            )
        return rows

    def batch_size(self, variant: Variant) -> int:
        """Windows of a step over all processes."""
        return self._replicas(variant) if self.given_batch_size is None else self.given_batch_size

    def _replicas(self, variant: Variant) -> int:
        replicas, rest = divmod(self.gpus, variant.context_parallel)
        if rest or not replicas:
            raise ConfigError(f"trainer.context_parallel={variant.context_parallel} does not divide gpus={self.gpus}.")
        return replicas


def read(words: list[str]) -> Request:
    """A request from the words of a command line; of a run with stages, for the first one. See `read_stages`."""
    return read_stages(words)[0]


def read_stages(words: list[str]) -> list[Request]:
    """The requests for the stages of a run from the words of a command line; a run without stages is one stage.

    Besides the words of `train.py`: those of `longmix plan`, of which `output` changes nothing here. Without
    `batch_size`, every replica has one window.

    Raises:
        ConfigError: an unknown word, accelerator or choice, something that does not divide, or what cannot be planned.
    """
    own, others = divided(words)
    teacher = own.get("teacher", OWN["teacher"].default)
    OWN["teacher"].check(teacher)
    machine = _accelerator(own.get("gpu", OWN["gpu"].default))
    config, labels = _composed(others)
    check_words_have_effect(config, others)
    config = _with_kept(config, teacher)
    _check(config)
    data = _data(config)
    vocab_size = data.expected_vocab_size
    if config.loop.carry_state:
        check_carries(check_model(config), data.reads_on, data.source, "order" in config.data.settings)
    course = course_of(match_parameters(config, vocab_size))
    check_company(config, course)
    is_needed = config.keep is not None or any(part.config.objective != TOKENS for part in course.parts)
    if teacher != OWN["teacher"].default and not is_needed:
        raise ConfigError(
            f"teacher={teacher} has no effect with objective={TOKENS}; add objective=layers or logits, or leave "
            "teacher out."
        )
    is_given = any(word.lstrip("+").startswith(("batch_size=", "experiment=")) for word in others)
    requests = []
    for part in course.parts:
        given = is_given or (config.stages is not None and config.stages[part.number].batch_size is not None)
        make = functools.partial(_request, own, machine, part.config, labels, vocab_size, given)
        requests.append(with_stage(part.number, make) if course.staged else make())
    return requests


def _request(
    own: dict[str, str],
    machine: tuple[Accelerator | None, int],
    config: TrainConfig,
    labels: tuple[str, str],
    vocab_size: int,
    has_batch_size: bool,
) -> Request:
    accelerator, memory = machine
    trainer = Trainer.of(config.trainer)
    gpus = _count(own.get("gpus", str(trainer.gpus)))
    notes = []
    strategy = trainer.strategy
    if strategy == "single" and gpus > 1:
        strategy = "ddp"
        notes.append(f"trainer=ddp, as gpus={gpus}; trainer=fsdp divides weights, gradients and optimizer too")
    batch_size: int | None = config.batch_size
    if not has_batch_size:
        batch_size = None
        notes.append("one window for each replica, as no batch_size was given")
    if trainer.compile or (trainer.compile is None and accelerator is not None):
        notes.append("compiled blocks save memory and time that this plan does not count on")
    precision = trainer.precision
    if precision == "auto":
        precision = "32-true" if accelerator is None else "bf16-mixed"
    variant = Variant(
        seq_len=config.seq_len,
        strategy=strategy,
        context_parallel=gpus if trainer.context_parallel is None else trainer.context_parallel,
        micro_batch_size=1,
        activation_checkpointing=cast(Checkpointing, config.model.entries.get("activation_checkpointing", "none")),
        activation_offload=bool(config.model.entries.get("activation_offload", False)),
    )
    request = Request(
        config=config,
        trainer=trainer,
        labels=labels,
        vocab_size=vocab_size,
        accelerator=accelerator,
        memory_bytes=memory,
        gpus=gpus,
        given_batch_size=batch_size,
        precision=precision,
        variant=variant,
        notes=tuple(notes),
        teacher=_teacher(own, config, variant),
    )
    rows = trainer.micro_batch_size or request.rows(variant)
    request = dataclasses.replace(request, variant=dataclasses.replace(variant, micro_batch_size=rows))
    request.rows(request.variant)
    at_once = request.variant.micro_batch_size * config.seq_len // request.variant.context_parallel
    if at_once > MOST_TOKENS:
        raise ConfigError(
            f"each device would have {at_once:,} tokens at once, and a plan takes at most {MOST_TOKENS:,}; give "
            "smaller trainer.micro_batch_size, batch_size or seq_len."
        )
    return request


def _teacher(own: dict[str, str], config: TrainConfig, variant: Variant) -> Choice | Pattern | None:
    """The teacher's mixer; None of a run, or a stage, that learns from the text.

    Raises:
        ConfigError: no layer differs from the teacher's, or the teacher runs on slices of windows.
    """
    if config.objective == TOKENS:
        return None
    if variant.context_parallel > 1:
        raise ConfigError(
            f"objective={config.objective} with trainer.context_parallel is not planned for; leave one out."
        )
    word = own.get("teacher", OWN["teacher"].default)
    found = _mixer_of_teacher(word)
    if config.objective == LAYERS:
        student = check_model(config)
        if not layers_that_learn(student, check_model(ModelConfig(mixer=found, model=config.model))):
            raise ConfigError(
                f"objective={LAYERS}: every layer's mixer is that of teacher={word}, so that none has anything to "
                "learn. Give another mixer, or another teacher."
            )
    return found


def _mixer_of_teacher(word: str) -> Choice | Pattern:
    return choice_or_pattern("mixer", composed("train", [f"mixer={word}"]).content["mixer"])


def _with_kept(config: TrainConfig, teacher: str) -> TrainConfig:
    """A configuration in which as many layers keep the teacher's mixer as `keep` says; of a number, the first ones.

    Raises:
        ConfigError: layers that are not there, or that leave none to convert.
    """
    check_keep(config)
    if config.keep is None:
        return config
    mixer = with_kept_first(config.mixer, config.keep, _mixer_of_teacher(teacher), config.model.number("num_layers"))
    return dataclasses.replace(config, mixer=mixer)


def _check(config: TrainConfig) -> None:
    """Refuse what `train.py` would refuse, except devices that this machine lacks; and what cannot be planned."""
    config.check_together()
    for choice, supplied in (
        (config.optimizer, {"parameters"}),
        (config.trainer, set[str]()),
        (config.model, {"mixer_factory", "vocab_size"}),
        (config.data, {"tokenizer", "seq_len", "batch_size", "seed"}),
    ):
        choice.check(supplied)
    check_model(config)
    for number in range(len(config.stages or ())):
        with_stage(number, functools.partial(check_mixer, config, number))
    for word, given in (("checkpoint", config.checkpoint), ("resume", config.resume)):
        if given is not None:
            raise ConfigError(f"{word}={given} cannot be planned; give model, mixer and tokenizer of that run.")
    if config.trainable != "all":
        raise ConfigError(f"trainable={config.trainable} is not planned for; a plan is for trainable=all.")


MOST_TOKENS = 2**27
"""The most tokens of a micro-batch on one device; a plan walks through all of them, which takes minutes for so many."""

OWN = {word.name: word for word in CATALOGUE["plan"].words}
"""The words of a plan that `train.py` does not have."""


def divided(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The values of a plan's own words, and all others. A word whose default is null may be given as that."""
    own: dict[str, str] = {}
    others = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in OWN and equals:
            own[name] = value
        else:
            others.append(word)
    return {name: value for name, value in own.items() if not value == OWN[name].default == "null"}, others


def _count(text: str) -> int:
    text = values.as_hydra_reads(text, values.Takes(int), sweep=False)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"gpus={text} must be a whole number, at least 1.")
    return int(text)


def _accelerator(word: str) -> tuple[Accelerator | None, int]:
    if word.lower() == "cpu":
        return None, total_bytes()
    found = by_word(word)
    if found is None:
        raise ConfigError(f"gpu={word} is not in the table; use one of {', '.join(ACCELERATORS)}, or cpu.")
    return found, found.memory_bytes


def _composed(given: list[str]) -> tuple[TrainConfig, tuple[str, str]]:
    """The configuration, and the words for mixer and model."""
    try:
        made = composed("train", given)
    except ConfigError as error:
        raise _with_own_words(error) from error
    return read_config(TrainConfig, made.content), (made.choices["mixer"], made.choices["model"])


def _with_own_words(error: ConfigError) -> ConfigError:
    """The error about an unknown word, with the word of a plan that was probably meant."""
    found = re.match(r"unknown word (\w+)\.(?! Did you)", str(error))
    meant = nearest(found[1], OWN) if found else ""
    return ConfigError(f"unknown word {found[1]}.{did_you_mean(meant)}") if found and meant else error


def _data(config: TrainConfig) -> TrainingData:
    """The data, of which nothing is read."""
    tokenizer = config.tokenizer.build()
    return build_data(config.data, tokenizer, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed)
