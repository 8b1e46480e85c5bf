"""Numbers that follow from the words of a run: its steps, and windows that limit nothing."""

import dataclasses
from collections.abc import Iterable, Mapping

from longmix.config.commands import TrainConfig
from longmix.config.course import course_of


def unlimited_windows(config: TrainConfig) -> list[str]:
    """A note on settings of windows that are as long as the rows and so limit nothing."""
    return [
        f"{choice.key}.{name}={value} limits nothing at seq_len={config.seq_len}"
        for choice in config.mixer.choices
        for name, value in choice.settings.items()
        if name in ("window", "local_window") and isinstance(value, int) and value >= config.seq_len
    ]


def with_limits(config: TrainConfig, words: Iterable[str]) -> TrainConfig:
    """The configuration in which a limit of the command line replaces the other limit, set by a file.

    Of two limits that the command line gives, or that files give, both stay, and the smaller counts.

    Args:
        config: as Hydra composed it.
        words: of the command line.
    """
    last = {name.lstrip("+"): value for name, _, value in (word.partition("=") for word in words)}
    given = {name for name, value in last.items() if value not in ("null", "")}
    if "max_steps" in given and "max_tokens" not in given:
        return dataclasses.replace(config, max_tokens=None)
    if "max_tokens" in given and "max_steps" not in given:
        return dataclasses.replace(config, max_steps=None)
    return config


def total_steps(config: TrainConfig) -> int:
    """Optimizer steps of the whole run: `max_steps`, or as many as `max_tokens` needs, whichever is smaller.

    Of a run with stages, the steps of all of them.
    """
    return course_of(config).total_steps


def flattened(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as one dict with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
