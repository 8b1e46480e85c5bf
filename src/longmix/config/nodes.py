"""Nodes with `_target_`: checked against the signature of the class or function that they name, and built.

The signature is the schema, so adding a mixer or a corpus means writing one class and one YAML file and nothing else.
"""

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longmix.aliases import path_now
from longmix.config.values import as_given, described, fits, misfit
from longmix.errors import ConfigError, settings_at
from longmix.wording import did_you_mean, nearest

PLAIN_MODULES = ("builtins", "pathlib", "typing", "types", "collections.abc")
"""Classes of these modules are plain values, never nodes."""


def locate(path: str, key: str) -> Callable[..., Any]:
    """Import the class or function a `_target_` names; a `ConfigError` names `key` if there is none."""
    module_name, _, name = path_now(str(path)).rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={path} cannot be imported: {error}.") from error
    if not callable(target):
        raise ConfigError(f"{key}._target_={path} is a {type(target).__name__}; name a class or a function in it.")
    return target


def build(node: Mapping[str, object], key: str, **supplied: Any) -> Any:
    """Check a `_target_` node against its callable's signature and call it.

    Args:
        node: the settings with `_target_`; nested `_target_` nodes, also in a dict or list, are built first.
        key: where the node stands in the configuration, for messages. A class whose messages name its settings by the
            place where they usually stand says so by `usual_place`, such as "data.corpus".
        supplied: arguments that longmix gives; the configuration may not set them.
    """
    check(node, key, set(supplied))
    target = locate(str(node["_target_"]), key)
    hints = settings(target)
    with settings_at(key, getattr(target, "usual_place", key)):
        own = {
            name: _built_value(value, hints[name], f"{key}.{name}")
            for name, value in node.items()
            if name != "_target_"
        }
        return target(**own, **supplied)


def _built_value(value: object, hint: Any, key: str) -> Any:
    """A setting for its callable: built if the type hint asks for an object from a node, else unchanged."""
    kind, several = node_kind(hint)
    if kind is None:
        return value
    if several and isinstance(value, list):
        return [build(part, place) for place, part in _members(value, key)]
    if several and isinstance(value, dict):
        return {name: build(part, f"{key}.{name}") for name, part in value.items()}
    return build(value, key) if isinstance(value, dict) else value


def _members(value: dict[str, Any] | list[Any], key: str) -> list[tuple[str, Any]]:
    """The nodes in a dict or list, each with its place in the configuration."""
    if isinstance(value, dict):
        return [(f"{key}.{name}", part) for name, part in value.items()]
    return [(f"{key}[{number}]", part) for number, part in enumerate(value)]


def node_kind(hint: Any) -> tuple[type | None, bool]:
    """The class or protocol whose instances a setting takes, each from a `_target_` node of its own.

    Returns:
        The kind, None where the setting is a plain value; and whether it takes several, in a dict by name or a list.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [node_kind(option) for option in arguments]
        return next((option for option in found if option[0] is not None), (None, False))
    if origin in (dict, Mapping):
        return node_kind(arguments[1])[0], True
    if origin in (list, tuple, Sequence):
        return node_kind(arguments[0])[0], True
    is_kind = inspect.isclass(hint) and origin is None and hint.__module__ not in PLAIN_MODULES
    return (hint if is_kind else None), False


def holds_target(value: object) -> bool:
    """Whether a `_target_` stands anywhere in a setting."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(holds_target, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_target, value))


def check(node: object, key: str, supplied: set[str], kind: type | None = None) -> None:
    """Refuse unknown, missing and wrongly typed settings of a `_target_` node, naming the key.

    A node within is allowed where the signature asks for an object of some class or protocol, and nowhere else.

    Args:
        node: the settings with `_target_`.
        key: where the node stands in the configuration.
        supplied: names of the arguments that longmix gives.
        kind: base class of what the node stands for; None or a protocol takes any.

    Raises:
        ConfigError: with the nearest allowed name for an unknown key.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{key}={node!r} is not a choice; it needs `_target_`, as the files in configs/{key} have.")
    target = locate(node["_target_"], key)
    is_open = kind is None or getattr(kind, "_is_protocol", False)
    if kind is not None and not is_open and not (inspect.isclass(target) and issubclass(target, kind)):
        raise ConfigError(f"{key}._target_={node['_target_']} is no class of {kind.__name__}, which {key} needs.")
    parameters = inspect.signature(target).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    for name in supplied:
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(f"{key}._target_={node['_target_']} cannot stand for {key}: it takes no argument {name}.")
    hints = settings(target)
    settable = [name for name in hints if name not in supplied]
    for name in node:
        if name != "_target_" and name not in settable:
            raise ConfigError(unknown_key(f"{key}.{name}", name, settable))
    for name in settable:
        needed = name in parameters and parameters[name].default is inspect.Parameter.empty
        if needed and name not in node:
            raise ConfigError(f"{key}.{name} has no value, and {node['_target_']} needs one.")
    for name, value in node.items():
        if name == "_target_":
            continue
        inner_kind, several = node_kind(hints[name])
        if inner_kind is not None and isinstance(value, dict | list if several else dict):
            for place, part in _members(value, f"{key}.{name}") if several else [(f"{key}.{name}", value)]:
                check(part, place, set(), inner_kind)
        elif holds_target(value):
            raise ConfigError(f"{key}.{name} holds a `_target_`, and it must be {described(hints[name])}.")
        elif not fits(value, hints[name]):
            raise ConfigError(f"{key}.{name}={as_given(value)} {misfit(value, hints[name])}")


@functools.cache
def settings(target: Callable[..., Any]) -> dict[str, Any]:
    """Names and type hints of the arguments of a callable; `**options: Unpack[Options]` stands for its keys."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if typing.get_origin(hint) is typing.Unpack:
                found |= typing.get_type_hints(typing.get_args(hint)[0])
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = hint
    return found


def default_setting(target: Callable[..., Any], name: str) -> Any:
    """The value of a setting that nobody gives: that of the callable, or of the base class which takes its options.

    Returns:
        `inspect.Parameter.empty` where it must be given, or there is no such setting.
    """
    if name not in settings(target):
        return inspect.Parameter.empty
    for taker in target.__mro__ if inspect.isclass(target) else (target,):
        parameter = inspect.signature(taker).parameters.get(name)
        if parameter is not None:
            return parameter.default
    return inspect.Parameter.empty


def unknown_key(full_key: str, name: str, allowed: list[str]) -> str:
    """The message for a key that does not exist."""
    return (
        f"unknown key {full_key}.{did_you_mean(nearest(name, allowed))} Keys there are: {', '.join(allowed) or 'none'}."
    )
