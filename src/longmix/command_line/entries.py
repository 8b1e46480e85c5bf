"""Words with their defaults and meanings, as the help prints them."""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from longmix.command_line.schema import SCHEMAS, Schema
from longmix.config import default_of, words_of

WIDTH = 120


def meanings(schema: type) -> dict[str, str]:
    """The meaning of each field of a dataclass, from its docstring."""
    text = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): ((?:.|\n(?!    \w[\w, ]*: |\S))*)", text, re.MULTILINE)
    return {
        name: " ".join(meaning.split()).rstrip(".").replace("`", "")
        for names, meaning in entries
        for name in names.split(", ")
    }


def words(schema: Schema) -> Iterator[tuple[str, Any, str]]:
    """The words that give a value, dotted, each with default and meaning."""
    primary = OmegaConf.to_container(schema.primary, resolve=False)
    yield from _words_of(SCHEMAS[schema.command], typing.cast(dict[str, Any], primary), set(schema.groups))


def _words_of(
    schema: type, values: dict[str, Any], groups: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any, str]]:
    texts = meanings(schema)
    for name, (field, hint) in words_of(schema).items():
        if name in groups:
            continue
        if dataclasses.is_dataclass(hint):
            yield from _words_of(typing.cast(type, hint), {}, set(), f"{name}.")
        else:
            default = default_of(field)
            value = values.get(name, "???") if default is dataclasses.MISSING else default
            yield f"{prefix}{name}", value, texts[name]


def written(value: Any) -> str:
    """A default as it is written on a command line."""
    if isinstance(value, str):
        return "(required)" if value == "???" else "(date, time, mixer, model, seq_len)" if "${" in value else value
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)  # numbers stay out of the table, because 1 == True


def entry(head: str, text: str) -> list[str]:
    """A word and its meaning, the latter in a column."""
    indent = " " * 34
    lines = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)
    first = f"  {head}".ljust(len(indent))
    if len(first) > len(indent):
        return [first, *(indent + line for line in lines)]
    return [first + lines[0], *(indent + line for line in lines[1:])]


def group_lines(schema: Schema, group: str, default: Any) -> list[str]:
    """A group with its default, its meaning and its choices."""
    texts = meanings(SCHEMAS[schema.command])
    shown = written(list(default) if isinstance(default, list) or OmegaConf.is_list(default) else default)
    meaning = texts.get(group) or GROUP_MEANINGS[group]
    return entry(f"{group}={shown}", f"{meaning}: {', '.join(schema.choices(group))}")


GROUP_MEANINGS = {
    "block": "the layer around the mixer; a mixer may bring its own",
    "experiment": "a set of words in a file, which other words go on to change",
    "hydra/launcher": "where the runs of a sweep (-m) take place",
    "hydra/sweeper": "which values a sweep (-m) tries",
}
"""The meanings of groups that no dataclass has a field for."""

SWEEP_GROUPS = ("hydra/launcher", "hydra/sweeper")
