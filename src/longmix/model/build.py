"""From the configuration's choices `model` and `mixer` to a model."""

import inspect

import torch

from longmix.checkpoints.contents import ModelState
from longmix.config import Choice, ModelConfig, Pattern
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.model.backbone import LanguageModel, MixerFactory
from longmix.model.tuned_states_file import check_weights, load_weights

MIXER_ARGUMENTS = {"shape", "layer_index"}
CHECK_VOCABULARY = 2

REQUIRED = {
    "forward": "forward(x, *, state, document_ids)",
    "init_state": "init_state(batch)",
    "state_bytes": "state_bytes(length)",
    "flops": "flops(length)",
}
"""The methods that a mixer's class must define, and how each is called."""


def mixer_factory(mixer: Choice | Pattern) -> MixerFactory:
    """Builds each layer's mixer: the same choice in all layers, or the members of a pattern in turn.

    Raises:
        ConfigError: a setting is wrong.
    """
    for choice in mixer.choices:
        choice.check(MIXER_ARGUMENTS)
    layers = [mixer.members[name] for name in mixer.order] if isinstance(mixer, Pattern) else [mixer]
    return lambda shape, layer_index: _built(layers[layer_index % len(layers)], shape, layer_index)


def _built(choice: Choice, shape: ModelShape, layer_index: int) -> Mixer:
    """Build the mixer of a layer, and check that it has all methods which a model calls.

    Raises:
        ConfigError: it is no mixer, or its class lacks something; the message says what.
    """
    try:
        mixer = choice.build(shape=shape, layer_index=layer_index)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{choice.key}._target_={choice.target} cannot be built: {error}.") from error
    check_mixer(mixer, f"{choice.key}._target_={choice.target}")
    if mixer.kind is None:
        mixer.kind = choice.key
    return mixer


def check_mixer(mixer: object, what: str) -> None:
    """Refuse a mixer that lacks a part of the contract in `longmix.mixers.parts.base.Mixer`, before any work.

    Args:
        mixer: what was built.
        what: names it in the message.

    Raises:
        ConfigError: naming the class and each method that it lacks, or the arguments that its `forward` does not take.
    """
    name = type(mixer).__name__
    if not isinstance(mixer, Mixer):
        raise ConfigError(f"{what} is a {name}; it must be a subclass of longmix.mixers.parts.base.Mixer.")
    lacking = [words for method, words in REQUIRED.items() if _inherited(type(mixer), method)]
    if lacking:
        raise ConfigError(
            f"{what}: {name} lacks {', '.join(lacking)}; longmix.mixers.parts.base.Mixer says what each returns."
        )
    given = {"state": None, "document_ids": None, **({"value_residual": None} if mixer.value_residual else {})}
    try:
        inspect.signature(mixer.forward).bind(None, **given)
    except TypeError as error:
        signature = f"forward(self, x, *, {', '.join(f'{argument}=None' for argument in given)})"
        raise ConfigError(f"{what}: {name}.forward must be {signature}: {error}.") from error


def _inherited(kind: type, method: str) -> bool:
    """Whether a class inherits the base's method, which only documents the contract."""
    found: bool = getattr(kind, method) is getattr(Mixer, method)
    return found


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model that a configuration describes, with fresh weights on the current default device.

    Args:
        config: of a run, of a checkpoint, or of a mapping by `ModelConfig.of`.
        vocab_size: number of token ids.

    Raises:
        ConfigError: a setting of the model or of a mixer is wrong.
    """
    return config.model.build(mixer_factory=mixer_factory(config.mixer), vocab_size=vocab_size)


def check_model(config: ModelConfig) -> LanguageModel:
    """The model without memory, built so that sizes which do not fit are refused before any work.

    Raises:
        ConfigError: naming the key.
    """
    with torch.device("meta"):
        return build_model(config, CHECK_VOCABULARY)


def model_from_checkpoint(state: ModelState, config: ModelConfig | None = None) -> LanguageModel:
    """Rebuild a model with its weights from the state that `load_checkpoint` returned.

    Args:
        state: of the checkpoint.
        config: the configuration to build the model from; None takes the checkpoint's own.

    Raises:
        CheckpointError: the weights are not those of the model that the configuration describes; found out before any
            memory is taken.
    """
    vocab_size = state["model"]["embedding.weight"].shape[0]
    config = ModelConfig.of(state["config"]) if config is None else config
    with torch.device("meta"):
        check_weights(build_model(config, vocab_size), state["model"])
    model = build_model(config, vocab_size)
    load_weights(model, state["model"])
    return model


def model_over_checkpoint(state: ModelState) -> LanguageModel:
    """A model whose weights are those of a state, without a copy, to be written elsewhere: it is not for computing.

    Raises:
        CheckpointError: see `model_from_checkpoint`.
    """
    weights = state["model"]
    with torch.device("meta"):
        model = build_model(ModelConfig.of(state["config"]), weights["embedding.weight"].shape[0])
    check_weights(model, weights)
    tied = model.head.weight is model.embedding.weight
    model.load_state_dict(weights, assign=True)
    if tied:
        model.head.weight = model.embedding.weight
    return model
