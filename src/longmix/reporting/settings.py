"""The settings in a run's `config.yaml`: data, model and recipe. A damaged file gives none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longmix.aliases import renewed
from longmix.config import flattened
from longmix.errors import ConfigError
from longmix.reading import read_yaml

Settings = Mapping[str, Any]
"""Values by full key, such as `model.d_model`."""

NOT_THE_EXPERIMENT = (
    *("name", "resume", "logger", "loop.log_every", "loop.keep_checkpoints", "loop.checkpoint_every"),
    *("loop.async_checkpoints", "loop.sharded_checkpoints", "data.cache_dir", "data.num_workers"),
)
"""Keys, or prefixes of keys, that do not change what is learned."""


def read_settings(folder: Path) -> tuple[Settings, str | None]:
    """The settings of a run, and what is wrong with them, if anything."""
    try:
        return flattened(renewed(read_yaml(folder / "config.yaml"))), None
    except (ConfigError, OSError, ValueError, TypeError, AttributeError) as error:
        return {}, str(error)


def is_synthetic(settings: Settings) -> bool:
    """Whether the data are a synthetic task, whose tokens stand for no text."""
    return str(settings.get("data._target_", "")).endswith(".SyntheticData")


def corpus_of(settings: Settings) -> str | None:
    """The data in words; None where the settings do not say."""
    for place in ("data.task", "data.corpus"):
        if f"{place}._target_" in settings:
            return _words(settings, place)
    if "data.path" in settings:
        kind = "tokens" if str(settings.get("data._target_")).endswith(".GivenTokens") else "prepared"
        return f"{kind}, path={settings['data.path']}"
    shares = {key.removeprefix("data.weights."): value for key, value in settings.items() if "data.weights." in key}
    if shares:
        return "mixture: " + ", ".join(
            f"{name} {share:g}" if _is_number(share) else name for name, share in shares.items()
        )
    return _words(settings, "data") if "data._target_" in settings else None


def tokenizer_of(settings: Settings) -> str | None:
    """The tokenizer in words; tokens of a synthetic task are numbers."""
    if is_synthetic(settings):
        return "numbers"
    return _words(settings, "tokenizer") if "tokenizer._target_" in settings else None


def block_of(settings: Settings) -> str | None:
    """The layer around the mixer, by the name of its class."""
    target = settings.get("model.block._target_")
    return None if target is None else str(target).rpartition(".")[2]


def recipe_of(settings: Settings, node: str) -> str | None:
    """Optimizer or schedule in words."""
    return _words(settings, node) if f"{node}._target_" in settings else None


def differing(every: list[Settings]) -> dict[str, list[Any]]:
    """Settings that are not the same in all of some runs, with their values in the order of the runs.

    Settings of mixers are left out: another mixer has others.
    """
    keys = list(dict.fromkeys(key for settings in every for key in settings))
    found = {}
    for key in keys:
        if key.startswith("mixer.") or any(key == left or key.startswith(f"{left}.") for left in NOT_THE_EXPERIMENT):
            continue
        values = [settings.get(key) for settings in every]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


def _words(settings: Settings, place: str) -> str:
    """Class and settings at a place, such as `TextFiles path=books`."""
    inside = {key.removeprefix(f"{place}."): value for key, value in settings.items() if key.startswith(f"{place}.")}
    name = str(inside.pop("_target_")).rpartition(".")[2]
    return " ".join(
        [name, *(f"{key}={value}" for key, value in inside.items() if value is not None and "." not in key)]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
