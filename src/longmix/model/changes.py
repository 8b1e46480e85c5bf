"""Settings of a trained mixer that may change: those that no weight depends on, as each class of mixers says itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from longmix.config import Choice, Pattern
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer

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
            raise ConfigError(_refusal(f"{mixer.key}.{name}", mixer.choices, checkpoint))
        _check(member.key, values, member, mixer.choices, checkpoint)
        entries[name] = member.having(**values).entries
    return Pattern.of(mixer.key, entries)


def _check(key: str, changes: Changes, choice: Choice, all_choices: Sequence[Choice], checkpoint: str) -> None:
    for name in changes:
        if name not in _changeable(choice):
            raise ConfigError(_refusal(f"{key}.{name}", all_choices, checkpoint))


def _changeable(choice: Choice) -> tuple[str, ...]:
    kind = choice.located()
    return kind.changeable if isinstance(kind, type) and issubclass(kind, Mixer) else ()


def _refusal(word: str, choices: Sequence[Choice], checkpoint: str) -> str:
    free = [f"{choice.key}.{name}" for choice in choices for name in _changeable(choice)]
    rest = f"May change after training: {', '.join(free)}." if free else "No setting of its mixer may change."
    return f"{word} comes from {checkpoint}; leave one of the two out. {rest}"
