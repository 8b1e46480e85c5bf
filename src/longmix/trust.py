"""Names in files from elsewhere: only classes of the right kind are accepted, and nothing that runs.

The configuration on the command line is its user's word and may name any class or function. A checkpoint or an
exported folder may come from anybody. Each place of such a file has a kind, a base class, and a name at that place is
accepted if

    - it is a class, never a function, that derives from the kind of its place, or has all methods of a protocol;
    - longmix defines it, in the module that it is named by, or `trust=[package.module.Class]` names it in full.

A setting that is a number, a text or a list holds no class at all. Names are looked up only within longmix, so nothing
else is imported to find out, and nothing is called before all of a file's names have passed.
"""

import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from longmix.config import Choice, Plain, holds_target, node_kind, settings
from longmix.errors import CheckpointError, ConfigError

OWN_PACKAGES = ("longmix", "longmix_kernels")

STORAGE = frozenset({"abfs", "abfss", "adl", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3"})
"""Protocols that only fetch bytes. fsspec knows others, and chains of them, that interpret what they fetch."""

SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*)(://|::)")


def check_model_nodes(config: Plain, trust: Collection[str] = ()) -> None:
    """Refuse nodes `model` and `mixer` of a checkpoint's configuration that name other classes than parts of models.

    Args:
        config: the checkpoint's configuration.
        trust: full names of classes besides longmix's own.

    Raises:
        CheckpointError: a node is missing or is no node.
        ConfigError: names the key, what stands there and how to allow it.
    """
    from longmix.mixers.parts.base import Mixer
    from longmix.model.backbone import LanguageModel

    _check_trust_words(trust)
    model, mixer = _node(config, "model"), _node(config, "mixer")
    _check(model, "model", LanguageModel, trust)
    if "pattern" not in mixer:
        _check(mixer, "mixer", Mixer, trust)
        return
    for name, member in mixer.items():
        if name != "pattern":
            _check(member, f"mixer.{name}", Mixer, trust)


def checked_data(data: Choice, trust: Collection[str] = ()) -> Choice:
    """The data of a checkpoint's configuration, which name nothing but data, corpora and plain storage.

    Their `cache_dir` is left out where there is no such folder: a checkpoint makes none.

    Raises:
        CheckpointError, ConfigError: see `check_model_nodes`.
    """
    from longmix.data.training_data import TrainingData

    _check_trust_words(trust)
    _check(data.entries, "data", TrainingData, trust)
    for key, text in _texts(data.entries, "data"):
        scheme = SCHEME.match(text)
        if scheme is not None and (scheme[2] == "::" or scheme[1].lower() not in STORAGE):
            raise ConfigError(
                f"the checkpoint's {key}={text} is not at a kind of storage that only holds bytes. If you want these "
                "data, give them on the command line with data=."
            )
    has_cache = Path(str(data.entries.get("cache_dir"))).expanduser().is_dir()
    return Choice.of("data", {name: value for name, value in data.entries.items() if has_cache or name != "cache_dir"})


def _node(config: Plain, key: str) -> Plain:
    node = config.get(key) if isinstance(config, dict) else None
    if not isinstance(node, dict):
        raise CheckpointError(f"the checkpoint's configuration has no node {key!r}, so it is none that longmix wrote.")
    return node


def _check_trust_words(trust: Collection[str]) -> None:
    for name in trust:
        if "." not in str(name):
            raise ConfigError(
                f"trust=[{name}] names no class; give full names of classes, such as trust=[{name}.module.Class]."
            )


def _check(node: Any, key: str, kind: type, trust: Collection[str]) -> None:
    """Refuse a node if its `_target_`, or that of a node within, breaks the rules in the module's head."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise CheckpointError(f"the checkpoint's {key}={node!r} has no `_target_`, so it is none that longmix wrote.")
    target = _trusted_class(str(node["_target_"]), key, kind, trust)
    hints = settings(target)
    for name, value in node.items():
        if name == "_target_" or not holds_target(value):
            continue
        inner, several = node_kind(hints.get(name, Any))
        if inner is None:
            raise ConfigError(
                f"the checkpoint's {key}.{name} names a class or function, where longmix takes a plain value; it "
                "could run any code. Do not use this checkpoint."
            )
        for place, part in value.items() if several and "_target_" not in value else [("", value)]:
            _check(part, f"{key}.{name}" + (f".{place}" if place else ""), inner, trust)


def _trusted_class(name: str, key: str, kind: type, trust: Collection[str]) -> type:
    module, _, own_name = name.rpartition(".")
    if name in trust:
        found = _class_at(module, own_name)
        if found is None:
            raise ConfigError(f"the checkpoint's {key}={name} cannot be imported, or is no class.")
    elif module.split(".")[0] not in OWN_PACKAGES:
        raise ConfigError(f"the checkpoint's {key}={name} is not part of longmix; if you trust it, add trust=[{name}].")
    else:
        found = _own_class(module, own_name)
        if found is None:
            raise ConfigError(
                f"the checkpoint's {key}={name} is no class that longmix defines there; it could run any code. Do not "
                "use this checkpoint."
            )
    if not _is_of(found, kind):
        raise ConfigError(f"the checkpoint's {key}={name} is a {found.__name__}, and no {kind.__name__}.")
    return found


def _is_of(found: type, kind: type) -> bool:
    """Whether a class derives from a base class, or has every method of a protocol."""
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    methods = {
        name
        for base in kind.__mro__
        for name, member in vars(base).items()
        if getattr(base, "_is_protocol", False) and inspect.isfunction(member) and not name.startswith("_")
    }
    return bool(methods) and all(callable(getattr(found, name, None)) for name in methods)


def _own_class(module: str, name: str) -> type | None:
    """A class of longmix that is defined in the module it is named by."""
    found = _class_at(module, name)
    return found if found is not None and found.__module__ == module else None


def _class_at(module: str, name: str) -> type | None:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if inspect.isclass(found) else None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _texts(part, f"{key}[{number}]")
