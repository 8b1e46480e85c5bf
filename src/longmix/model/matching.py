"""Models of equal size: the feed-forward width that gives a mixer's model a wanted number of parameters.

Mixers differ in weights of their own, and at equal widths the larger model has an advantage that is not its mixer's.
The feed-forward is in every layer and the same for all, so its width takes up the difference, as in GLU-Variants
(Shazeer 2020, arXiv 2002.05202, section 3). Nothing is allocated: models are built on the meta device and counted.
"""

import bisect
import functools

import torch

from longmix.config import Node
from longmix.errors import ConfigError
from longmix.model.build import build_model


def match_parameters(config: Node, vocab_size: int) -> Node:
    """`config` with the `model.mlp_hidden` that comes nearest to `match.parameters`; unchanged where that is null.

    What comes back holds nothing that has to be matched again: a checkpoint with it is rebuilt as it stands.

    Args:
        config: a resolved training configuration that has passed its checks.
        vocab_size: number of token ids.

    Raises:
        ConfigError: the model comes from a checkpoint, or no width meets the number within `match.tolerance`.
    """
    match = config["match"]
    if match["parameters"] is None:
        return config
    if config["checkpoint"] is not None:
        raise ConfigError(
            f"match.parameters={match['parameters']} asks for a model of that size, and the model comes from "
            f"checkpoint={config['checkpoint']}; leave one of the two out."
        )
    width, count = _nearest(config, vocab_size)
    if abs(count / match["parameters"] - 1) > match["tolerance"]:
        raise ConfigError(_refusal(config, width, count, vocab_size))
    return with_width(config, width)


def with_width(config: Node, mlp_hidden: int) -> Node:
    """`config` with another feed-forward width."""
    return {**config, "model": {**config["model"], "mlp_hidden": mlp_hidden}}


def count_parameters(config: Node, vocab_size: int) -> int:
    """The number of parameters of the model that `config` describes, without allocating any."""
    with torch.device("meta"):
        return build_model(config, vocab_size).parameter_counts()["total"]


def _nearest(config: Node, vocab_size: int) -> tuple[int, int]:
    """The width with the nearest number of parameters among multiples of `match.multiple`, and that number."""
    target, multiple = config["match"]["parameters"], config["match"]["multiple"]

    @functools.cache
    def count(step: int) -> int:
        return count_parameters(with_width(config, step * multiple), vocab_size)

    # a feed-forward of width h has at least h * d_model weights, so no step from `last` on can be needed
    last = target // config["model"]["d_model"] // multiple + 2
    above = 1 + bisect.bisect_left(range(1, last), target, key=count)
    step = min((step for step in (above - 1, above) if step), key=lambda step: abs(count(step) - target))
    return step * multiple, count(step)


def _refusal(config: Node, width: int, count: int, vocab_size: int) -> str:
    match = config["match"]
    if count_parameters(with_width(config, 2 * width), vocab_size) == count:
        return (
            f"match.parameters={match['parameters']:,} chooses model.mlp_hidden, which changes nothing in this model "
            f"of {count:,}: its block sets the width itself. Set model.block.channel_factor=null, or "
            "match.parameters=null."
        )
    target, multiple = match["parameters"], match["multiple"]
    found = (
        f"match.parameters={target:,} cannot be met within match.tolerance={match['tolerance']}: the nearest model has "
        f"{count:,} ({count / target - 1:+.1%}) with model.mlp_hidden={width}"
    )
    if width == multiple and count > target:
        return (
            f"{found}, and the rest of it needs as many. Give match.parameters={count:,} or more, or a smaller "
            "model.d_model, model.num_layers or mixer."
        )
    return f"{found}. Give a smaller match.multiple (it is {multiple}) or a larger match.tolerance."
