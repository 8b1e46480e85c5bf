"""What is wrong with a configuration file of the user's own, in one line that names the file."""

import re
from pathlib import Path

from yaml import MarkedYAMLError, YAMLError

from longmix.command_line.schema import Schema
from longmix.command_line.unknown_words import wrong_word
from longmix.command_line.words import Word

UNKNOWN = re.compile(r"In '(?P<file>[^']+)': \w+ raised while composing config:\s*Key '(?P<key>[^']+)' not in '\w+'")
FULL_KEY = re.compile(r"full_key: (\S+)")


def not_yaml(error: YAMLError) -> str:
    """The message for a file that is not YAML."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"a configuration file is not valid YAML: {' '.join(str(error).split())}."
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}"
    return f"{mark.name} is not valid YAML: {where}: {error.problem}."


def in_file(schema: Schema, error: BaseException) -> str | None:
    """The message for a word in a file that the command does not have; None if `error` is another."""
    found = UNKNOWN.search(str(error))
    if found is None:
        return None
    group, _, choice = found["file"].rpartition("/")
    file = schema.file(group, choice) if group else Path(f"{choice}.yaml")
    if group and found["key"] == group.partition("/")[0]:
        return (
            f"{file} needs `# @package _global_` as its first line, or its words are those of a group "
            f"{group}, which has none."
        )
    full = FULL_KEY.search(str(error))
    name = full[1] if full else found["key"]
    problem = wrong_word(schema, schema.composed([]), Word(name, "", name, None))
    return f"{file}: {problem}" if problem else None
