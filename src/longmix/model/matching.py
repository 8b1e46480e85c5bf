"""Models of equal size: the feed-forward width that gives a mixer's model a wanted number of parameters.

Mixers differ in weights of their own, and at equal widths the larger model has an advantage that is not its mixer's.
The feed-forward is in every layer and the same for all, so its width takes up the difference, as in GLU-Variants
(Shazeer 2020, arXiv 2002.05202, section 3). Nothing is allocated: models are built on the meta device and counted.
"""

import bisect
import dataclasses
import functools
from typing import TypeVar

import torch

from longmix.config import ModelConfig, TrainConfig
from longmix.errors import ConfigError
from longmix.model.build import build_model

Sized = TypeVar("Sized", bound=ModelConfig)


def match_parameters(config: TrainConfig, vocab_size: int) -> TrainConfig:
    """`config` with the `model.mlp_hidden` that comes nearest to `match.parameters`; unchanged where that is null.

    What comes back holds nothing that has to be matched again: a checkpoint with it is rebuilt as it stands.

    Args:
        config: of a run; it has passed its checks.
        vocab_size: number of token ids.

    Raises:
        ConfigError: the model comes from a checkpoint, or no width meets the number within `match.tolerance`.
    """
    target = config.match.parameters
    if target is None:
        return config
    if config.checkpoint is not None:
        raise ConfigError(
            f"match.parameters={target} asks for a model of that size, and the model comes from "
            f"checkpoint={config.checkpoint}; leave one of the two out."
        )
    width, count = _nearest(config, target, vocab_size)
    if abs(count / target - 1) > config.match.tolerance:
        raise ConfigError(_refusal(config, target, width, count, vocab_size))
    return with_width(config, width)


def with_width(config: Sized, mlp_hidden: int) -> Sized:
    """`config` with another feed-forward width."""
    return dataclasses.replace(config, model=config.model.having(mlp_hidden=mlp_hidden))


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """The number of parameters of the model that `config` describes, without allocating any."""
    with torch.device("meta"):
        return build_model(config, vocab_size).parameter_counts()["total"]


def _nearest(config: TrainConfig, target: int, vocab_size: int) -> tuple[int, int]:
    """The width with the nearest number of parameters among multiples of `match.multiple`, and that number."""
    multiple = config.match.multiple

    @functools.cache
    def count(step: int) -> int:
        return count_parameters(with_width(config, step * multiple), vocab_size)

    # a feed-forward of width h has at least h * d_model weights, so no step from `last` on can be needed
    last = target // config.model.number("d_model") // multiple + 2
    above = 1 + bisect.bisect_left(range(1, last), target, key=count)
    step = min((step for step in (above - 1, above) if step), key=lambda step: abs(count(step) - target))
    return step * multiple, count(step)


def _refusal(config: TrainConfig, target: int, width: int, count: int, vocab_size: int) -> str:
    multiple = config.match.multiple
    if count_parameters(with_width(config, 2 * width), vocab_size) == count:
        return (
            f"match.parameters={target:,} chooses model.mlp_hidden, which changes nothing in this model "
            f"of {count:,}: its block sets the width itself. Set model.block.channel_factor=null, or "
            "match.parameters=null."
        )
    found = (
        f"match.parameters={target:,} cannot be met within match.tolerance={config.match.tolerance}: the nearest model "
        f"has {count:,} ({count / target - 1:+.1%}) with model.mlp_hidden={width}"
    )
    if width == multiple and count > target:
        return (
            f"{found}, and the rest of it needs as many. Give match.parameters={count:,} or more, or a smaller "
            "model.d_model, model.num_layers or mixer."
        )
    return f"{found}. Give a smaller match.multiple (it is {multiple}) or a larger match.tolerance."
