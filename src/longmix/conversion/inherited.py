"""Settings that a converted model has of its teacher: those that its weights were trained with.

A layer that keeps its mixer's class keeps its settings, such as grouped key heads or the base of the rotary positions,
and one with another mixer has those of them that mean the same there (`Mixer.inherits`). What the command says stands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from longmix.config import Choice, Pattern
from longmix.config.choices import copied


def with_teachers_settings(
    new: Choice | Pattern, given: Mapping[str, Any], teacher: Choice | Pattern
) -> Choice | Pattern:
    """A converted model's mixers with the settings of the teacher's.

    Args:
        new: what the command names; its classes and the teacher's are trusted.
        given: the settings that the command says, of a pattern below the names of its members.
        teacher: the mixer of the model that is converted.

    Raises:
        ConfigError: a mixer has no class of its name.
    """
    if isinstance(new, Choice):
        return _member(new, given, teacher.choices)
    members = {name: _member(each, given.get(name, {}), teacher.choices) for name, each in new.members.items()}
    return Pattern.of(new.key, {**new.entries, **{name: each.entries for name, each in members.items()}})


def _member(new: Choice, given: Mapping[str, Any], teachers: Sequence[Choice]) -> Choice:
    """One mixer with the settings of the first of the teacher's that has its class, else of the first that has any."""
    kind = new.located()
    for teacher in teachers:
        if teacher.located() is kind:
            return _having(new, given, teacher, list(teacher.settings))
    own = getattr(kind, "inherits", ())
    for teacher in teachers:
        if common := [name for name in getattr(teacher.located(), "inherits", ()) if name in own]:
            return _having(new, given, teacher, common)
    return new


def _having(new: Choice, given: Mapping[str, Any], teacher: Choice, names: Sequence[str]) -> Choice:
    known = [name for name in names if name in new.entries and name in teacher.entries and name not in given]
    return new.having(**{name: copied(teacher.entries[name]) for name in known})
