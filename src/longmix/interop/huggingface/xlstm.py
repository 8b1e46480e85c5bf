"""xLSTM 7B's format, type `xlstm`, which transformers runs alone: mLSTM with exponential gates, and soft-capped logits.

Weights may be fused there (`weight_mode`), and are divided as they come in. transformers adds 1e-6 to the normaliser
before the head-wise norm, which then divides it out.
"""

from collections.abc import Mapping
from math import nextafter
from typing import Any

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
from longmix.interop.layouts import Layout, renamed
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Standard

TYPE = "xlstm"
ARCHITECTURE = "xLSTMForCausalLM"

DEFAULTS = {
    "hidden_size": None,
    "embedding_dim": None,
    "num_hidden_layers": None,
    "num_blocks": None,
    "vocab_size": 50304,
    "max_position_embeddings": 8192,
    "num_heads": 8,
    "use_bias": False,
    "add_out_norm": True,
    "norm_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
    "weight_mode": "single",
    "quantization_config": None,
}
"""Settings that a file may leave out. Of the length of its training rows a file says nothing: 8,192 was published."""

NAMES = {
    "mixer_norm": "norm_mlstm",
    "mlp_norm": "norm_ffn",
    "mixer.query": "mlstm_layer.q",
    "mixer.key": "mlstm_layer.k",
    "mixer.value": "mlstm_layer.v",
    "mixer.output_gate": "mlstm_layer.ogate_preact",
    "mixer.input_gate": "mlstm_layer.igate_preact",
    "mixer.forget_gate": "mlstm_layer.fgate_preact",
    "mixer.head_norm": "mlstm_layer.multihead_norm",
    "mixer.output": "mlstm_layer.out_proj",
    "mlp.gate": "ffn.proj_up_gate",
    "mlp.up": "ffn.proj_up",
    "mlp.down": "ffn.proj_down",
}
"""Modules of a layer."""

FUSED = {
    "mlstm_layer.qkv_opreact": ("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"),
    "mlstm_layer.ifgate_preact": ("mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"),
    "ffn.proj_up_gate_z": ("ffn.proj_up_gate", "ffn.proj_up"),
}
"""Modules of `weight_mode` fused, and those of single in the order of the rows."""


def layout() -> Layout:
    """The names of all weights."""
    layer = {f"{ours}.weight": renamed(f"{theirs}.weight") for ours, theirs in NAMES.items()}
    for gate in ("input_gate", "forget_gate"):
        layer[f"mixer.{gate}.bias"] = renamed(f"{NAMES[f'mixer.{gate}']}.bias")
    outside = {
        "embedding.weight": renamed("backbone.embeddings.weight"),
        "norm.weight": renamed("backbone.out_norm.weight"),
        "head.weight": renamed("lm_head.weight"),
    }
    return Layout(outside, layer, "backbone.blocks.")


def read(given: Mapping[str, Any]) -> Described:
    """What a `config.json` of this type says; the two names of the width and of the depth stand for one another.

    Raises:
        ConfigError: a size is no whole number, or the two names of one have different values.
    """
    found = {**DEFAULTS, **given}
    for name, other, default in (("hidden_size", "embedding_dim", 4096), ("num_hidden_layers", "num_blocks", 32)):
        values = [found[each] for each in (name, other) if found[each] is not None]
        if len(set(values)) > 1:
            raise ConfigError(f"{name}={found[name]!r} and {other}={found[other]!r} in config.json must be equal.")
        found[name] = found[other] = values[0] if values else default
    return Described.of(found, {})


