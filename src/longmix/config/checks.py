"""The resolved configuration, and the checks of its words that run before any work."""

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longmix.config.nodes import Node, check_keys
from longmix.config.values import LARGEST_SEED, as_given, fits, misfit
from longmix.config.words import LOOP_COUNTS, LoopConfig, MatchConfig, TrainConfig, TuningConfig
from longmix.errors import ConfigError
from longmix.naming import check_name


def resolved(config: DictConfig) -> Node:
    """The configuration as plain dicts and values with every interpolation carried out.

    Raises:
        ConfigError: a mandatory key has no value, or an interpolation names a key that does not exist.
    """
    try:
        missing = sorted(_without_value(OmegaConf.to_container(config, resolve=False)))
        if missing:
            raise ConfigError(f"no value was given for: {', '.join(missing)}.")
        return typing.cast(Node, OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error


def _without_value(node: Any, key: str = "") -> list[str]:
    """Mandatory keys without a value; `OmegaConf.missing_keys` fails where an interpolation leads to one."""
    if node == "???":
        return [key]
    if isinstance(node, list):
        return [found for number, part in enumerate(node) for found in _without_value(part, f"{key}[{number}]")]
    if not isinstance(node, dict):
        return []
    return [found for name, part in node.items() for found in _without_value(part, f"{key}.{name}" if key else name)]


def check_words(config: Node) -> None:
    """Refuse unknown and absent words, and impossible values of the top-level words and the loop."""
    check_keys(config, TrainConfig)
    check_keys(config["loop"], LoopConfig, "loop.")
    check_keys(config["tuning"], TuningConfig, "tuning.")
    check_keys(config["match"], MatchConfig, "match.")
    _check_types(config, TrainConfig)
    loop, match = config["loop"], config["match"]
    at_least_one = {
        "seq_len": config["seq_len"],
        "batch_size": config["batch_size"],
        "max_steps": config["max_steps"],
        "max_tokens": config["max_tokens"],
        **{f"loop.{key}": loop[key] for key in LOOP_COUNTS},
        **{f"match.{key}": match[key] for key in ("parameters", "multiple")},
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1.")
    if config["max_steps"] is None and config["max_tokens"] is None:
        raise ConfigError("give max_steps or max_tokens, or training would never end.")
    if not 0 <= config["seed"] <= LARGEST_SEED:
        raise ConfigError(f"seed={config['seed']} must lie between 0 and {LARGEST_SEED}.")
    if not 0 <= match["tolerance"] < 1:
        raise ConfigError(f"match.tolerance={match['tolerance']} must be at least 0 and below 1.")
    if (
        str(config["resume"]).lower() in ("yes", "true", "on", "1", "newest", "latest")
        and not Path(config["resume"]).exists()
    ):
        raise ConfigError(f"resume={config['resume']} is not there. Did you mean auto? Else give the folder of a run.")
    check_name(config["name"])
    if loop["gradient_clip"] is not None and not loop["gradient_clip"] > 0:
        raise ConfigError(f"loop.gradient_clip={loop['gradient_clip']} must be above 0, or null to never clip.")
    if loop["nonfinite"] not in ("stop", "skip"):
        raise ConfigError(f"loop.nonfinite={loop['nonfinite']!r} is not one of stop, skip.")


def _check_types(node: Node, schema: type, prefix: str = "") -> None:
    """Refuse values that do not fit the dataclass's types, as a checkpoint or `+key=value` may bring.

    Raises:
        ConfigError: naming the key.
    """
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        hint, value = entry.metadata.get("takes", hints[entry.name]), node[entry.name]
        if is_dataclass(hint):
            _check_types(value, typing.cast(type, hint), f"{prefix}{entry.name}.")
        elif not fits(value, hint):
            raise ConfigError(f"{prefix}{entry.name}={as_given(value)} {misfit(value, hint)}")
