"""Kinds of caches by name: one file of `configs/cache` each."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.caches.cache import CacheKind
from longmix.caches.exact import Exact
from longmix.caches.star import Star
from longmix.command_line.schema import configs_folder
from longmix.config import Choice
from longmix.errors import ConfigError
from longmix.invocation import searched
from longmix.wording import did_you_mean, nearest


def kind_files(group: str = "cache") -> dict[str, Path]:
    """The file of every kind of a group by its name: those of longmix, and of folders that Hydra looks in."""
    folders = [configs_folder()]
    if HydraConfig.initialized():
        folders += searched(HydraConfig.get())
    files = [path for folder in reversed(folders) for path in sorted((folder / group).glob("*.yaml"))]
    return dict(sorted((path.stem, path) for path in files))


def kind_of(name: str, settings: Mapping[str, Any] | None = None, key: str = "cache") -> CacheKind:
    """The kind of this name, with these settings and the others as its file has them; see `node_of`."""
    return built(Choice.of(key, node_of(name, settings, key)))


def node_of(name: str, settings: Mapping[str, Any] | None = None, key: str = "cache") -> dict[str, Any]:
    """The node that a kind is built from.

    Args:
        name: of a file, without its ending.
        settings: changes.
        key: the group, such as "cache" or "prefill", and where it stands in the configuration.

    Raises:
        ConfigError: there is no such kind.
    """
    files = kind_files(key)
    if name not in files:
        meant = did_you_mean(nearest(name, files))
        raise ConfigError(f"{key}: there is no {key} {name}.{meant} {key.capitalize()}s are: {', '.join(files)}.")
    file: Any = OmegaConf.to_container(OmegaConf.load(files[name]), resolve=True)
    node: dict[str, Any] = file | dict(settings or {})
    return node


def built(choice: Choice) -> CacheKind:
    """The kind that a choice of the group `cache` names.

    Raises:
        ConfigError: it is no kind of cache, or a setting is wrong.
    """
    choice.check(set(), CacheKind)
    kind: CacheKind = choice.build()
    return kind


def star_of(choice: Choice | None) -> Star | None:
    """How prompts are read, by a choice of the group `prefill`; None for none.

    Raises:
        ConfigError: it is no such thing, or a setting is wrong.
    """
    if choice is None:
        return None
    choice.check(set(), Star)
    star: Star = choice.build()
    return star


def settings_of(kind: CacheKind | Star) -> dict[str, Any]:
    """The settings of a kind as plain values, as `kind_of` takes them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(kind).items()}


def kind_of_saved(saved: Any, given: CacheKind | None, path: str) -> CacheKind:
    """The kind that a file says it was saved with; `Exact` if it says nothing, as earlier versions did.

    Args:
        saved: `{"name": ..., "settings": ...}`, or None.
        given: the kind that the user asks for; None for that of the file.
        path: of the file, for messages.

    Raises:
        ConfigError: another one was asked for.
        ValueError: the file says no such thing, or what it says is no kind.
    """
    if saved is None:
        saved = {"name": Exact.name, "settings": settings_of(Exact())}
    name, settings = (saved.get("name"), saved.get("settings")) if isinstance(saved, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError("it does not say which cache it was saved with")
    if given is None:
        try:
            return kind_of(name, settings)
        except ConfigError as error:
            raise ValueError(f"its cache is none: {error}") from error
    if (given.name, settings_of(given)) != (name, settings):
        shown = " ".join([f"cache={name}", *(f"cache.{key}={value}" for key, value in settings.items())])
        raise ConfigError(f"load={path} was saved with another cache; leave cache= out, or give {shown}.")
    return given
