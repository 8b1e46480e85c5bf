"""Values as Hydra reads them: a text stays the text that was typed, a whole number may be written as 3e6.

What a word takes decides: `name=1e5` is a text, `max_tokens=3e6` a number. Hydra's own grammar knows no types, refuses
most characters outside ASCII, and takes commas, blanks and brackets for syntax.

A value that is wholly in single quotes, or `null`, is Hydra's to read; one in double quotes is read as JSON, so that
"\\n" is a new line.
"""

import json
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from antlr4.error.Errors import RecognitionException
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse as parse_interpolations

LARGEST_INTEGER = 2**63 - 1
PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
RESERVED = {"null", "true", "false", "inf", "nan"}
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)
DIGITS = r"\d+(_\d+)*"  # an underscore stands between two digits
NUMBER = re.compile(rf"[+-]?({DIGITS}(\.({DIGITS})?)?|\.{DIGITS})([eE][+-]?\d{{1,3}})?", re.ASCII)


@dataclass(frozen=True)
class Takes:
    """The type of a word.

    Attributes:
        hint: its type.
        path: it names a file or folder, so that a leading ~ is the home folder.
        literal: `${` in it is text and never an interpolation.
    """

    hint: Any
    path: bool = False
    literal: bool = False

    @property
    def options(self) -> set[Any]:
        """The members of its union, or its one type."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return set(typing.get_args(self.hint)) if union else {self.hint}

    @property
    def text(self) -> bool:
        """Whether it may be a text."""
        return str in self.options

    @property
    def texts(self) -> bool:
        """Whether it may be a list of texts."""
        return any(_is_list(option) and str in typing.get_args(option) for option in self.options)

    @property
    def whole(self) -> bool:
        """Whether it may be a whole number or a list of these, and may not be a text."""
        numbers = any(option is int or (_is_list(option) and int in typing.get_args(option)) for option in self.options)
        return numbers and not self.text


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, tuple, Sequence)


def is_plain(value: str) -> bool:
    """Whether Hydra reads the value as exactly this text."""
    return value == "" or (PLAIN.fullmatch(value) is not None and value.lower() not in RESERVED)


def as_hydra_reads(value: str, takes: Takes, sweep: bool) -> str:
    """The value in Hydra's grammar.

    Args:
        value: as it was typed.
        takes: what the word takes.
        sweep: commas separate values of a sweep, unless they stand in quotes or brackets.
    """
    if sweep and SWEEP.fullmatch(value.strip()):
        return value
    parts = split(value) if sweep else [value]
    return ",".join(_one(part.strip() if len(parts) > 1 else part, takes) for part in parts)


def _one(value: str, takes: Takes) -> str:
    if value.lower() == "null":
        return value
    if takes.whole:
        return _whole(value, takes)
    if takes.texts and is_list(value):
        return "[" + ",".join(_text(item, takes) for item in items(value)) + "]"
    return _text(value, takes) if takes.text else value


def _whole(value: str, takes: Takes) -> str:
    if is_list(value):
        return "[" + ",".join(_whole(item, takes) for item in items(value)) + "]"
    if NUMBER.fullmatch(value) is None:
        return value
    if float in takes.options and not re.search(r"[eE_]", value):
        return value  # warmup=1.0 is a share, warmup=1e3 a number of steps
    try:
        number = Decimal(value.replace("_", ""))
    except InvalidOperation:
        return value
    is_whole = number == number.to_integral_value() and abs(number) <= LARGEST_INTEGER
    return str(int(number)) if is_whole else value


def numbers(value: str) -> Any:
    """The number that was typed, or the list of numbers; anything else as the text it is."""
    if is_list(value):
        return [numbers(item) for item in items(value)]
    if NUMBER.fullmatch(value) is None:
        return value
    number = Decimal(value.replace("_", ""))
    return int(number) if number == number.to_integral_value() else float(number)


def _text(value: str, takes: Takes) -> str:
    quote = quoted_by(value)
    if quote == "'":
        return value  # Hydra reads it
    text = _unquoted(value) if quote else value
    if quote and not text:
        return "''"  # in a list, nothing at all would be no item
    if takes.path and not quote:
        text = os.path.expanduser(text)  # noqa: PTH111 (Path would drop "./" and "//")
    literal = takes.literal or not _has_interpolation(text)
    return text if is_plain(text) else in_quotes(text, literal)


def without_quotes(value: str) -> str:
    """The text that a value stands for, whether or not it is in quotes."""
    return _unquoted(value) if quoted_by(value) else value


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value, strict=False))
    except ValueError:
        return re.sub(r'(\\*)\\"', lambda match: match[1][: len(match[1]) // 2] + '"', value[1:-1])


def hydra_word(word: str, text: str) -> str:
    """The argument from which Hydra reads `word` with exactly this `text`."""
    return f"{word}={in_quotes(text)}"


def in_quotes(text: str, literal: bool = True) -> str:
    """The text in single quotes, from which Hydra reads it as it is.

    Args:
        text: any, without lone surrogates.
        literal: `${` is text; otherwise an interpolation.
    """
    if literal:  # OmegaConf reads a pair of backslashes before ${ as one
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    # Hydra reads a backslash as itself unless a quote follows.
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _has_interpolation(text: str) -> bool:
    """Whether OmegaConf can read the interpolations in it; a lone `${` is text."""
    if "${" not in text:
        return False
    try:
        parse_interpolations(text)
    except (OmegaConfBaseException, RecognitionException):
        return False
    return True


def quoted_by(value: str) -> str:
    """The quote in which all of the value stands, or ""."""
    quote = value[:1]
    if quote not in ("'", '"') or len(value) < 2:
        return ""
    end = _end_of_quote(value, 0)
    return quote if end == len(value) else ""


def _end_of_quote(value: str, start: int) -> int:
    """The position behind the quoted part that opens at `start`; 0 if it never closes."""
    index = start + 1
    while index < len(value):
        if value[index] == "\\":
            index += 1
        elif value[index] == value[start]:
            return index + 1
        index += 1
    return 0


def is_list(value: str) -> bool:
    """Whether the bracket that opens the value closes at its end: [a] is a list, [a] b [c] is not."""
    if not (value.startswith("[") and value.endswith("]")):
        return False
    depth = 0
    for index, character in enumerate(value):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0:
            return index == len(value) - 1
    return True


def items(value: str) -> list[str]:
    """The items of a list as they were typed, quotes included."""
    inside = value[1:-1]
    return [item.strip() for item in split(inside)] if inside.strip() else []


def split(value: str) -> list[str]:
    """The parts of a text between its commas; those within quotes, brackets and braces do not count.

    A quote counts only where a part begins, so that "it's, he said" has two parts.
    """
    parts = [""]
    closing: list[str] = []
    index = 0
    while index < len(value):
        character = value[index]
        if character in "'\"" and not parts[-1].strip() and (end := _end_of_quote(value, index)):
            parts[-1] += value[index:end]
            index = end
            continue
        if character in "[{(" and _closes(value, index):
            closing.append({"[": "]", "{": "}", "(": ")"}[character])
        elif closing and character == closing[-1]:
            closing.pop()
        if character == "," and not closing:
            parts.append("")
        else:
            parts[-1] += character
        index += 1
    return parts


def _closes(value: str, start: int) -> bool:
    """Whether the bracket at `start` is closed later."""
    return {"[": "]", "{": "}", "(": ")"}[value[start]] in value[start:]
