"""RWKV-7 in the format of flash-linear-attention, type `rwkv7`; its authors' own files are `longmix.interop.rwkv`'s.

The folder needs flash-linear-attention to run. That adds 1e-6 to the squared length of removal keys where the authors
and longmix do not, if its kernels are fused: about 1e-6 of a logit.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.interop.huggingface.described import (
    Described,
    check_said,
    mixer_of,
    model_settings,
    number,
    require,
    target,
    whole,
)
from longmix.interop.layouts import Layout, renamed, rows, vector
from longmix.interop.rwkv import LOW_RANK
from longmix.mixers.rwkv7 import RWKV7
from longmix.model.backbone import LanguageModel
from longmix.model.rwkv_blocks import ChannelMix, RWKVBlocks

TYPE = "rwkv7"
ARCHITECTURE = "RWKV7ForCausalLM"

DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "head_dim": 64,
    "num_heads": None,
    "decay_low_rank_dim": 64,
    "gate_low_rank_dim": 128,
    "a_low_rank_dim": 64,
    "v_low_rank_dim": 16,
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "attn": None,
    "value_dim": None,
    "quantization_config": None,
}
"""Settings that a file may leave out."""

RANKS = {
    "decay": "decay_low_rank_dim",
    "rate": "a_low_rank_dim",
    "value": "v_low_rank_dim",
    "gate": "gate_low_rank_dim",
}
"""Our names of the thin matrices, and the settings that have their ranks."""


def layout(heads: int) -> Layout:
    """The names of all weights, of a model with so many heads in a layer."""
    layer = {
        "mixer.shifts": rows(*(f"attn.x_{letter}" for letter in "rwkvag")),
        "mixer.removal_scale": renamed("attn.k_k"),
        "mixer.replacement_scale": renamed("attn.k_a"),
        "mixer.bonus": vector("attn.r_k", heads, -1),
        "mlp.shift": renamed("ffn.x_k"),
        "mlp.key.weight": renamed("ffn.key.weight"),
        "mlp.value.weight": renamed("ffn.value.weight"),
    }
    for ours, theirs in {"query": "r", "key": "k", "value": "v", "output": "o"}.items():
        layer[f"mixer.{ours}.weight"] = renamed(f"attn.{theirs}_proj.weight")
    for ours, letter in LOW_RANK.items():
        layer[f"mixer.{ours}.down.weight"] = renamed(f"attn.{letter}_lora.lora.0.weight")
        layer[f"mixer.{ours}.up.weight"] = renamed(f"attn.{letter}_lora.lora.2.weight")
        if letter != "g":
            layer[f"mixer.{ours.removesuffix('_mix')}_base"] = renamed(f"attn.{letter}_lora.lora.2.bias")
    norms = {"mixer_norm": "attn_norm", "mlp_norm": "ffn_norm", "mixer.head_norm": "attn.g_norm"}
    outside = {"embedding.weight": renamed("model.embeddings.weight"), "head.weight": renamed("lm_head.weight")}
    for part in ("weight", "bias"):
        layer |= {f"{ours}.{part}": renamed(f"{theirs}.{part}") for ours, theirs in norms.items()}
        outside |= {
            f"norm.{part}": renamed(f"model.norm.{part}"),
            f"embedding_norm.{part}": renamed(f"model.layers.0.pre_norm.{part}"),
        }
    return Layout(outside, layer, "model.layers.")


def read(given: Mapping[str, Any]) -> Described:
    """What a `config.json` of this type says.

    Raises:
        ConfigError: a size is no whole number.
    """
    found = Described.of(given, DEFAULTS)
    if found.head_dim is None and found.num_heads is not None:
        found.head_dim = found.hidden_size // whole(found, "num_heads")
    if found.num_heads == found.hidden_size // whole(found, "head_dim"):
        found.num_heads = None
    if found.value_dim in (found.hidden_size, [found.hidden_size] * found.num_hidden_layers):
        found.value_dim = None
    if found.intermediate_size is None:
        # As its authors round it.
        found.intermediate_size = 32 * -(-int(found.hidden_size * number(found, "hidden_ratio")) // 32)
    return found


def model_config(config: Described) -> ModelConfig:
    """What a model is built from that a `config.json` describes.

    Raises:
        ConfigError: names the first setting that longmix has not.
    """
    needed = ("hidden_act", "norm_first", "norm_bias", "attn", "value_dim", "num_heads", "quantization_config")
    require(config, {name: DEFAULTS[name] for name in needed})
    eps = number(config, "norm_eps")
    hidden = whole(config, "intermediate_size")
    block = {"_target_": target(RWKVBlocks), "channel_factor": hidden / config.hidden_size}
    model = model_settings(config, num_heads=1, mlp_hidden=hidden, block=block)
    ranks = {f"{ours}_rank": whole(config, theirs) for ours, theirs in RANKS.items()}
    mixer = {"_target_": target(RWKV7), "head_dim": config.head_dim, **ranks, "norm_eps": config.head_dim * eps}
    return ModelConfig.of({"model": model, "mixer": mixer})


def described(model: LanguageModel, config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Raises:
        ConfigError: names the first setting that the format has not.
    """
    mixer_of(config, RWKV7, TYPE)
    first, mlp = model.mixers()[-1], model.blocks[0].get_submodule("mlp")
    assert isinstance(first, RWKV7)
    if not isinstance(mlp, ChannelMix):
        raise ConfigError(f"block=standard is not in the format {TYPE}, which has block=rwkv7's.")
    value_rank = 16 if first.value_mix is None else first.value_mix.down.out_features
    found = {
        "model_type": TYPE,
        "architectures": [ARCHITECTURE],
        "hidden_size": model.shape.d_model,
        "num_hidden_layers": model.shape.num_layers,
        "intermediate_size": mlp.key.out_features,
        "head_dim": first.head_dim,
        "decay_low_rank_dim": first.decay.down.out_features,
        "a_low_rank_dim": first.rate.down.out_features,
        "v_low_rank_dim": value_rank,
        "gate_low_rank_dim": first.gate.down.out_features,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": model.shape.norm_eps,
        "attn": None,
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
    }
    said = model_config(read({**found, "vocab_size": 1, "max_position_embeddings": 1}))
    check_said(model, config, said, TYPE, ("model.num_heads", "model.mlp_hidden"))
    return found


def to_theirs(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Our weights by the names in such a folder, whose `config.json` has the content `config`."""
    return layout(config.hidden_size // config.head_dim).to_theirs(weights)


def to_ours(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of such a folder by our names."""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith(".attn.x_x")]:
        # Folders of early versions have the six shifts in one weight.
        shifts = weights.pop(name)
        if len(shifts) != len("rwkvag"):
            weights[name] = shifts
            continue
        prefix = name.removesuffix("x")
        weights |= {f"{prefix}{letter}": row for letter, row in zip("rwkvag", shifts, strict=True)}
    return layout(config.hidden_size // config.head_dim).to_ours(weights)
