"""Checks whether a value fits the type of a setting, and words the message if it does not."""

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_INTEGER = 2**63 - 1
"""The largest integer of torch and NumPy."""

LARGEST_SEED = 2**32 - 1
"""The largest seed of NumPy's global generator."""


def fits(value: object, hint: Any) -> bool:
    """Whether a value from YAML or the command line is one of the type `hint`; a number must be finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if hint is type(None) or hint is None:
        return value is None
    if hint is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if getattr(hint, "_is_protocol", False):  # such an object comes from a node of its own
        return False
    if hasattr(hint, "words_as_written"):  # a class of words, as a list of stages has
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return isinstance(value, hint) if inspect.isclass(hint) else True


def described(hint: Any) -> str:
    """The values of a type, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple, Sequence):
        if arguments == (Any,):
            return "a list"
        return f"a list, each {' or '.join(described(item) for item in arguments if item is not Ellipsis)}"
    if origin in (dict, Mapping):
        return f"a dict of names and values, each {described(arguments[1])}"
    if hasattr(hint, "words_as_written"):
        return f"with words such as {hint.words_as_written}"
    if hint is Any:
        return "anything"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint not in names and inspect.isclass(hint):
        return f"a {hint.__name__}; it needs a `_target_`"
    return names.get(hint, str(hint).replace("typing.", ""))


def as_given(value: object) -> str:
    """A value as it is written in messages: in YAML's words, and texts in quotes."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_given, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {as_given(item)}' for name, item in value.items())}}}"
    return repr(value)


def misfit(value: object, hint: Any) -> str:
    """The end of a sentence that begins with a setting, and says why its value does not fit its type.

    Args:
        value: as it came from YAML or the command line.
        hint: the type.
    """
    found = too_large(value) if whole(hint) else ""
    return found or f"is not {described(hint)}."


def too_large(value: object) -> str:
    """The message for a whole number, or one in a list, that torch and NumPy cannot hold; "" if none is."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(too_large, value)), "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, float) and (math.isnan(value) or (math.isfinite(value) and value != int(value))):
        return ""
    if abs(value) <= LARGEST_INTEGER:
        return ""
    size, way = ("small", "down to -") if value < 0 else ("large", "up to ")
    return f"is too {size}; whole numbers go {way}{LARGEST_INTEGER}."


def whole(hint: Any) -> bool:
    """Whether a type takes whole numbers, or lists of them, and no other numbers."""
    options = {hint, *typing.get_args(hint)}
    options |= {inner for option in options for inner in typing.get_args(option)}
    return int in options and float not in options
