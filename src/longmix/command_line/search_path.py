"""Hydra's search path: the folders in which a command line lets it look for the user's own files."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longmix.command_line import values
from longmix.command_line.values import Takes
from longmix.command_line.words import Word
from longmix.errors import ConfigError
from longmix.paths import check_path
from longmix.printable import printable

SEARCH_PATH = "hydra.searchpath"
CONFIG_DIR = ("--config-dir", "-cd")
CONFIG_NAME = ("--config-name", "-cn")


def search_entries(arguments: Sequence[str], folders: Sequence[Path]) -> list[tuple[str, str]]:
    """The entries that the arguments add, in Hydra's order, each with the option or word that names it.

    Args:
        arguments: of the command line.
        folders: where the file of `--config-name` may lie besides the folder of `--config-dir`.

    Raises:
        ConfigError: `hydra.searchpath` is no list, or has a sign before it, with which Hydra would not look there.
    """
    directory = _last_value(arguments, CONFIG_DIR)
    if directory is not None:
        check_path(CONFIG_DIR[0], directory)
    entries = [] if directory is None else [(CONFIG_DIR[0], directory)]
    words = [word for word in map(Word.read, arguments) if word.name == SEARCH_PATH and word.value is not None]
    if words:
        return entries + [(SEARCH_PATH, entry) for entry in _items(words[-1])]
    name = _last_value(arguments, CONFIG_NAME)
    return entries if name is None else entries + _of_file(name, [*folders, *(Path(entry) for _, entry in entries)])


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
    for folder in folders:
        file = folder / f"{name.removesuffix('.yaml')}.yaml"
        if file.is_file():
            try:
                entries = OmegaConf.select(OmegaConf.load(file), SEARCH_PATH, default=None)
            except (OmegaConfBaseException, OSError, ValueError):
                return []  # Hydra says what is wrong with it
            return [(f"{SEARCH_PATH} of {file}", str(entry)) for entry in entries or []]
    return []
