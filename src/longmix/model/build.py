"""From the configuration's `model` and `mixer` nodes to a model."""

from typing import Any

import torch

from longmix.config import Node, build, check, unknown_key
from longmix.errors import ConfigError
from longmix.mixers.base import Mixer, ModelShape
from longmix.model.backbone import LanguageModel, MixerFactory
from longmix.model.states import check_weights, load_weights

MIXER_ARGUMENTS = {"shape", "layer_index"}
CHECK_VOCABULARY = 2


def mixer_factory(node: Node) -> MixerFactory:
    """Builds each layer's mixer from the `mixer` node.

    The node is one mixer for all layers, or a pattern over named members that repeats along the layers.

    Raises:
        ConfigError: the pattern names a member that has no settings, or a setting is wrong.
    """
    if "pattern" not in node:
        check(node, "mixer", MIXER_ARGUMENTS)
        return lambda shape, layer_index: build(node, "mixer", shape=shape, layer_index=layer_index)
    pattern = node["pattern"]
    if not isinstance(pattern, list) or not pattern:
        raise ConfigError(f"mixer.pattern={pattern!r} is not a list of at least one member's name.")
    members = [name for name in node if name != "pattern"]
    for name in pattern:
        if name not in members:
            raise ConfigError(f"mixer.pattern names {name}, which is not among its members {', '.join(members)}.")
    for name in members:
        if name not in pattern:
            raise ConfigError(unknown_key(f"mixer.{name}", name, ["pattern", *dict.fromkeys(pattern)]))
        check(node[name], f"mixer.{name}", MIXER_ARGUMENTS)

    def from_pattern(shape: ModelShape, layer_index: int) -> Mixer:
        name = pattern[layer_index % len(pattern)]
        try:
            return build(node[name], f"mixer.{name}", shape=shape, layer_index=layer_index)
        except ConfigError as error:  # a mixer speaks of itself as `mixer`
            raise ConfigError(str(error).replace("mixer.", f"mixer.{name}.")) from error

    return from_pattern


def build_model(config: Node, vocab_size: int) -> LanguageModel:
    """The model that a resolved training configuration describes, with fresh weights on the current default device."""
    return build(config["model"], "model", mixer_factory=mixer_factory(config["mixer"]), vocab_size=vocab_size)


def check_model(config: Node) -> None:
    """Build the model without memory, so that sizes which do not fit are refused before any work.

    Raises:
        ConfigError: naming the key.
    """
    with torch.device("meta"):
        build_model(config, CHECK_VOCABULARY)


def model_from_checkpoint(state: dict[str, Any]) -> LanguageModel:
    """Rebuild a model with its weights from the state that `load_checkpoint` returned.

    Raises:
        CheckpointError: the weights are not those of the model that the configuration describes; found out before any
            memory is taken.
    """
    vocab_size = state["model"]["embedding.weight"].shape[0]
    with torch.device("meta"):
        check_weights(build_model(state["config"], vocab_size), state["model"])
    model = build_model(state["config"], vocab_size)
    load_weights(model, state["model"])
    return model
