"""Where configurations come from and go to: OmegaConf and mappings become dataclasses, and these become dicts again.

Inside, everything receives the dataclasses of `longmix.config.commands`. Only `config.yaml`, checkpoints, loggers and
Hydra hold dicts.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import omegaconf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longmix.config.choices import Choice, Pattern, choice_or_pattern, choices_by_name, copied
from longmix.config.nodes import unknown_key
from longmix.config.rules import check_values, default_of, defaults, is_group, is_words, listed_words, words_of
from longmix.config.values import LARGEST_INTEGER, whole
from longmix.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")
Plain = dict[str, Any]
"""A configuration as `config.yaml` and a checkpoint hold it: nested dicts, lists and values."""


def read(kind: type[Config], given: DictConfig | Mapping[str, object]) -> Config:
    """A command's configuration, every interpolation carried out and every word checked.

    What a choice of a group takes is checked where it is built.

    Args:
        kind: the command's class.
        given: what Hydra composed, or the same as dicts.

    Raises:
        ConfigError: an unknown word, with the nearest that there is; one without a value; a wrong type; a value beyond
            its range.
    """
    values: Plain = resolved(given) if isinstance(given, DictConfig) else dict(typing.cast(Plain, given))
    check_keys(values, kind)
    values = _with_whole_numbers(kind, values)
    check_values(kind, values)
    return _made(kind, values)


def plain(config: "DataclassInstance") -> Plain:
    """A configuration as `config.yaml`, checkpoints and loggers hold it, in the order of its fields."""
    found = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if value is not None or not entry.metadata.get("record"):
            found[entry.name] = _plain(value)
    return found


def _plain(value: object) -> Any:
    if isinstance(value, Choice | Pattern):
        return copied(value.entries)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [_given(item) for item in value]
    return plain(value) if is_dataclass(value) and not isinstance(value, type) else copied(value)


def _given(item: "DataclassInstance") -> Plain:
    """An item of a list of words, with those alone that say something."""
    usual = defaults(type(item))
    return {name: value for name, value in plain(item).items() if value != usual[name]}


def resolved(config: DictConfig) -> Plain:
    """What Hydra composed as plain dicts and values with every interpolation carried out.

    Raises:
        ConfigError: a mandatory key has no value, or an interpolation names a key that does not exist.
    """
    try:
        missing = sorted(_without_value(OmegaConf.to_container(config, resolve=False)))
        if missing:
            raise ConfigError(f"no value was given for: {', '.join(missing)}.")
        return typing.cast(Plain, OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error


def check_keys(given: Mapping[str, object], kind: type, prefix: str = "") -> None:
    """Refuse keys that a class has no word for, and the lack of one; Hydra lets `+key=value` and `~key` through.

    Raises:
        ConfigError: for an unknown key with the nearest allowed name.
    """
    allowed = words_of(kind)
    records = {entry.name for entry in dataclasses.fields(typing.cast(Any, kind))} - allowed.keys()
    for name in given:
        if name not in allowed and name not in records:
            raise ConfigError(unknown_key(f"{prefix}{name}", str(name), list(allowed)))
    missing = [f"{prefix}{name}" for name in allowed if name not in given]
    if missing:
        raise ConfigError(f"no value was given for: {', '.join(missing)}.")
    for name, (_, hint) in allowed.items():
        if is_words(hint):
            inner = given[name]
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{prefix}{name}={inner!r} is no group of words; give {prefix}{name}.WORD.")
            check_keys(inner, typing.cast(type, hint), f"{prefix}{name}.")
        items = listed_words(hint)
        if items is not None and isinstance(given[name], list | tuple):
            for number, item in enumerate(typing.cast(list[object], given[name])):
                if isinstance(item, Mapping):
                    check_keys(defaults(items) | dict(item), items, f"{prefix}{name}[{number}].")


def hydra_schema(kind: type) -> type:
    """The dataclass that Hydra is given for a configuration's class: it refuses unknown words and wrong types at once.

    It has the types that OmegaConf knows; `read` checks the rest.
    """
    entries: list[tuple[str, Any, Any]] = []
    for name, (entry, hint) in words_of(kind).items():
        if is_words(hint):
            inner = hydra_schema(typing.cast(type, hint))
            entries.append((name, inner, dataclasses.field(default_factory=inner)))
            continue
        default = default_of(entry)
        value: object = omegaconf.MISSING if default is dataclasses.MISSING else default
        own = dataclasses.field(default_factory=value.copy) if isinstance(value, list | dict) else value
        entries.append((name, _hydra_type(hint), own))
    return dataclasses.make_dataclass(kind.__name__, entries)


def _hydra_type(hint: Any) -> Any:
    """The type in OmegaConf's words: choices of groups, lists of words and unions are anything, literals are text."""
    if is_group(hint) or listed_words(hint) is not None:
        return Any
    if typing.get_origin(hint) is typing.Literal:
        return str
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return Any if len(options) > 1 else hint
    return hint


def _with_whole_numbers(kind: type, values: Plain) -> Plain:
    """The values, in which whole numbers of a list of words may have been written as 3e6, which Hydra reads as 3e6."""
    found = dict(values)
    for name, (_, hint) in words_of(kind).items():
        items = listed_words(hint)
        given = values[name]
        if items is None or not isinstance(given, list | tuple) or not all(isinstance(item, Mapping) for item in given):
            continue
        counts = [word for word, (_, inner) in words_of(items).items() if whole(inner)]
        found[name] = [
            {key: _as_whole(value) if key in counts else value for key, value in item.items()} for item in given
        ]
    return found


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_INTEGER else value


def _made(kind: type[Config], values: Mapping[str, object]) -> Config:
    made = {}
    for name, (entry, hint) in words_of(kind).items():
        items = listed_words(hint)
        if is_words(hint):
            made[name] = _made(hint, typing.cast(Plain, values[name]))
        elif items is not None:
            given = typing.cast(list[Plain] | None, values[name])
            made[name] = None if given is None else [_made(items, defaults(items) | item) for item in given]
        else:
            made[name] = _chosen(name, values[name], entry, hint) if is_group(hint) else values[name]
    return kind(**made)


def _chosen(key: str, value: object, entry: Field[Any], hint: Any) -> Choice | Pattern | dict[str, Choice] | None:
    if typing.get_origin(hint) is dict:
        return choices_by_name(key, value, entry.metadata["misfit"])
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    return choice_or_pattern(key, value) if Pattern in options else Choice.of(key, value)


def _without_value(value: object, key: str = "") -> list[str]:
    """Mandatory keys without a value; `OmegaConf.missing_keys` fails where an interpolation leads to one."""
    if value == "???":
        return [key]
    if isinstance(value, list):
        return [found for number, part in enumerate(value) for found in _without_value(part, f"{key}[{number}]")]
    if not isinstance(value, dict):
        return []
    return [found for name, part in value.items() for found in _without_value(part, f"{key}.{name}" if key else name)]
