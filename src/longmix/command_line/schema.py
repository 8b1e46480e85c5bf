"""The words of a command and their types, from the configuration's dataclasses and signatures at `_target_`."""

import functools
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from longmix.command_line import values
from longmix.command_line.search_path import SEARCH_PATH, check_name, folder_of, search_entries
from longmix.command_line.values import Takes
from longmix.command_line.words import Word
from longmix.config import EvaluateConfig, GenerateConfig, PrepareConfig, TrainConfig, locate, settings, words_of
from longmix.config.rules import is_group, is_words
from longmix.errors import ConfigError, LongmixError
from longmix.printable import printable

SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "prepare": PrepareConfig,
}
"""The dataclass of each command's words."""

HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")
HYDRA_WORDS = {key: Takes(str, path=True) for key in HYDRA_PATHS}
HYDRA_WORDS |= {SEARCH_PATH: Takes(list[str], path=True), "hydra.output_subdir": Takes(str | None)}


class Schema:
    """The words of one command.

    Args:
        command: "train", "evaluate", "generate" or "prepare".
        configs: the folder of the configuration.
        own: further words of it, with what each takes.

    Attributes:
        folders: where choices are looked for: `configs`, and the folders of `--config-dir` and `hydra.searchpath`.
        searchpath: entries that the command line adds, as Hydra reads them.
        sweeps: -m is there for one run with each of several values.
    """

    def __init__(self, command: str, configs: Path, own: dict[str, Takes] | None = None) -> None:
        self.command = command
        self.configs = configs
        self.folders = [configs]
        self.searchpath: list[str] = []
        self.sweeps = True
        self.words = HYDRA_WORDS | _of_dataclass(SCHEMAS[command]) | (own or {})
        self.all_groups = sorted(
            {path.parent.relative_to(configs).as_posix() for path in configs.glob("*/**/*.yaml")} - {"."}
        )

    @functools.cached_property
    def sections(self) -> dict[str, list[str]]:
        """The words that hold others, such as loop, each with the names of these."""
        found: dict[str, list[str]] = {}
        for name in self.words:
            section, dot, rest = name.partition(".")
            if dot and section != "hydra":
                found.setdefault(section, []).append(rest)
        return found

    @functools.cached_property
    def groups(self) -> dict[str, Any]:
        """The command's config groups, each with its default."""
        found: dict[str, Any] = {}
        for entry in self.primary.defaults:
            if isinstance(entry, DictConfig):
                found |= {str(key): value for key, value in entry.items() if not str(key).startswith("override ")}
        return found

    @functools.cached_property
    def primary(self) -> Any:
        """The command's own YAML file."""
        return OmegaConf.load(self.configs / f"{self.command}.yaml")

    def choices(self, group: str) -> list[str]:
        """The choices of a group."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def file(self, group: str, choice: str) -> Path:
        """The file of a choice; the command's own comes first."""
        files = [folder / group / f"{choice}.yaml" for folder in self.folders]
        return next((path for path in files if path.is_file()), files[0])

    def search(self, arguments: Sequence[str]) -> None:
        """Add the folders that the arguments name to those in which choices are looked for.

        Raises:
            ConfigError: one of them is not there, or the file of `--config-name` is none of this command.
        """
        entries = search_entries(arguments, self.folders)
        for name, entry in entries:
            folder = folder_of(entry)
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"{name}: there is no folder {printable(entry)}.")
            self.folders += [folder] if folder else []
        self.searchpath = [entry for _, entry in entries]
        check_name(arguments, self.command, self.folders)

    def takes_several(self, group: str) -> bool:
        """Whether a group may be a list of choices."""
        return OmegaConf.is_list(self.groups.get(group))

    def is_group(self, name: str) -> bool:
        """Whether a word chooses a file instead of giving a value."""
        group = name.partition("@")[0]
        return group in self.groups or "/" in group or (group in self.all_groups and group not in self.words)

    @property
    def changed_groups(self) -> tuple[str, ...]:
        """Groups whose choice comes from the checkpoint, of `evaluate` and `generate`; their settings may change."""
        return tuple(group for group in self.all_groups if group in self.words and group not in self.groups)

    def changes_checkpoint(self, word: Word, words: Sequence[Word]) -> bool:
        """Whether a word on a command line with these others sets something of the mixer of a checkpoint."""
        if not word.name.startswith("mixer.") or word.value is None or word.sign:
            return False
        if self.changed_groups:
            return True
        given = [other.value for other in words if other.name == "checkpoint"]
        return bool(given) and given[-1] not in (None, "null")

    def takes(self, word: Word, words: Sequence[Word]) -> Takes | None:
        """The type of a word on a command line with these others; None if it is unknown.

        The classes of a group are imported for it only where Hydra might read the value as something else.
        """
        if word.name in self.words:
            return self.words[word.name]
        if "." not in word.name or self.is_group(word.name) or word.name.startswith("hydra."):
            return None
        return None if self._is_settled(word) else self.setting(word.name, words)

    def setting(self, name: str, words: Sequence[Word]) -> Takes | None:
        """The type of a setting of a group, such as data.corpus.path."""
        try:
            node = self.composed(words)
        except Exception:
            return None  # the command reports it in full when it begins
        return _setting(node, name)

    def composed(self, words: Iterable[Word]) -> Any:
        """The configuration with the choices of these words, without resolved interpolations.

        Raises:
            HydraException: a choice does not exist.
        """
        chosen = [_choice(word) for word in words if self._shapes(word)]
        if self.searchpath:
            entries = [entry if "://" in entry else str(Path(entry).absolute()) for entry in self.searchpath]
            chosen.append(f"{SEARCH_PATH}=[{','.join(map(values.in_quotes, entries))}]")
        return _composed(self.command, self.configs, tuple(chosen))

    def _shapes(self, word: Word) -> bool:
        if word.value is None or word.sign == "~":
            return False
        return self.is_group(word.name) or (word.sign != "" and values.is_plain(word.value))

    def _is_settled(self, word: Word) -> bool:
        """Whether Hydra reads the value correctly for any type: a plain text, or a number among numbers."""
        value = word.value or ""
        if values.is_plain(value) or value.lower() in ("true", "false", "null"):
            return value.lower() != "true" or self._only_numbers(word.name)
        if not re.fullmatch(r"\[?[-+]?[\d.]+([eE]-\d+)?(,[-+]?[\d.]+([eE]-\d+)?)*\]?", value, re.ASCII):
            return False
        return self._only_numbers(word.name)

    def _only_numbers(self, name: str) -> bool:
        group, _, rest = name.partition(".")
        leaf = rest.rpartition(".")[2]
        found = re.findall(rf"^\s*{re.escape(leaf)}:[ ]*(.*?)[ ]*(?:#.*)?$", self._text(group), re.MULTILINE)
        numbers = [value for value in found if value != "null"]  # null in one file, of the type that others have
        return bool(numbers) and all(re.fullmatch(r"true|false|\[?[-\d._e, ]+\]?", value) for value in numbers)

    def _text(self, group: str) -> str:
        files = (path for folder in self.folders for path in (folder / group).glob("*.yaml"))
        return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _choice(word: Word) -> str:
    """A word that chooses, with the first value of a sweep."""
    first = values.split(word.value or "")[0]
    return f"{word.sign}{word.name}={first}"


