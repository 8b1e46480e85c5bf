"""Gated DeltaNet in the format of flash-linear-attention, type `gated_deltanet`, which it needs to run."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

import torch
from torch import Tensor

from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.interop.huggingface.described import (
    CURE,
    Described,
    check_said,
    mixer_of,
    model_settings,
    number,
    require,
    target,
    whole,
)
from longmix.interop.layouts import Layout, Place, renamed
from longmix.mixers.gated_deltanet import GatedDeltaNet
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Standard

TYPE = "gated_deltanet"
ARCHITECTURE = "GatedDeltaNetForCausalLM"

DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 21,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "expand_v": 2.0,
    "use_gate": True,
    "output_gate_activation": "swish",
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "conv_size": 4,
    "head_dim": 256,
    "num_heads": 6,
    "num_v_heads": None,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "attn": None,
    "attnres_block_size": None,
    "quantization_config": None,
}
"""Settings that a file may leave out."""

NAMES = {
    "mixer_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
    "mixer.query": "attn.q_proj",
    "mixer.key": "attn.k_proj",
    "mixer.value": "attn.v_proj",
    "mixer.strength": "attn.b_proj",
    "mixer.decay.up": "attn.a_proj",
    "mixer.gate": "attn.g_proj",
    "mixer.head_norm": "attn.o_norm",
    "mixer.output": "attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Modules of a layer."""


def layout(config: Any) -> Layout:
    """The names of all weights of a model of which `config.json` has the content `config`."""
    keys = config.num_heads * config.head_dim
    layer = {f"{ours}.weight": renamed(f"{theirs}.weight") for ours, theirs in NAMES.items()}
    layer |= {
        "mixer.decay.log_rate": renamed("attn.A_log"),
        "mixer.decay.bias": renamed("attn.dt_bias"),
        "mixer.convolution.weight": _convolution([keys, keys, _values(config)]),
    }
    outside = {
        "embedding.weight": renamed("model.embeddings.weight"),
        "norm.weight": renamed("model.norm.weight"),
        "head.weight": renamed("lm_head.weight"),
    }
    return Layout(outside, layer, "model.layers.")


def _values(config: Any) -> int:
    """The width of values."""
    heads = config.num_heads if config.num_v_heads is None else config.num_v_heads
    return round(heads * config.head_dim * config.expand_v)


def _convolution(widths: Sequence[int]) -> Place:
    """One convolution [tokens, channels], the current token first; there three [channels, 1, tokens], it last."""
    names = tuple(f"attn.{letter}_conv1d.weight" for letter in "qkv")
    return Place(
        names,
        lambda weight: [part.flip(0).T.unsqueeze(1).contiguous() for part in weight.split(list(widths), 1)],
        lambda parts: torch.cat([part.squeeze(1).T.flip(0) for part in parts], 1).contiguous(),
    )


def read(given: Mapping[str, Any]) -> Described:
    """What a `config.json` of this type says.

    Raises:
        ConfigError: a size is no whole number.
    """
    found = Described.of(given, DEFAULTS)
    if found.num_v_heads == found.num_heads:
        found.num_v_heads = None
    for name in ("hidden_act", "output_gate_activation"):
        if getattr(found, name) == "silu":
            setattr(found, name, "swish")
    if found.intermediate_size is None:
        # As its authors round it.
        found.intermediate_size = 256 * -(-int(found.hidden_size * number(found, "hidden_ratio") * 2 / 3) // 256)
    return found


def model_config(config: Described) -> ModelConfig:
    """What a model is built from that a `config.json` describes.

    Raises:
        ConfigError: names the first setting that longmix has not.
    """
    needed = (
        *("use_short_conv", "hidden_act", "output_gate_activation", "attn", "attnres_block_size"),
        "quantization_config",
    )
    require(config, {name: DEFAULTS[name] for name in needed})
    width, heads, head_dim = (whole(config, name) for name in ("hidden_size", "num_heads", "head_dim"))
    value_heads = heads if config.num_v_heads is None else whole(config, "num_v_heads")
    expand, values = number(config, "expand_v"), _values(config)
    if not isclose(head_dim * expand, values / value_heads, rel_tol=1e-5) or values % value_heads:
        raise ConfigError(f"expand_v={expand} in config.json: head_dim={head_dim} times it is not a whole number.")
    if value_heads % heads:
        raise ConfigError(f"num_v_heads={value_heads} in config.json must be a multiple of num_heads={heads}.")
    for name in ("use_gate", "allow_neg_eigval"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r} in config.json must be true or false.")
    model = model_settings(
        config,
        num_heads=heads,
        mlp_hidden=whole(config, "intermediate_size"),
        block={"_target_": target(Standard)},
    )
    mixer = {
        "_target_": target(GatedDeltaNet),
        "decay": "head",
        "output_gate": "silu" if config.use_gate else "none",
        "delta": True,
        "num_heads": heads,
        "num_value_heads": config.num_v_heads,
        "key_factor": heads * head_dim / width,
        "value_factor": values / width,
        "convolution": whole(config, "conv_size", 2),
        "decay_rank": None,
        "gate_rank": None,
        "norm_eps": number(config, "norm_eps"),
        "shared_norm": True,
        "negative_eigenvalues": config.allow_neg_eigval,
        "heads_shared": 0,
    }
    return ModelConfig.of({"model": model, "mixer": mixer})


def described(model: LanguageModel, config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Raises:
        ConfigError: names the first setting that the format has not.
    """
    choice = mixer_of(config, GatedDeltaNet, TYPE)
    first = model.mixers()[0]
    assert isinstance(first, GatedDeltaNet)
    if first.head_norm.weight.numel() != first.value_dim and first.num_heads > 1:
        raise ConfigError(
            f"{choice.key}.shared_norm=false cannot be said in the format {TYPE}, whose heads share the weights of "
            f"their norm; {CURE}"
        )
    if first.convolution is None:
        raise ConfigError(
            f"{choice.key}.convolution=0 cannot be said in the format {TYPE}, which has a SiLU without it too; {CURE}"
        )
    found = {
        "model_type": TYPE,
        "architectures": [ARCHITECTURE],
        "hidden_size": model.shape.d_model,
        "num_hidden_layers": model.shape.num_layers,
        "intermediate_size": config.model.number("mlp_hidden"),
        "num_heads": first.num_heads,
        "num_v_heads": None if first.num_value_heads == first.num_heads else first.num_value_heads,
        "head_dim": first.key_dim,
        "expand_v": first.value_dim / first.key_dim,
        "use_gate": first.output_gate == "silu",
        "use_short_conv": True,
        "allow_neg_eigval": first.negative_eigenvalues,
        "conv_size": first.convolution.size,
        "hidden_act": "swish",
        "norm_eps": model.shape.norm_eps,
        "attn": None,
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
    }
    said = model_config(read({**found, "vocab_size": 1, "max_position_embeddings": 1}))
    check_said(model, config, said, TYPE, ("model.num_heads", "mixer.heads_balance"))
    return found


def to_theirs(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Our weights by the names in such a folder, whose `config.json` has the content `config`."""
    return layout(config).to_theirs(weights)


def to_ours(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of such a folder by our names."""
    return layout(config).to_ours(weights)
