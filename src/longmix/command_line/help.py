"""What `-h` and `--version` print: every word with its default and meaning, every group with its choices."""

import dataclasses
import importlib.metadata
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from longmix.command_line.schema import SCHEMAS, Schema
from longmix.config import unknown_key
from longmix.errors import ConfigError

WIDTH = 120
VERSIONED = ("torch", "triton", "lightning", "hydra-core")

RULES = """\
A choice's settings are words too: GROUP.SETTING=VALUE. `-h GROUP=CHOICE` lists them with their meaning, and
`--cfg job` prints every setting with its value. A text may hold any character; quote it for the shell where the shell
asks for it: 'prompt=Who goes there?'. Whole numbers may be written as 3e6 or 3_000_000. The last of equal words counts.
"""


def help_text(schema: Schema, asked: Sequence[str] = ()) -> str:
    """The help of a command, or of the choices that are asked about.

    Args:
        schema: the command's.
        asked: words such as `task=needle` or `task`.

    Raises:
        ConfigError: there is no such choice.
    """
    pages = [page for word in asked for page in _pages_of(schema, word)]
    if pages:
        return "\n".join(pages)
    head = OmegaConf.to_container(schema.primary, resolve=False)["hydra"]["help"]["template"]  # type: ignore[index,call-overload]
    groups = [line for group, default in schema.groups.items() for line in _group_lines(schema, group, default)]
    if schema.command == "train":
        groups += [line for group in SWEEP_GROUPS for line in _group_lines(schema, group, "basic")]
    words = [line for name, default, text in _words(schema) for line in _entry(f"{name}={_written(default)}", text)]
    chosen = ["Words that choose a file", *groups, "", "Other words"] if groups else ["Words"]
    return "\n".join([head.rstrip(), "", *chosen, *words, "", RULES.rstrip()])


def version_text() -> str:
    """Versions of longmix and of what it runs on."""
    found = []
    for package in VERSIONED:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"longmix {importlib.metadata.version('longmix')} ({', '.join(found)})"


def meanings(schema: type) -> dict[str, str]:
    """What each field of a dataclass means, as its docstring says."""
    text = inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): ((?:.|\n(?!    \w[\w, ]*: |\S))*)", text, re.MULTILINE)
    return {
        name: " ".join(meaning.split()).rstrip(".").replace("`", "")
        for names, meaning in entries
        for name in names.split(", ")
    }


def _words(schema: Schema) -> Iterator[tuple[str, Any, str]]:
    """Dotted words that give a value: name, default, meaning."""
    primary = OmegaConf.to_container(schema.primary, resolve=False)
    yield from _words_of(SCHEMAS[schema.command], typing.cast(dict[str, Any], primary), set(schema.groups))


def _words_of(
    schema: type, values: dict[str, Any], groups: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any, str]]:
    hints, texts = typing.get_type_hints(schema), meanings(schema)
    for entry in dataclasses.fields(schema):
        if entry.name in groups:
            continue
        if dataclasses.is_dataclass(hints[entry.name]):
            inner = typing.cast(type, hints[entry.name])
            yield from _words_of(inner, values.get(entry.name, {}), set(), f"{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", values.get(entry.name), texts[entry.name]


def _written(value: Any) -> str:
    if isinstance(value, str):
        return "(required)" if value == "???" else "(date, time, mixer, model, seq_len)" if "${" in value else value
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)  # 1 == True, so numbers stay out of the table


def _entry(head: str, text: str) -> list[str]:
    """A word and its meaning, the latter in a column."""
    indent = " " * 34
    lines = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)
    first = f"  {head}".ljust(len(indent))
    if len(first) > len(indent):
        return [first, *(indent + line for line in lines)]
    return [first + lines[0], *(indent + line for line in lines[1:])]


def _group_lines(schema: Schema, group: str, default: Any) -> list[str]:
    texts = meanings(SCHEMAS[schema.command])
    shown = _written(list(default) if isinstance(default, list) or OmegaConf.is_list(default) else default)
    meaning = texts.get(group) or GROUP_MEANINGS[group]
    return _entry(f"{group}={shown}", f"{meaning}: {', '.join(schema.choices(group))}")


GROUP_MEANINGS = {
    "block": "the layer around the mixer; a mixer may bring its own",
    "experiment": "a set of words in a file, which other words go on to change",
    "hydra/launcher": "where the runs of a sweep (-m) take place",
    "hydra/sweeper": "which values a sweep (-m) tries",
}
"""Groups that are no field of a dataclass."""

SWEEP_GROUPS = ("hydra/launcher", "hydra/sweeper")


def _pages_of(schema: Schema, word: str) -> Iterator[str]:
    """The files of the choices that a word names, with their comments."""
    group, equals, choice = word.partition("=")
    if group not in schema.groups and group not in SWEEP_GROUPS:
        return
    if not equals:
        yield "\n".join(_group_lines(schema, group, schema.groups.get(group, "basic")))
        return
    for name in re.split(r"[,+]", choice.strip("[]")):
        plain = name.partition("*")[0].strip()
        if plain not in schema.choices(group):
            raise ConfigError(unknown_key(f"{group}={plain}", plain, schema.choices(group)).replace("Keys", "Choices"))
        place = {"task": f"task.{plain}", "block": "model"}.get(group, group.replace("/", "."))
        text = schema.file(group, plain).read_text(encoding="utf-8").rstrip()
        rows = [line for line in text.splitlines() if not line.startswith("# @package")]
        scope = "words of the top" if group == "experiment" else f"{place}.SETTING=VALUE"
        yield f"{group}={plain} ({scope})\n" + textwrap.indent("\n".join(rows), "  ") + "\n"
