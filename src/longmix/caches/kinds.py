"""Kinds of caches by name: one file of `configs/cache` each."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.caches.cache import CacheKind
from longmix.command_line.schema import configs_folder
from longmix.config import Choice
from longmix.errors import ConfigError
from longmix.invocation import searched
from longmix.wording import did_you_mean, nearest


def kind_files() -> dict[str, Path]:
    """The file of every kind by its name: those of longmix, and of folders that the command line lets Hydra look in."""
    folders = [configs_folder()]
    if HydraConfig.initialized():
        folders += searched(HydraConfig.get())
    files = [path for folder in reversed(folders) for path in sorted((folder / "cache").glob("*.yaml"))]
    return dict(sorted((path.stem, path) for path in files))


def kind_of(name: str, settings: Mapping[str, Any] | None = None, key: str = "cache") -> CacheKind:
    """The kind of this name, with these settings and the others as its file has them.

    Args:
        name: of a file, without its ending.
        settings: changes.
        key: where it stands in the configuration, for messages.

    Raises:
        ConfigError: there is no such kind, or a setting is wrong.
    """
    files = kind_files()
    if name not in files:
        meant = did_you_mean(nearest(name, files))
        raise ConfigError(f"{key}: there is no cache {name}.{meant} Caches are: {', '.join(files)}.")
    file: Any = OmegaConf.to_container(OmegaConf.load(files[name]), resolve=True)
    return built(Choice.of(key, file | dict(settings or {})))


def built(choice: Choice) -> CacheKind:
    """The kind that a choice of the group `cache` names.

    Raises:
        ConfigError: it is no kind of cache, or a setting is wrong.
    """
    choice.check(set(), CacheKind)
    kind: CacheKind = choice.build()
    return kind


def settings_of(kind: CacheKind) -> dict[str, Any]:
    """The settings of a kind as plain values, as `kind_of` takes them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(kind).items()}
