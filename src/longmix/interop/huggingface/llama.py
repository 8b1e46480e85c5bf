"""Models of Llama's family, which transformers knows: softmax attention with rotary positions.

    flash, mixer.qk_norm=false    LlamaForCausalLM
    sliding_window, the same      MistralForCausalLM, whose window counts the token itself as ours does
    either with mixer.qk_norm, or a pattern of both     Qwen3ForCausalLM
    either with mixer.rotary_fraction                   Phi3ForCausalLM, which alone rotates a share of the channels

All have RMSNorm, SwiGLU, grouped key-value heads and the half-split rotary layout, as `model.blocks.Standard`
has, so that weights are renamed and nothing else. Scaled positions are `rope_parameters`. Rotary frequencies are formed
as base^-e here and 1 / base^e there, which differ by float32 rounding: about 6e-8 of an angle.
"""

from typing import Any

from torch import Tensor

from longmix.config import Choice, ModelConfig, Pattern, default_setting, settings
from longmix.errors import ConfigError
from longmix.interop.huggingface.described import as_node
from longmix.interop.huggingface.fused import divided, fused
from longmix.interop.huggingface.rope import positions_of, read_rope, rope_of
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.rotary import POSITIONS
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Standard
from longmix.model.changes import OF_TRAINING

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mixer.query": "self_attn.q_proj",
    "mixer.key": "self_attn.k_proj",
    "mixer.value": "self_attn.v_proj",
    "mixer.output": "self_attn.o_proj",
    "mixer.query_norm": "self_attn.q_norm",
    "mixer.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Names of modules, ours and theirs; those of a layer follow its number."""

MODEL_SETTINGS = {"d_model", "num_layers", "num_heads", "mlp_hidden", "block", "tie_head", "norm_eps"}
"""Settings that the family supports."""

MIXER_SETTINGS = {"num_heads", "num_kv_heads", "qk_norm", "window", "attention_dropout", *POSITIONS}

IGNORED_WEIGHTS = "rotary_emb.inv_freq"
"""Buffers that are computed, and that older folders hold."""


def to_theirs(name: str) -> str:
    """The name in these folders of a weight of ours."""
    if not name.startswith("blocks."):
        return _renamed(name, NAMES)
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_renamed(rest, NAMES)}"


def to_ours(name: str) -> str:
    """Our name of a weight in such a folder; an unknown one stays as it is."""
    ours = {theirs: our for our, theirs in NAMES.items()}
    if not name.startswith("model.layers."):
        return _renamed(name, ours)
    _, _, layer, rest = name.split(".", 3)
    return f"blocks.{layer}.{_renamed(rest, ours)}"


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{names.get(module, module)}.{leaf}"


