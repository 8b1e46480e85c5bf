"""Settings that may change after training: those that no weight depends on, which each class of mixers says itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from longmix.config import Choice, ModelConfig, Pattern, settings
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.build import CHECK_VOCABULARY, build_model
from longmix.wording import did_you_mean, nearest

OF_TRAINING = (
    "logit_penalty",
    "embedding_dropout",
    "residual_dropout",
    "activation_checkpointing",
    "activation_offload",
    "saved_activations",
)
"""Settings of the model that say how it is trained, and not what it computes then: they may change after training."""

Changes = Mapping[str, Any]
"""New values of settings by name; of a pattern by the member's name and then the setting's."""


def changed_mixer(mixer: Choice | Pattern, changes: Changes, checkpoint: str) -> Choice | Pattern:
    """A checkpoint's mixer with other values of settings that may change after training.

    Args:
        mixer: the checkpoint's; its classes are trusted.
        changes: the new values.
        checkpoint: names it in messages, as in "checkpoint=runs/a".

    Raises:
        ConfigError: a setting that comes with the weights, or that there is not; the message lists those that may
            change. Values are checked where the mixer is built.
    """
    if not changes:
        return mixer
    if isinstance(mixer, Choice):
        _check(mixer.key, changes, mixer, [mixer], checkpoint)
        return mixer.having(**changes)
    entries = dict(mixer.entries)
    for name, values in changes.items():
        member = mixer.members.get(name)
        if member is None or not isinstance(values, Mapping):
            raise ConfigError(_refusal(_full_name(f"{mixer.key}.{name}", values), mixer.choices, checkpoint))
        _check(member.key, values, member, mixer.choices, checkpoint)
        entries[name] = member.having(**values).entries
    return Pattern.of(mixer.key, entries)


def take_settings(model: LanguageModel, before: ModelConfig, now: ModelConfig) -> None:
    """Give a model's mixers new values of settings that may change after training; weights stay where they are.

    The layers themselves stay, since optimizers, hooks and processes that divide them hold them: what a layer that is
    built with the new settings has other than one with the earlier ones, such as a window, is written into it.

    Args:
        model: built with the earlier settings, or changed to have them.
        before, now: the settings; they differ as `changed_mixer` allows.
    """
    if before.mixer == now.mixer:
        return
    with torch.device("meta"):
        earlier, later = (dict(build_model(config, CHECK_VOCABULARY).named_modules()) for config in (before, now))
    layers = dict(model.named_modules())
    for name, layer in later.items():
        for attribute, value in vars(layer).items():
            if _is_plain(value) and value != vars(earlier[name])[attribute]:
                setattr(layers[name], attribute, value)


def _is_plain(value: object) -> bool:
    """Whether a value is nothing but settings: numbers, texts, and dataclasses and collections of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value))
    return value is None or isinstance(value, int | float | str)


def _check(key: str, changes: Changes, choice: Choice, all_choices: Sequence[Choice], checkpoint: str) -> None:
    for name, value in changes.items():
        if name not in _changeable(choice):
            word = f"{key}.{name}" if name in _settings(choice) else _full_name(f"{key}.{name}", value)
            raise ConfigError(_refusal(word, all_choices, checkpoint))


def _full_name(word: str, value: object) -> str:
    """The word as the command line has it, where `value` holds what is below a name that does not exist."""
    return f"{word}.{next(iter(value))}" if isinstance(value, Mapping) and value else word


def _changeable(choice: Choice) -> tuple[str, ...]:
    kind = choice.located()
    return kind.changeable if isinstance(kind, type) and issubclass(kind, Mixer) else ()


def _settings(choice: Choice) -> list[str]:
    """The names of all settings, those included that longmix had not when it wrote the checkpoint."""
    return list(choice.settings | settings(choice.located()))


def _refusal(word: str, choices: Sequence[Choice], checkpoint: str) -> str:
    free = [f"{choice.key}.{name}" for choice in choices for name in _changeable(choice)]
    rest = f"May change after training: {', '.join(free)}." if free else "No setting of its mixer may change."
    known = [f"{choice.key}.{name}" for choice in choices for name in _settings(choice)]
    if word in known:
        return f"{word} comes from {checkpoint}; leave one of the two out. {rest}"
    if word in (choice.key for choice in choices):
        return f"{word} has no value of its own; its words are {word}.NAME. {rest}"
    return f"unknown word {word}: the mixer of {checkpoint} has none.{did_you_mean(_meant(word, known))} {rest}"


def _meant(word: str, known: Sequence[str]) -> str:
    """The settings of this name elsewhere in the mixer; or the one whose name is most like it."""
    above, _, leaf = word.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    own = [name for name in known if name.rpartition(".")[0] == above]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed([*own, *known])}
    return " or ".join(same) or by_leaf.get(nearest(leaf, by_leaf), "")
