"""The arguments of a command line, split into options and words."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from longmix.errors import ConfigError

LONGEST = 800  # characters of a message of argparse's own
SHOWN = 120  # characters of an argument that a message repeats
SWEEP_OPTIONS = {"-m", "--multirun"}


@dataclass(frozen=True)
class Word:
    """One argument that is no option: `name=value`, `+name=value`, `++name=value`, `~name`, or something else.

    Attributes:
        given: the argument as it was typed.
        sign: "", "+", "++" or "~".
        name: what stands before "=".
        value: what stands after it; None without "=".
    """

    given: str
    sign: str
    name: str
    value: str | None

    @classmethod
    def read(cls, argument: str) -> "Word":
        """Split an argument; any text is a word."""
        head, equals, value = argument.partition("=")
        sign = re.match(r"\+{0,2}|~", head)[0] or ("~" if head.startswith("~") else "")  # type: ignore[index]
        return cls(argument, sign, head[len(sign) :], value if equals else None)

    @property
    def stands_alone(self) -> bool:
        """Whether it neither gives a value nor removes a key."""
        return self.value is None and self.sign != "~"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:LONGEST]}.")


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options, and the words, whatever their order.

    Raises:
        ConfigError: an option that does not exist, or that lacks its value.
    """
    parser = get_args_parser()
    parser.__class__ = _Parser
    takes_value = {
        name: action.nargs == "?"
        for action in parser._actions
        for name in action.option_strings
        if action.nargs != 0 and action.option_strings
    }
    known = {name for action in parser._actions for name in action.option_strings}
    options: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name = argument.partition("=")[0] if argument.startswith("--") else argument
        if name not in known and not _joined(argument, takes_value):
            raise ConfigError(_unknown_option(argument, rest, known))
        options.append(argument)
        if name not in takes_value or "=" in argument:
            continue
        if rest and not rest[0].startswith("-") and not (takes_value[name] and "=" in rest[0]):
            options.append(rest.pop(0))
        elif takes_value[name]:
            options.append("all")  # of --info; or the word that follows would be taken for its value
    given = parser.parse_args(options)
    if given.package and not given.cfg:
        raise ConfigError(f"--package {shown(given.package)} goes with --cfg.")
    return options, words


def _joined(argument: str, takes_value: dict[str, bool]) -> bool:
    """Whether it is a short option joined with its value, such as -cjob."""
    return any(argument.startswith(name) for name in takes_value if not name.startswith("--"))


def _unknown_option(argument: str, rest: list[str], known: set[str]) -> str:
    word = Word.read(argument.lstrip("-"))
    if re.fullmatch(r"-?\d.*", argument):
        return f"{argument} stands alone; it is neither word=value nor an option."
    if word.value is None and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        word = Word.read(f"{word.name}={rest[0]}")
    value = "VALUE" if word.value is None else word.value
    listed = ", ".join(sorted(name for name in known if name.startswith("--")))
    if not word.name:
        return f"there is no option {argument}. Options are: {listed}."
    cure = shlex.quote(f"{word.name.replace('-', '_')}={value}")
    return f"there is no option {argument}. Words have no dashes: {cure}. Options are: {listed}."


def is_sweep(options: Sequence[str], words: Sequence[str]) -> bool:
    """Whether each word may stand for several values."""
    return bool(SWEEP_OPTIONS & set(options)) or "hydra.mode=MULTIRUN" in words


def shown(text: str) -> str:
    """A part of the command line for a message: on one line, and shortened."""
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def quoted(argument: str) -> str:
    """An argument as a shell takes it, for a message."""
    return shown(shlex.quote(argument))