def described(model: LanguageModel, config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` for a model, `model_type` included.

    Args:
        model: without weights (on the meta device) or with.
        config: what it was built from.

    Raises:
        ConfigError: names the first setting that no type of the family has.
    """
    _check_settings(config.model, MODEL_SETTINGS | {*OF_TRAINING})
    block = config.model.entries.get("block")
    if block not in (_STANDARD, None):
        raise ConfigError(f"model.block={Choice.of('model.block', block).target} is not in Llama's family; {_CURE}")
    choices = _layer_choices(config.mixer, model.shape.num_layers)
    for choice, mixer in zip(choices, model.mixers(), strict=True):
        if type(mixer) not in (Flash, SlidingWindow):
            raise ConfigError(f"{choice.key}={choice.target} is not in Llama's family; {_CURE}")
        _check_settings(choice, MIXER_SETTINGS)
    first = model.mixers()[0]
    assert isinstance(first, Flash | SlidingWindow)
    shared = {name: _facts(first)[name] for name in _facts(first) if name != "window"}
    for choice, mixer in zip(choices, model.mixers(), strict=True):
        for name, value in shared.items():
            if _facts(mixer)[name] != value:
                raise ConfigError(
                    f"{choice.key}.{name}={_facts(mixer)[name]} is not that of the first layer, {value}; Llama's "
                    f"family has one for all layers. {_CURE.capitalize()}"
                )
    windows = [_facts(mixer)["window"] for mixer in model.mixers()]
    return {
        "hidden_size": model.shape.d_model,
        "num_hidden_layers": model.shape.num_layers,
        "intermediate_size": config.model.number("mlp_hidden"),
        "num_attention_heads": shared["num_heads"],
        "num_key_value_heads": shared["num_kv_heads"],
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.shape.norm_eps,
        "rope_parameters": rope_of(first.rotary, first.head_dim),
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
        **_window_settings(windows, shared["qk_norm"], _is_partial(first)),
    }


_STANDARD = {"_target_": f"{Standard.__module__}.{Standard.__qualname__}"}
_CURE = "use --as longmix, which holds any model."


def _check_settings(choice: Choice, known: set[str]) -> None:
    """Refuse settings beyond the known ones unless they are at their default: their effect would be lost."""
    target = choice.located()
    for name in settings(target):
        if name in known or name not in choice.settings:
            continue
        value = choice.settings[name]
        if value != as_node(default_setting(target, name)):
            raise ConfigError(f"{choice.key}.{name}={value!r} cannot be said in Llama's family; {_CURE}")


def _layer_choices(mixer: Choice | Pattern, layers: int) -> list[Choice]:
    """Each layer's mixer."""
    if isinstance(mixer, Choice):
        return [mixer] * layers
    return [mixer.members[mixer.order[layer % len(mixer.order)]] for layer in range(layers)]


def _facts(mixer: Mixer) -> dict[str, Any]:
    assert isinstance(mixer, Flash | SlidingWindow)
    return {
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        **positions_of(mixer.rotary, mixer.head_dim),
        "qk_norm": hasattr(mixer.query_norm, "weight"),
        "window": getattr(mixer, "window", None),
    }


def _is_partial(mixer: Flash | SlidingWindow) -> bool:
    """Whether some channels do not rotate.

    Raises:
        ConfigError: the mixer has besides what Phi-3 lacks.
    """
    if mixer.rotary is None or mixer.rotary.channels == mixer.head_dim:
        return False
    if mixer.rotary.scaling is not None or hasattr(mixer.query_norm, "weight"):
        share = mixer.rotary.channels / mixer.head_dim
        raise ConfigError(
            f"mixer.rotary_fraction={share:g} with mixer.qk_norm=true or a mixer.rotary_scaling: no type of Llama's "
            f"family has both. {_CURE.capitalize()}"
        )
    return True


def _window_settings(windows: list[int | None], qk_norm: bool, partial: bool) -> dict[str, Any]:
    found = {window for window in windows if window is not None}
    if len(found) > 1:
        raise ConfigError(f"mixer.window has several sizes, {sorted(found)}; Llama's family has one. {_CURE}")
    window = next(iter(found), None)
    if qk_norm:
        kinds = ["full_attention" if own is None else "sliding_attention" for own in windows]
        layers = {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}
        return {"model_type": "qwen3", **(layers if window else {})}
    if window is None:
        return {"model_type": "phi3" if partial else "llama"}
    if None in windows:
        raise ConfigError(
            "mixer.qk_norm=false with windows in some layers alone: no type of Llama's family has both. " + _CURE
        )
    return {"model_type": "phi3" if partial else "mistral", "sliding_window": window}


def read_config(config: Any) -> ModelConfig:
    """What a model is built from that a `config.json` of the family describes.

    Args:
        config: transformers' object of it.

    Raises:
        ConfigError: names the first setting that longmix has not.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = dict(config.rope_parameters or {})
    needed = {
        "hidden_act": ("silu", config.hidden_act),
        "attention_bias": (False, getattr(config, "attention_bias", False)),
        "mlp_bias": (False, getattr(config, "mlp_bias", False)),
        "quantization_config": (None, getattr(config, "quantization_config", None)),
        "head_dim": (config.hidden_size // config.num_attention_heads, head_dim),
    }
    if config.model_type != "phi3":  # the others' own code passes over it
        needed["rope_parameters.partial_rotary_factor"] = (1.0, rope.get("partial_rotary_factor", 1.0))
    for name, (ours, theirs) in needed.items():
        if theirs != ours:
            raise ConfigError(
                f"{name}={theirs!r} in config.json: longmix has {ours!r} alone, so it cannot be imported."
            )
    model = {
        "_target_": f"{LanguageModel.__module__}.{LanguageModel.__qualname__}",
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_hidden": config.intermediate_size,
        "tie_head": bool(config.tie_word_embeddings),
        "norm_eps": config.rms_norm_eps,
        "logit_penalty": 0.0,
        "activation_checkpointing": "none",
        "activation_offload": False,
        "block": dict(_STANDARD),
    }
    options = {
        "num_heads": None,
        "num_kv_heads": config.num_key_value_heads,
        **read_rope(rope, config.max_position_embeddings),
        "qk_norm": config.model_type == "qwen3",
    }
    return ModelConfig.of({"model": model, "mixer": _mixer(_windows_of(config), options)})


def _windows_of(config: Any) -> list[int | None]:
    """Each layer's window, or None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama":
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types in config.json has {kind!r}, which longmix cannot import.")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mixer(windows: list[int | None], options: dict[str, Any]) -> dict[str, Any]:
    flash = {"_target_": f"{Flash.__module__}.{Flash.__qualname__}", **options}
    sliding = {"_target_": f"{SlidingWindow.__module__}.{SlidingWindow.__qualname__}", **options}
    sliding["window"] = next((window for window in windows if window is not None), None)
    if sliding["window"] is None:
        return flash
    if None not in windows:
        return sliding
    names = ["flash" if window is None else "sliding_window" for window in windows]
    return {"pattern": names, "flash": flash, "sliding_window": sliding}


def their_weights(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Our weights by the names that they have in such a folder."""
    theirs = {to_theirs(name): weight for name, weight in weights.items()}
    return fused(theirs) if model_type == "phi3" else theirs


def renamed_weights(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of such a folder by our names.

    Args:
        weights: by their names.
        config: transformers' object of `config.json`.
    """
    if config.model_type == "phi3":
        weights = divided(weights, config.num_attention_heads, config.num_key_value_heads)
    return {to_ours(name): weight for name, weight in weights.items() if not name.endswith(IGNORED_WEIGHTS)}
