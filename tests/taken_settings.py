"""Which settings a class takes at other values than their defaults."""

from collections.abc import Callable
from typing import Any

from longmix.config import settings
from longmix.mixers.parts.softmax import SoftmaxAttention


def taken_settings(target: Callable[..., Any]) -> set[str]:
    """The arguments of a class or function, but for the head options that a softmax mixer only refuses."""
    taken = set(settings(target))
    if not (isinstance(target, type) and issubclass(target, SoftmaxAttention)):
        return taken
    if not target.pairwise or "bias" in target.refused:
        taken -= {"bias", "bias_rank"}
    if not target.takes_sink_logits or "sink_logits" in target.refused:
        taken -= {"sink_logits"}
    return taken if target.takes_gain else taken - {"gain"}
