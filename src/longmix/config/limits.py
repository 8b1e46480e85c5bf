"""Numbers that follow from the words of a run: its steps, and windows that limit nothing."""

from collections.abc import Iterable
from typing import Any

from longmix.config.nodes import Node


def unlimited_windows(config: Node) -> list[str]:
    """A note on settings of windows that are as long as the rows and so limit nothing."""
    mixer = config["mixer"]
    nodes = {f"mixer.{name}": part for name, part in mixer.items() if isinstance(part, dict)} or {"mixer": mixer}
    return [
        f"{place}.{key}={value} limits nothing at seq_len={config['seq_len']}"
        for place, node in nodes.items()
        for key, value in node.items()
        if key in ("window", "local_window") and isinstance(value, int) and value >= config["seq_len"]
    ]


def tokens_per_step(config: Node) -> int:
    """Tokens of one optimizer step over all processes."""
    return config["seq_len"] * config["batch_size"]


def with_limits(config: Node, words: Iterable[str]) -> Node:
    """The configuration in which a limit of the command line replaces the other limit, set by a file.

    Of two limits that the command line gives, or that files give, both stay, and the smaller counts.

    Args:
        config: the resolved configuration.
        words: of the command line.
    """
    given = {word.lstrip("+").partition("=")[0] for word in words if word.partition("=")[2] not in ("null", "")}
    for key, other in (("max_steps", "max_tokens"), ("max_tokens", "max_steps")):
        if key in given and other not in given:
            return {**config, other: None}
    return config


def step_limits(config: Node) -> dict[str, int]:
    """Optimizer steps of the whole run by each of `max_steps` and `max_tokens` that is set."""
    limits = {}
    if config["max_steps"] is not None:
        limits["max_steps"] = config["max_steps"]
    if config["max_tokens"] is not None:
        limits["max_tokens"] = -(-config["max_tokens"] // tokens_per_step(config))
    return limits


def total_steps(config: Node) -> int:
    """Optimizer steps of the whole run: `max_steps`, or as many as `max_tokens` needs, whichever is smaller."""
    return min(step_limits(config).values())


def flattened(node: Node, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
