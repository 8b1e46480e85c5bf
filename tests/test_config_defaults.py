"""A choice's file and the class that it names have the same defaults, so that both may be read for the truth."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from longmix.config import locate

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = ("mixer", "model", "block", "data", "tokenizer", "optimizer", "schedule", "trainer", "logger", "task")
OTHERS = {
    "block/rwkv7_published.block.channel_factor": "the published width; the class leaves it to model.mlp_hidden",
    "optimizer/muon.adamw_learning_rate": "chosen beside Muon's own rate of the file; the class has no rate of its own",
    "logger/wandb.tags": "an empty list, which a signature should not share",
    "task/attention.others": "an empty list, which a signature should not share",
}
"""Settings whose file says something else than the class, each with its reason."""


def parts(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_` in a file, by its place."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield key, value
        for name, part in value.items():
            yield from parts(part, f"{key}.{name}")


def written(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[return-value]


def defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a class's settings, also of those that it hands on to its bases."""
    inits = [base.__init__ for base in reversed(target.__mro__)] if inspect.isclass(target) else [target]
    parameters = {name: p for init in inits for name, p in inspect.signature(init).parameters.items()}
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def differences(group: str, path: Path) -> dict[str, tuple[Any, Any]]:
    """What the file says and the class's default, for every setting where both exist and differ."""
    found = {}
    for key, settings in parts(written(path), f"{group}/{path.stem}"):
        known = defaults(locate(settings["_target_"], key))
        for name, value in settings.items():
            if name not in known or "${" in str(value):
                continue
            default = list(known[name]) if isinstance(known[name], tuple) else known[name]
            if value != default and not isinstance(value, dict):
                found[f"{key}.{name}"] = (value, default)
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_files_and_classes_have_the_same_defaults(group):
    found = {}
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        found |= differences(group, path)
    assert {key: pair for key, pair in found.items() if key not in OTHERS} == {}


def test_every_exception_is_one():
    found = {key for group in GROUPS for path in (CONFIGS / group).glob("*.yaml") for key in differences(group, path)}
    assert set(OTHERS) <= found
