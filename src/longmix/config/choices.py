"""The choices that a configuration makes in its groups: a class with its settings, or a pattern over several.

A choice is a value: two with equal settings are equal, and nobody changes one. The settings are checked where the
choice is built, since only the signature of the class says which it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longmix.config.nodes import build, check, locate, unknown_key
from longmix.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """A class or function, and the settings to call it with.

    Attributes:
        key: the place of the choice in the configuration, such as "mixer" or "mixer.flash"; messages begin with it.
        entries: `_target_` and the settings, as YAML has them and in its order; a setting may hold choices of its own.
    """

    key: str = field(compare=False)
    entries: Mapping[str, object]

    @classmethod
    def of(cls, key: str, value: object) -> "Choice":
        """Return the choice that a mapping describes.

        Args:
            key: the place of the choice in the configuration.
            value: a mapping with `_target_`.

        Raises:
            ConfigError: the value is no such mapping.
        """
        if not isinstance(value, Mapping) or "_target_" not in value:
            group = key.partition(".")[0]
            raise ConfigError(
                f"{key}={value!r} is not a choice; it needs `_target_`, as the files in configs/{group} have."
            )
        return cls(key, copied(value))

    @property
    def target(self) -> str:
        """Return the full name of the class or function, as it was given."""
        return str(self.entries["_target_"])

    @property
    def settings(self) -> dict[str, object]:
        """Return the settings by name."""
        return {name: value for name, value in self.entries.items() if name != "_target_"}

    @property
    def choices(self) -> tuple["Choice", ...]:
        """Return the choice itself, as the one member of a pattern."""
        return (self,)

    def number(self, name: str) -> int:
        """Return a setting that must be a whole number.

        Raises:
            ConfigError: the setting has no value, or it is something else.
        """
        value = self.entries.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.key}.{name}={value!r} is not a whole number.")
        return value

    def having(self, **settings: object) -> "Choice":
        """Return the same choice with other values of some settings."""
        return Choice(self.key, {**self.entries, **settings})

    def located(self) -> Any:
        """Return the class or function.

        Raises:
            ConfigError: there is none of this name.
        """
        return locate(self.target, self.key)

    def check(self, supplied: set[str], kind: type | None = None) -> None:
        """Check the settings as `build` does, but without building anything.

        Args:
            supplied: the names of the arguments that longmix will give.
            kind: the class that the choice must be or derive from; None or a protocol allows any.

        Raises:
            ConfigError: a setting is wrong; the message names its key.
        """
        check(self.entries, self.key, supplied, kind)

    def build(self, **supplied: Any) -> Any:
        """Check the settings, and return what the class or function returns for them.

        Args:
            supplied: arguments that longmix gives besides the settings.

        Raises:
            ConfigError: a setting is wrong; the message names its key.
        """
        return build(self.entries, self.key, **supplied)


@dataclass(frozen=True)
class Pattern:
    """Choices that repeat over the layers, as `mixer=sliding_window*3+flash` asks for.

    Attributes:
        key: the place of the pattern in the configuration.
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
        """Return the pattern that a mapping describes.

        Args:
            key: the place of the pattern in the configuration.
            value: a mapping with `pattern` and the settings of each name in it.

        Raises:
            ConfigError: the pattern is empty, or names a member that is missing, or lacks one that is there.
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
        """Return the members, each once."""
        return tuple(self.members.values())


def copied(value: object) -> Any:
    """Return a copy of nested dicts and lists, so that a change of the given ones changes no configuration."""
    if isinstance(value, Mapping):
        return {name: copied(part) for name, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list | tuple) else value


def choice_or_pattern(key: str, value: object) -> Choice | Pattern:
    """Return what a mapping describes: a pattern if it has `pattern`, else a choice.

    Args:
        key: the place of the value in the configuration.
        value: the mapping.

    Raises:
        ConfigError: the value describes neither.
    """
    return Pattern.of(key, value) if isinstance(value, Mapping) and "pattern" in value else Choice.of(key, value)


def choices_by_name(key: str, value: object, problem: str) -> dict[str, Choice]:
    """Return several choices of one group, by name.

    Args:
        key: the place of the group in the configuration.
        value: a mapping of names to choices.
        problem: the end of the message if the value is no such mapping, or has no choice.

    Raises:
        ConfigError: there is no choice, or a value that is none.
    """
    if not isinstance(value, Mapping) or not value or "_target_" in value:
        raise ConfigError(f"{key}={value!r} {problem}")
    return {str(name): Choice.of(f"{key}.{name}", each) for name, each in value.items()}
