"""What was chosen in the groups of a configuration: a class with its settings, or a pattern over several.

A choice is a value: two with equal settings are equal, and nobody changes one. What a class takes is checked where the
choice is built, since only its signature knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longmix.config.nodes import build, check, locate, unknown_key
from longmix.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """A class or function, and what it is called with.

    Attributes:
        key: where the choice stands in the configuration, such as "mixer" or "mixer.flash"; messages begin with it.
        entries: `_target_` and the settings, as YAML has them and in its order; a setting may hold choices of its own.
    """

    key: str = field(compare=False)
    entries: Mapping[str, object]

    @classmethod
    def of(cls, key: str, value: object) -> "Choice":
        """The choice that a mapping with `_target_` describes.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(value, Mapping) or "_target_" not in value:
            raise ConfigError(
                f"{key}={value!r} is not a choice; it needs `_target_`, as the files in configs/{key} have."
            )
        return cls(key, copied(value))

    @property
    def target(self) -> str:
        """The full name of what is called, as it was given."""
        return str(self.entries["_target_"])

    @property
    def settings(self) -> dict[str, object]:
        """What it is called with."""
        return {name: value for name, value in self.entries.items() if name != "_target_"}

    @property
    def choices(self) -> tuple["Choice", ...]:
        """Itself, as a pattern of one would say."""
        return (self,)

    def number(self, name: str) -> int:
        """A setting that is a whole number.

        Raises:
            ConfigError: it has no value, or another one.
        """
        value = self.entries.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.key}.{name}={value!r} is not a whole number.")
        return value

    def having(self, **settings: object) -> "Choice":
        """The same choice with other values of some settings."""
        return Choice(self.key, {**self.entries, **settings})

    def located(self) -> Any:
        """The class or function.

        Raises:
            ConfigError: there is none of this name.
        """
        return locate(self.target, self.key)

    def check(self, supplied: set[str], kind: type | None = None) -> None:
        """Refuse settings that the class does not take, without building anything; see `longmix.config.check`."""
        check(self.entries, self.key, supplied, kind)

    def build(self, **supplied: Any) -> Any:
        """Check the settings and call the class or function with them, and with arguments that longmix gives.

        Raises:
            ConfigError: a setting is wrong; the message names its key.
        """
        return build(self.entries, self.key, **supplied)


@dataclass(frozen=True)
class Pattern:
    """Choices that repeat over the layers, as `mixer=sliding_window*3+flash` asks for.

    Attributes:
        key: where it stands in the configuration.
        entries: `pattern`, the names in the order of the layers, and the settings of each name.
        order: the names in the order of the layers.
        members: the choices by name.
    """

    key: str = field(compare=False)
    entries: Mapping[str, object]
    order: tuple[str, ...] = field(compare=False)
    members: Mapping[str, Choice] = field(compare=False)

    @classmethod
    def of(cls, key: str, value: Mapping[str, object]) -> "Pattern":
        """The pattern that a mapping with `pattern` describes.

        Raises:
            ConfigError: the pattern is empty, or it and the members do not belong together.
        """
        order = value["pattern"]
        if not isinstance(order, list) or not order:
            raise ConfigError(f"{key}.pattern={order!r} is not a list of at least one member's name.")
        names = [name for name in value if name != "pattern"]
        for name in order:
            if name not in names:
                raise ConfigError(f"{key}.pattern names {name}, which is not among its members {', '.join(names)}.")
        for name in names:
            if name not in order:
                raise ConfigError(unknown_key(f"{key}.{name}", name, ["pattern", *dict.fromkeys(order)]))
        members = {name: Choice.of(f"{key}.{name}", value[name]) for name in names}
        return cls(key, copied(value), tuple(order), members)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The members, each once."""
        return tuple(self.members.values())


def copied(value: object) -> Any:
    """Nested dicts and lists anew, so that whoever changes the given ones changes no configuration."""
    if isinstance(value, Mapping):
        return {name: copied(part) for name, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list | tuple) else value


def choice_or_pattern(key: str, value: object) -> Choice | Pattern:
    """What a mapping describes; one with `pattern` is a pattern.

    Raises:
        ConfigError: it is neither.
    """
    return Pattern.of(key, value) if isinstance(value, Mapping) and "pattern" in value else Choice.of(key, value)


def choices_by_name(key: str, value: object, problem: str) -> dict[str, Choice]:
    """Several choices of one group, by name.

    Raises:
        ConfigError: there is none, or one that is no choice; `problem` ends the message.
    """
    if not isinstance(value, Mapping) or not value or "_target_" in value:
        raise ConfigError(f"{key}={value!r} {problem}")
    return {str(name): Choice.of(f"{key}.{name}", each) for name, each in value.items()}
