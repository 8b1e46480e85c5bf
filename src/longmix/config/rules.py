"""What a word of a command may be besides its type: its range stands on its field, and one checker reads it."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, is_dataclass
from typing import Any

from longmix.config.choices import Choice, Pattern
from longmix.config.values import as_given, fits, misfit
from longmix.errors import ConfigError
from longmix.paths import check_path


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values of a type are allowed; null always is, where the type has it.

    Attributes:
        allows: whether a value is allowed.
        says: the end of a message that begins with the word and its value.
    """

    allows: Callable[[Any], bool]
    says: str


def at_least(least: int) -> Rule:
    """Numbers from `least` on."""
    return Rule(lambda value: value >= least, f"must be at least {least}.")


def between(least: int, most: int) -> Rule:
    """Numbers from `least` to `most`."""
    return Rule(lambda value: least <= value <= most, f"must lie between {least} and {most}.")


def count_up_to(most: int, written: str) -> Rule:
    """Counts from 1 to `most`, which a message calls `written`."""
    return Rule(lambda value: 1 <= value <= most, f"must be at least 1 and at most {written}.")


def share() -> Rule:
    """Numbers from 0 on that are below 1."""
    return Rule(lambda value: 0 <= value < 1, "must be at least 0 and below 1.")


def inside_share(null: str) -> Rule:
    """Numbers above 0 that are below 1; `null` says what null means."""
    return Rule(lambda value: 0 < value < 1, f"must be above 0 and below 1, or null to {null}.")


def above(least: float) -> Rule:
    """Numbers above `least`."""
    return Rule(lambda value: value > least, f"must be above {least}.")


def above_zero(null: str) -> Rule:
    """Numbers above 0; `null` says what null means."""
    return Rule(lambda value: value > 0, f"must be above 0, or null to {null}.")


def word(
    default: Any = MISSING,
    rule: Rule | None = None,
    *,
    path: bool = False,
    literal: bool = False,
    misfit: str | None = None,
) -> Any:
    """A field of a command's configuration.

    Args:
        default: its value where nobody gives one, which is not shared: a list or dict is copied. None at all must be
            given.
        rule: which values of its type are allowed.
        path: it names a file or folder, and is not empty.
        literal: it is text of the user's, which no grammar reads.
        misfit: the end of the message for a value of another type, where the type's own says less.
    """
    metadata = {"rule": rule, "path": path, "literal": literal, "misfit": misfit}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def record() -> Any:
    """A field that no word gives: longmix itself notes something there."""
    return dataclasses.field(default=None, metadata={"record": True})


def is_word(entry: Field[Any]) -> bool:
    """Whether a field stands for a word or a group of words."""
    return not entry.metadata.get("record")


def words_of(kind: type) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of every word of a configuration's class, by name."""
    hints = typing.get_type_hints(kind)
    return {entry.name: (entry, hints[entry.name]) for entry in dataclasses.fields(kind) if is_word(entry)}


def default_of(entry: Field[Any]) -> Any:
    """The value of a field that nobody gives; `dataclasses.MISSING` if it must be given."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def defaults(kind: type) -> dict[str, Any]:
    """The values of a configuration's words that nobody gives, by name; those that must be given are left out."""
    values = {name: default_of(entry) for name, (entry, _) in words_of(kind).items()}
    return {name: value for name, value in values.items() if value is not MISSING}


def is_group(hint: Any) -> bool:
    """Whether words of this type are choices of a group: what a choice takes is checked where it is built."""
    options = (hint, *typing.get_args(hint))
    return any(option in (Choice, Pattern) for option in options)


def is_words(hint: Any) -> bool:
    """Whether a field holds words of its own, as `loop` does."""
    return is_dataclass(hint) and not is_group(hint)


def listed_words(hint: Any) -> type | None:
    """The class of words that a field holds a list of, as `stages` does; None for any other field."""
    for option in (hint, *typing.get_args(hint)):
        inner = typing.get_args(option) if typing.get_origin(option) is list else ()
        if inner and is_words(inner[0]):
            return typing.cast(type, inner[0])
    return None


def check_values(kind: type, given: dict[str, Any], prefix: str = "") -> None:
    """Refuse values that are not of their fields' types or beyond their ranges.

    Raises:
        ConfigError: naming the word.
    """
    for name, (entry, hint) in words_of(kind).items():
        value, key = given[name], f"{prefix}{name}"
        if is_group(hint):
            continue
        if is_words(hint):
            check_values(typing.cast(type, hint), value, f"{key}.")
            continue
        if not fits(value, hint):
            raise ConfigError(f"{key}={as_given(value)} {entry.metadata.get('misfit') or misfit(value, hint)}")
        if entry.metadata.get("path") and value is not None:
            check_path(key, value, needed=default_of(entry) is MISSING)
        items = listed_words(hint)
        if items is not None:
            for number, item in enumerate(value or ()):
                check_values(items, defaults(items) | item, f"{key}[{number}].")
        rule: Rule | None = entry.metadata.get("rule")
        if rule is not None and value is not None and not rule.allows(value):
            raise ConfigError(f"{key}={value} {rule.says}")


LARGEST_INDEX = 2**62
"""Of numbers that count tokens and windows; beyond it nothing can be indexed."""


def _is_length(value: int | list[int]) -> bool:
    lengths = value if isinstance(value, list) else [value]
    return bool(lengths) and all(1 <= length <= LARGEST_INDEX for length in lengths)


COUNT = count_up_to(LARGEST_INDEX, "2**62")
LENGTHS = Rule(_is_length, "must be a whole number from 1, or a list of them.")