def model_config(config: Described) -> ModelConfig:
    """What a model is built from that a `config.json` describes.

    Raises:
        ConfigError: names the first setting that longmix has not.
    """
    needed = {name: DEFAULTS[name] for name in ("use_bias", "add_out_norm", "quantization_config")}
    require(config, {**needed, "tie_word_embeddings": False, "v_dim_factor": 1})
    if config.weight_mode not in ("single", "fused"):
        raise ConfigError(f"weight_mode={config.weight_mode!r} in config.json must be single or fused.")
    width, heads = whole(config, "hidden_size"), whole(config, "num_heads")
    eps = number(config, "norm_eps")
    model = model_settings(
        config,
        num_heads=heads,
        mlp_hidden=_hidden(width, number(config, "ffn_proj_factor"), whole(config, "ffn_round_up_to_multiple_of")),
        logit_softcap=number(config, "output_logit_soft_cap"),
        block={"_target_": target(Standard)},
    )
    mixer = {
        "_target_": target(MLSTMTFLA),
        "gate": "exp",
        "num_heads": heads,
        "key_factor": int(width * number(config, "qk_dim_factor")) / width,
        "norm": "layer",
        "norm_eps": eps,
        "convolution": 0,
        "gate_cap": number(config, "gate_soft_cap"),
        "input_bias": -10.0,
        "forget_bias": [3.0, 6.0],
        "heads_shared": 0,
    }
    return ModelConfig.of({"model": model, "mixer": mixer})


def _hidden(width: int, factor: float, multiple: int) -> int:
    """The inner width of the feed-forward, as transformers rounds it."""
    return int(((width * factor + multiple - 1) // multiple) * multiple)


def _factor(width: int, hidden: int, multiple: int) -> float:
    """A factor for which `_hidden` gives `hidden`."""
    factor = hidden / width
    return factor if _hidden(width, factor, multiple) == hidden else nextafter(factor, factor + 1)


def described(model: LanguageModel, config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Raises:
        ConfigError: names the first setting that the format has not.
    """
    mixer_of(config, MLSTMTFLA, TYPE)
    first = model.mixers()[0]
    assert isinstance(first, MLSTMTFLA)
    if model.logit_softcap is None:
        raise ConfigError(f"model.logit_softcap=null cannot be said in the format {TYPE}; {CURE}")
    width, hidden = model.shape.d_model, config.model.number("mlp_hidden")
    multiple = 1 if hidden % 64 else 64
    found = {
        "model_type": TYPE,
        "architectures": [ARCHITECTURE],
        "hidden_size": width,
        "embedding_dim": width,
        "num_hidden_layers": model.shape.num_layers,
        "num_blocks": model.shape.num_layers,
        "num_heads": first.num_heads,
        "use_bias": False,
        "add_out_norm": True,
        "norm_eps": model.shape.norm_eps,
        "qk_dim_factor": first.key_dim * first.num_heads / width,
        "v_dim_factor": 1.0,
        "ffn_proj_factor": _factor(width, hidden, multiple),
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": first.gate_cap,
        "output_logit_soft_cap": model.logit_softcap,
        "weight_mode": "single",
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
    }
    said = model_config(read({**found, "vocab_size": 1, "max_position_embeddings": 1, "tie_word_embeddings": False}))
    check_said(
        model, config, said, TYPE, ("model.num_heads", "mixer.input_bias", "mixer.forget_bias", "mixer.heads_balance")
    )
    return found


def to_theirs(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Our weights by the names in such a folder."""
    return layout().to_theirs(weights)


def to_ours(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of such a folder by our names; fused ones are divided."""
    return layout().to_ours(_divided(weights, config) if config.weight_mode == "fused" else weights)


def _divided(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    keys = int(config.hidden_size * config.qk_dim_factor)
    hidden = _hidden(config.hidden_size, config.ffn_proj_factor, config.ffn_round_up_to_multiple_of)
    sizes = {
        "mlstm_layer.qkv_opreact": (keys, keys, config.hidden_size, config.hidden_size),
        "mlstm_layer.ifgate_preact": (config.num_heads, config.num_heads),
        "ffn.proj_up_gate_z": (hidden, hidden),
    }
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        fused = next((each for each in FUSED if module.endswith(f".{each}")), None)
        if fused is None or len(weight) != sum(sizes[fused]):
            found[name] = weight
            continue
        before = module.removesuffix(fused)
        parts = weight.split(sizes[fused])
        found |= {f"{before}{part}.{leaf}": own for part, own in zip(FUSED[fused], parts, strict=True)}
    return found
