"""A command's configuration from words, for callers from Python: Hydra's own state is as it was before."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longmix import cli
from longmix import config as configuration
from longmix.command_line import values
from longmix.command_line.explain import explained, misformed
from longmix.command_line.register import register_types
from longmix.command_line.schema import Schema, configs_folder
from longmix.command_line.words import Word
from longmix.config import Plain
from longmix.errors import ConfigError
from longmix.invocation import searched

_LOCK = threading.RLock()
"""Held while Hydra composes, because all threads share its state."""


@dataclass(frozen=True)
class Composed:
    """The configuration that words make.

    Attributes:
        content: the configuration as dicts, with every interpolation carried out.
        choices: the file that each group was chosen from, by group.
        folders: those that were searched for files.
    """

    content: Plain
    choices: Mapping[str, str]
    folders: tuple[Path, ...] = ()


def composed(command: str, given: Sequence[str]) -> Composed:
    """The configuration of a command with these words, as on its command line.

    Args:
        command: "train", "evaluate", "generate" or "prepare".
        given: words such as `"seq_len=64"`; no options and no sweeps.

    Raises:
        ConfigError: an unknown or impossible word.
    """
    register_types()
    folder = configs_folder()
    schema = Schema(command, folder)
    schema.sweeps = False
    schema.search(given)
    words = [Word.read(word) for word in given]
    problem = misformed(schema, words, sweep=False)
    if problem:
        raise ConfigError(problem)
    with _own_hydra():
        try:
            with initialize_config_dir(str(folder), version_base="1.3"):
                overrides = cli.as_hydra_reads(schema, words)
                config = compose(command, overrides=overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ConfigError(explained(schema, given, False, error)) from error
        HydraConfig.instance().set_config(config)  # names ask for the choices
        choices = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
        folders = searched(config.hydra)
        with open_dict(config):
            del config["hydra"]
        return Composed(configuration.resolved(config), choices, folders)


def as_words(given: Mapping[str, Any]) -> list[str]:
    """A mapping such as `{"seq_len": 64, "loop": {"log_every": 1}}` as words: texts as on the command line."""
    words = []
    for name, value in given.items():
        if isinstance(value, Mapping):
            words += as_words({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            words.append(f"{name}={_written(value)}")
    return words


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        empty = '""'  # nothing at all would be no item
        return f"[{','.join(_written(item) or empty for item in value)}]"
    if isinstance(value, Mapping):  # in a list, as stages are
        return f"{{{','.join(f'{name}:{_inside(item)}' for name, item in value.items())}}}"
    return str(value)


def _inside(value: Any) -> str:
    """A value inside a mapping, where Hydra alone reads it."""
    if isinstance(value, str):
        return value if value and values.is_plain(value) else values.in_quotes(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_inside, value))}]"
    return _written(value)


@contextmanager
def _own_hydra() -> Iterator[None]:
    with _LOCK:
        outer, settings = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg = outer, settings