@functools.lru_cache(maxsize=8)
def _composed(command: str, configs: Path, overrides: tuple[str, ...]) -> Any:
    from longmix.command_line.register import register_types

    register_types()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            composed = compose(command, overrides=list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    return OmegaConf.to_container(composed, resolve=False)


def _setting(node: Any, name: str) -> Takes | None:
    *parents, leaf = name.split(".")
    hints: dict[str, Any] = {}
    for part in [*parents, leaf]:
        if isinstance(node, dict) and "_target_" in node:
            try:
                hints = settings(locate(str(node["_target_"]), name))
            except LongmixError:
                return None
        if part == leaf and part in hints:
            return Takes(hints[part])
        node = node.get(part) if isinstance(node, dict) else None
    return None


def _of_dataclass(schema: type, prefix: str = "") -> dict[str, Takes]:
    """The type of each dotted word; config groups have none."""
    found: dict[str, Takes] = {}
    for name, (entry, hint) in words_of(schema).items():
        if is_words(hint):
            found |= _of_dataclass(typing.cast(type, hint), f"{prefix}{name}.")
        elif not is_group(hint):
            path, literal = (bool(entry.metadata.get(key)) for key in ("path", "literal"))
            found[f"{prefix}{name}"] = Takes(hint, path, literal)
    return found


def configs_folder() -> Path:
    """The folder of the configuration: in an installed package its own, in a checkout the one beside `src/`.

    Raises:
        ConfigError: there is none.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"there is no train.yaml in {package / 'configs'}; install longmix anew.")
