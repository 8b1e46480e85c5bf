"""Hydra's search path: the folders in which a command line lets it look for the user's own files."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longmix.command_line import values
from longmix.command_line.values import Takes
from longmix.command_line.words import Word, quoted
from longmix.errors import ConfigError
from longmix.paths import check_path
from longmix.printable import printable
from longmix.wording import did_you_mean, nearest

SEARCH_PATH = "hydra.searchpath"
CONFIG_DIR = ("--config-dir", "-cd")
CONFIG_NAME = ("--config-name", "-cn")
CONFIG_PATH = ("--config-path", "-cp")
COMMANDS = ("train", "evaluate", "generate", "prepare")
"""The names of longmix's own configurations."""


def search_entries(arguments: Sequence[str], folders: Sequence[Path]) -> list[tuple[str, str]]:
    """The entries that the arguments add, in Hydra's order, each with the option or word that names it.

    Args:
        arguments: of the command line.
        folders: where the file of `--config-name` may lie besides the folder of `--config-dir`.

    Raises:
        ConfigError: `hydra.searchpath` is no list, or has a sign before it, with which Hydra would not look there; or
            an option would replace all folders.
    """
    own = _last_value(arguments, CONFIG_PATH)
    if own is not None:
        raise ConfigError(
            f"{CONFIG_PATH[0]} would take the place of longmix's own configuration, which every command needs; add a "
            f"folder to it with {CONFIG_DIR[0]} {quoted(own) if own else 'FOLDER'}."
        )
    directory = _last_value(arguments, CONFIG_DIR)
    if directory is not None:
        check_path(CONFIG_DIR[0], directory)
    entries = [] if directory is None else [(CONFIG_DIR[0], directory)]
    words = [word for word in map(Word.read, arguments) if word.name == SEARCH_PATH and word.value is not None]
    if words:
        return entries + [(SEARCH_PATH, entry) for entry in _items(words[-1])]
    name = _last_value(arguments, CONFIG_NAME)
    return entries if name is None else entries + _of_file(name, [*folders, *(Path(entry) for _, entry in entries)])


def check_name(arguments: Sequence[str], command: str, folders: Sequence[Path]) -> None:
    """Refuse a `--config-name` that does not name a configuration of the command.

    Args:
        arguments: of the command line.
        command: the configuration has to begin from its own.
        folders: where the file may lie.

    Raises:
        ConfigError: there is no such file, or it belongs to another command.
    """
    given = _last_value(arguments, CONFIG_NAME)
    if given is None:
        return
    name = given.removesuffix(".yaml")
    if not name.strip():
        raise ConfigError(f"{CONFIG_NAME[0]} is empty; was a variable of the shell not set?")
    option = f"{CONFIG_NAME[0]} {quoted(given)}"
    if _file(name, folders) is None:
        own = sorted({path.stem for folder in folders[1:] for path in folder.glob("*.yaml")} | {command})
        raise ConfigError(
            f"{option}: there is no {printable(name)}.yaml in a folder of {CONFIG_DIR[0]} or {SEARCH_PATH}."
            f"{did_you_mean(nearest(name, own))}"
        )
    if not _begins_from(name, command, folders, set()):
        other = f" It is that of `longmix {name}`." if name in COMMANDS else ""
        raise ConfigError(
            f"{option} does not begin from the configuration of this command.{other} A file of your own for it has "
            f"`defaults: [{command}, _self_]`."
        )


def _begins_from(name: str, command: str, folders: Sequence[Path], seen: set[str]) -> bool:
    """Whether a configuration is a command's own, or has it among its defaults or theirs."""
    if name in (command, f"{command}_schema"):
        return True
    file = _file(name, folders)
    if file is None or name in seen:
        return False
    try:
        entries = OmegaConf.select(OmegaConf.load(file), "defaults", default=None) or []
    except (OmegaConfBaseException, YAMLError, OSError, ValueError):
        return True  # Hydra says what is wrong with it
    names = [str(entry).removeprefix("/").removesuffix(".yaml") for entry in entries]
    return any(_begins_from(each, command, folders, {*seen, name}) for each in names)


def _file(name: str, folders: Sequence[Path]) -> Path | None:
    return next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)


def without_repetition(words: Sequence[Word]) -> list[Word]:
    """The words with only the last `hydra.searchpath`, since Hydra would take the first of several."""
    several = [word for word in words if word.name == SEARCH_PATH]
    return [word for word in words if word.name != SEARCH_PATH or word is several[-1]]


def folder_of(entry: str) -> Path | None:
    """The folder of an entry: a path, or a package behind pkg://; None where it is something else."""
    scheme, separator, rest = entry.rpartition("://")
    if not separator or scheme == "file":
        return Path(rest)
    if scheme != "pkg":
        return None
    try:
        found = importlib.util.find_spec(rest.replace("/", "."))
    except (ImportError, ValueError):
        found = None
    inside = list(found.submodule_search_locations or ()) if found else []
    return Path(inside[0] if inside else rest)


def _last_value(arguments: Sequence[str], option: tuple[str, str]) -> str | None:
    found = None
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in option:
            found = value if equals else "".join(arguments[number + 1 : number + 2])
    return found


def _items(word: Word) -> list[str]:
    value = (word.value or "").strip()
    if word.sign:
        raise ConfigError(f"{word.sign}{SEARCH_PATH} stands with {word.sign}; write {SEARCH_PATH}=[FOLDER].")
    if value.lower() == "null":
        return []
    if not values.is_list(value):
        raise ConfigError(f"{SEARCH_PATH}={printable(value)} is not a list; write {SEARCH_PATH}=[{printable(value)}].")
    try:
        written = values.as_hydra_reads(value, Takes(list[str], path=True), sweep=False)
        entries: Any = OverridesParser.create().parse_override(f"{SEARCH_PATH}={written}").value()
    except HydraException:
        entries = None
    if not isinstance(entries, list):
        raise ConfigError(f"{SEARCH_PATH}={printable(value)} is not a list of folders.")
    for entry in entries:
        check_path(SEARCH_PATH, str(entry))
    return [str(entry) for entry in entries]


def _of_file(name: str, folders: Sequence[Path]) -> list[tuple[str, str]]:
    """The entries that the user's own configuration names."""
    file = _file(name.removesuffix(".yaml"), folders)
    if file is None:
        return []
    try:
        entries = OmegaConf.select(OmegaConf.load(file), SEARCH_PATH, default=None)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError):
        return []  # Hydra says what is wrong with it
    return [(f"{SEARCH_PATH} of {file}", str(entry)) for entry in entries or []]
