"""What `config.json` says of a model whose type transformers does not know, and whether it says all of it."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from math import isclose
from types import SimpleNamespace
from typing import Any

import torch

from longmix.config import Choice, ModelConfig, Pattern
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.model.changes import OF_TRAINING

CURE = "use as=longmix, which holds any model."

SIZES = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "max_position_embeddings": 1}
"""Whole numbers that every type has, with the least of each."""


class Described(SimpleNamespace):
    """The content of a `config.json`, as attributes."""

    model_type: str
    vocab_size: int
    max_position_embeddings: int

    @classmethod
    def of(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> "Described":
        """What a file says, and the defaults of its type.

        Raises:
            ConfigError: one of the sizes is not a whole number.
        """
        specials = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
        found = cls(**{**specials, **defaults, **given})
        for name, least in SIZES.items():
            whole(found, name, least)
        return found


def whole(config: Any, name: str, least: int = 1) -> int:
    """A whole number of a `config.json`.

    Raises:
        ConfigError: it is something else.
    """
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} in config.json must be a whole number of at least {least}.")
    return value


def number(config: Any, name: str) -> float:
    """A number above 0 of a `config.json`.

    Raises:
        ConfigError: it is something else.
    """
    value = getattr(config, name, None)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name}={value!r} in config.json must be a number above 0.")
    return float(value)


def require(config: Any, needed: Mapping[str, Any]) -> None:
    """Refuse a `config.json` with a setting that longmix has in one form alone.

    Args:
        config: its content.
        needed: the form of each.

    Raises:
        ConfigError: names the first.
    """
    for name, ours in needed.items():
        theirs = getattr(config, name, None)
        if theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
            raise ConfigError(
                f"{name}={theirs!r} in config.json: longmix has {ours!r} alone, so it cannot be imported."
            )


def model_settings(config: Any, **settings: Any) -> dict[str, Any]:
    """The settings `model` of an imported model.

    Args:
        config: content of its `config.json`.
        settings: besides those that all types share.
    """
    return {
        "_target_": f"{LanguageModel.__module__}.{LanguageModel.__qualname__}",
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "tie_head": config.tie_word_embeddings is True,
        "norm_eps": number(config, "norm_eps"),
        "logit_penalty": 0.0,
        "activation_checkpointing": "none",
        **settings,
    }


def target(kind: type) -> str:
    """The `_target_` of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def mixer_of(config: ModelConfig, kind: type, type_name: str) -> Choice:
    """The one mixer of a model, of the class that a type of folder holds.

    Raises:
        ConfigError: it has another, or several.
    """
    mixer = config.mixer
    if isinstance(mixer, Pattern):
        raise ConfigError(f"mixer.pattern={list(mixer.order)} cannot be said in the format {type_name}; {CURE}")
    if mixer.located() is not kind:
        raise ConfigError(f"mixer={mixer.target} is not in the format {type_name}; {CURE}")
    return mixer


def check_said(
    model: LanguageModel, config: ModelConfig, said: ModelConfig, type_name: str, free: Iterable[str]
) -> None:
    """Refuse a model that would not be the same after its description is read again.

    A setting that is null counts as what it stands for, since shapes are compared as well.

    Args:
        model: with weights or without.
        config: what it was built from.
        said: what would be built from its description.
        type_name: of the folder.
        free: settings that change no output of a trained model, such as "mixer.input_bias"; some are always.

    Raises:
        ConfigError: names the first setting that has no place in the description.
    """
    passed = {*(f"model.{name}" for name in OF_TRAINING), *free}
    for key in ("model", "mixer"):
        ours, theirs = getattr(config, key), getattr(said, key)
        for name, value in _differences(key, _filled(ours.entries), _filled(theirs.entries)):
            if name not in passed:
                raise ConfigError(f"{name}={value!r} cannot be said in the format {type_name}; {CURE}")
    with torch.device("meta"):
        again = build_model(said, model.embedding.num_embeddings).state_dict()
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    for name in {**shapes, **again}:
        if name not in again or name not in shapes or again[name].shape != shapes[name]:
            raise ConfigError(f"the weight {name} has no place in the format {type_name}; {CURE}")


def _filled(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A choice's settings, with the defaults of those that are left out; choices within likewise."""
    parameters = inspect.signature(Choice.of("", entries).located()).parameters.values()
    known = {each.name: as_node(each.default) for each in parameters if each.default is not each.empty}
    return {
        name: _filled(value) if isinstance(value, Mapping) and "_target_" in value else value
        for name, value in {**known, **entries}.items()
    }


def as_node(default: Any) -> Any:
    """A default as a configuration writes it: an object of settings with its `_target_`."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return default
    return {"_target_": target(type(default)), **dataclasses.asdict(default)}


def _differences(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(f"{key}.{name}", one, other)
        elif one is not None and not _same(one, other):
            yield f"{key}.{name}", one


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (one, other))
    if numbers:
        return isclose(one, other, rel_tol=1e-12)
    return bool(one == other) if not isinstance(one, list | tuple) else list(one) == list(other or ())
