"""The stages of a finished run, as its summary has them; a run without stages is one stage."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any


def is_staged(summary: Mapping[str, Any]) -> bool:
    """Whether a run had stages."""
    return bool(summary.get("stages"))


def steps_of(summary: Mapping[str, Any]) -> float:
    """The number of steps of the whole run."""
    if is_staged(summary):
        return sum(stage["steps"] for stage in summary["stages"])
    steps: float = summary["tokens"] / summary["tokens_per_step"]
    return steps


def tokens_at(summary: Mapping[str, Any], step: float) -> float:
    """The tokens of the first `step` steps."""
    if not is_staged(summary):
        tokens: float = step * summary["tokens_per_step"]
        return tokens
    tokens, left = 0.0, step
    for stage in summary["stages"]:
        taken = min(left, stage["steps"])
        tokens, left = tokens + taken * stage["tokens_per_step"], left - taken
    return tokens


def borders(summary: Mapping[str, Any]) -> list[int]:
    """The step after which each stage but the first begins."""
    return list(accumulate(stage["steps"] for stage in summary.get("stages", ())))[:-1]
