"""RWKV-7 has the sizes of the released checkpoints, weight for weight."""

import pytest
import torch

from longmix.config import ModelConfig, TrainConfig, read, resolved
from longmix.errors import ConfigError
from longmix.model.build import build_model
from longmix.model.matching import match_parameters
from longmix.model.rwkv_blocks import RWKVBlocks

VOCABULARY = 65_536
RELEASED = {
    "0.1B": (12, 768, (64, 64, 32, 128), 191_034_624),
    "0.4B": (24, 1024, (64, 64, 32, 128), 450_767_872),
    "1.5B": (24, 2048, (96, 96, 64, 256), 1_527_404_544),
    "2.9B": (32, 2560, (96, 96, 64, 320), 2_947_735_040),
}
"""Layers, width, ranks of decay, rate, value and gate, and parameters."""


def sized(layers: int, width: int, ranks: tuple[int, ...]) -> list[str]:
    names = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
    return [
        "mixer=rwkv7",
        f"model.num_layers={layers}",
        f"model.d_model={width}",
        "block=rwkv7_published",
        *(f"mixer.{name}={rank}" for name, rank in zip(names, ranks, strict=True)),
    ]


@pytest.mark.parametrize(("layers", "width", "ranks", "parameters"), RELEASED.values(), ids=RELEASED)
def test_released_sizes_are_exact(compose_config, layers, width, ranks, parameters):
    with torch.device("meta"):
        model = build_model(read(TrainConfig, compose_config(*sized(layers, width, ranks))), VOCABULARY)
    assert model.parameter_counts()["total"] == parameters
    assert {block.mlp.key.weight.shape for block in model.blocks} == {(4 * width, width)}


@pytest.mark.parametrize("hidden", [1, 32, 352, 2048, 5461])
def test_without_a_width_of_its_own_the_channel_mixing_keeps_its_size(compose_config, hidden):
    """Nor has a checkpoint of before the setting, which so loads and continues."""
    words = "mixer=rwkv7", "mixer.head_dim=32", "model.d_model=32", f"model.mlp_hidden={hidden}"
    config = resolved(compose_config(*words))
    assert config["model"]["block"].pop("channel_factor") is None
    with torch.device("meta"):
        model = build_model(ModelConfig.of(config), 256)
    assert model.blocks[0].mlp.key.weight.shape == (max(1, 3 * hidden // 2), 32)


def test_a_factor_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match=r"model.block.channel_factor=0.0 must be positive, or null"):
        RWKVBlocks(channel_factor=0.0)


def test_matching_says_that_the_block_sets_the_width(compose_config):
    sizes = sized(2, 64, (32, 32, 32, 32))
    config = read(TrainConfig, compose_config(*sizes, "match.parameters=1000000"))
    with pytest.raises(ConfigError, match=r"Set model.block.channel_factor=null, or match.parameters=null"):
        match_parameters(config, 256)
