"""The text of `-h WORD`: the file of a choice, the meaning of a word, or the files that have a setting."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf

from longmix.command_line.entries import SWEEP_GROUPS, entry, group_lines, words, written
from longmix.command_line.explain import no_such_choice
from longmix.command_line.schema import Schema
from longmix.command_line.unknown_words import foreign, unknown_word
from longmix.command_line.words import Word
from longmix.errors import ConfigError
from longmix.printable import printable


def pages_of(schema: Schema, argument: str) -> list[str]:
    """The help on one word.

    Args:
        schema: of the command.
        argument: a group, a choice such as mixer=rwkv7, a word, or a setting such as mixer.window.

    Raises:
        ConfigError: there is no such word or choice.
    """
    word = Word.read(argument)
    if word.name in schema.groups or word.name in SWEEP_GROUPS:
        if not word.value:
            return ["\n".join(group_lines(schema, word.name, schema.groups.get(word.name, "basic")))]
        return [_file_page(schema, word.name, choice) for choice in _choices(schema, word.name, word.value)]
    if word.value and word.name in schema.changed_groups:
        raise ConfigError(foreign(schema, word))
    lines = _meanings(schema, word.name)
    if lines:
        return ["\n".join(lines)]
    found = list(_settings(schema, word.name))
    return found or [_composed_page(schema, word.name)]


def _choices(schema: Schema, group: str, value: str) -> list[str]:
    names = [name.partition("*")[0].strip(" '\"") for name in re.split(r"[,+]", value.strip("[]"))]
    for name in names:
        if name not in schema.choices(group) and not (name == "basic" and group in SWEEP_GROUPS):
            raise ConfigError(no_such_choice(schema, group, name))
    return list(dict.fromkeys(names))


def _file_page(schema: Schema, group: str, choice: str) -> str:
    """A choice's file with its comments."""
    if choice not in schema.choices(group):
        return f"{group}={choice} is Hydra's own: the runs take place one after the other in this process.\n"
    rows = [line for line in _text(schema, group, choice).splitlines() if not line.startswith("# @package")]
    scope = "words of the top" if group == "experiment" else f"{_key_of(schema, group, choice)}.SETTING=VALUE"
    return f"{group}={choice} ({scope})\n" + textwrap.indent("\n".join(rows), "  ") + "\n"


def _meanings(schema: Schema, name: str) -> list[str]:
    """The entries of a word, or of all words below a name such as loop."""
    return [
        line
        for full, default, text in words(schema)
        if full == name or full.startswith(f"{name}.")
        for line in entry(f"{full}={written(default)}", text)
    ]


def _settings(schema: Schema, name: str) -> Iterator[str]:
    """The lines about a setting in the file of every choice that has it."""
    for group in (*schema.groups, *schema.changed_groups, *SWEEP_GROUPS):
        for choice in schema.choices(group) if group != "experiment" else ():
            keys = [_key_of(schema, group, choice)]
            if group == "mixer":
                keys.append(f"mixer.{choice}")  # a member of a pattern
            for key in keys:
                if not name.startswith(f"{key}."):
                    continue
                lines = _lines_of(_text(schema, group, choice), name[len(key) + 1 :].split("."))
                if lines:
                    yield f"{group}={choice} ({name}=VALUE)\n" + textwrap.indent("\n".join(lines), "  ") + "\n"


def _lines_of(text: str, path: list[str]) -> list[str]:
    """A setting's lines in a file, with the comments above it; none where it has no such setting."""
    rows, node, first, last = text.splitlines(), yaml.compose(text), 0, 0
    for part in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in entries if key.value == part), None)
        if found is None or part == "_target_":
            return []
        first, node = found[0].start_mark.line, found[1]
        last = max(first + 1, node.end_mark.line + (node.end_mark.column > 0))
    indent = re.match(" *", rows[first])[0]  # type: ignore[index]
    while first > 1 and rows[first - 1].startswith(f"{indent}#"):  # the first line is the file's
        first -= 1
    return textwrap.dedent("\n".join(rows[first:last])).rstrip().splitlines()


def _composed_page(schema: Schema, name: str) -> str:
    """The help on a word that no file of the command holds, such as one of Hydra's.

    Raises:
        ConfigError: there is no such word.
    """
    chosen = [f"{group}={name}" for group in schema.groups if name in schema.choices(group)]
    if chosen:
        asked = " or ".join(f"-h {choice}" for choice in chosen)
        raise ConfigError(f"{name} is no word but a choice; write {asked}.")
    problem = unknown_word(schema, name)
    if problem:
        raise ConfigError(problem)
    node: Any = schema.composed([])
    for part in name.split("."):
        node = node[part]
    if isinstance(node, dict | list):
        return f"{name}\n" + textwrap.indent(OmegaConf.to_yaml(OmegaConf.create(node)).rstrip(), "  ")
    return "  " + shlex.quote(printable(f"{name}={written(node)}" if node is None else f"{name}={node}"))


def _key_of(schema: Schema, group: str, choice: str) -> str:
    """The key under which a choice's settings stand in the configuration."""
    package = re.match(r"# @package (\S+)", _text(schema, group, choice))
    return package[1] if package else group.replace("/", ".")


def _text(schema: Schema, group: str, choice: str) -> str:
    return schema.file(group, choice).read_text(encoding="utf-8").rstrip()
