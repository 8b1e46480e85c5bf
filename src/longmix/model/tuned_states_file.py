"""Tuned states, the trained states before a document: their parameters, and the small file that holds only them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.aliases import renewed
from longmix.checkpoints import load_tensors, reading, save_tensors
from longmix.checkpoints.verify import check_weight, weight_differences
from longmix.config import ModelConfig, plain
from longmix.errors import CheckpointError, ConfigError
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel

FORMAT, WITHOUT_DIGEST = 2, 1
STATES_FILE = "states.pt"
"""The file of tuned states in the folder of a run with trainable=states."""

MARK = ".tuned."
"""Part of the name of every tuned state, and of no other parameter."""


def tunable_mixers(model: LanguageModel) -> dict[str, Mixer]:
    """The mixers that can have a trainable state before each document, by their names in the model.

    Raises:
        ConfigError: there is none.
    """
    mixers = model.mixers()  # a channel mixer may be a `Mixer` too, and has nothing to tune
    tunable = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Mixer) and part in mixers and part.tunes_states
    }
    if not tunable:
        kinds = ", ".join(sorted({type(mixer).__name__ for mixer in model.mixers()}))
        raise ConfigError(f"trainable=states needs a mixer with a recurrent state, and the model's is {kinds}.")
    return tunable


def tune_states(model: LanguageModel, features: int = 0, decorrelation: float = 0.0) -> list[str]:
    """Give every mixer that `tunes_states` a trainable state before each document; return these parameters' names.

    Args:
        model: to change.
        features, decorrelation: of a memory besides; see `longmix.mixers.parts.state_tuning`.

    Raises:
        ConfigError: no mixer of the model has a state that can be tuned.
    """
    tunable = tunable_mixers(model)
    for mixer in tunable.values():
        mixer.tune_states(features, decorrelation)
    return [
        f"{name}.tuned.{parameter}"
        for name, mixer in tunable.items()
        for parameter, _ in mixer.get_submodule("tuned").named_parameters()
    ]


def tuned_states(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tuned states among a model's weights, by name."""
    return {name: weight for name, weight in weights.items() if MARK in name}


def _digest_of_others(weights: dict[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of all other weights: tuned states fit no others."""
    return _digest_of({name: weight for name, weight in weights.items() if MARK not in name})


def _digest_of(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype}".encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Load a model's weights; states among them are given a place first.

    Raises:
        CheckpointError: they are not the model's, or of other shapes or types.
    """
    check_weights(model, weights)
    model.load_state_dict(weights)


def check_weights(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not a model's, which may be without memory; states among them are given a place first.

    Raises:
        CheckpointError: names what differs.
    """
    if tuned_states(weights):
        tune_states(model, memory_features(weights))
    _check_like(weights, model.state_dict())


def _check_like(weights: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    if differences := weight_differences(weights, needed):
        raise CheckpointError(f"these weights are of another model: {differences}.")


def memory_features(weights: Mapping[str, Tensor]) -> int:
    """Size of the memories among a model's weights; 0 if there are none."""
    return next((weight.shape[-1] for name, weight in weights.items() if name.endswith(".memory.whitening")), 0)


def save_states(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write the states among a model's weights to a file of their own, [H, K, V] each (keys by values).

    Args:
        path: of the file.
        config: the model's.
        weights: all of the model's.

    Raises:
        StorageError: the file cannot be written; what was there before stays.
    """
    written = plain(config)
    content = {
        "format": FORMAT,
        "layout": "[heads, keys, values]",
        "mixer": written["mixer"],
        "model": written["model"],
        "weights": _digest_of_others(weights),
        "states": {name: state.clone() for name, state in tuned_states(weights).items()},
    }
    save_tensors(path, content)


def _is_of(content: dict[str, Any], config: ModelConfig) -> bool:
    """Whether states were tuned in a model of this configuration."""
    try:
        own = ModelConfig.of({key: renewed(content[key]) for key in ("mixer", "model")})
    except ConfigError:
        return False
    return (own.mixer, own.model) == (config.mixer, config.model)


def load_states(model: LanguageModel, path: Path, config: ModelConfig) -> str:
    """Let every document begin from the states in a file that `save_states` wrote; return a digest of these.

    Args:
        model: without states of its own, or with ones that are replaced.
        path: the file, or the folder of the run that wrote it.
        config: the configuration of the model.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of another model or of other weights. Files that
            earlier versions wrote do not say of which weights they are.
    """
    path = path / STATES_FILE if path.is_dir() else path
    cure = "; give the states.pt of a run with trainable=states"
    content = load_tensors(path, "states", format_number=FORMAT, without_digest=WITHOUT_DIGEST, cure=cure)
    with reading(path, "states", cure):
        states = content["states"]
        for name, weight in states.items():
            check_weight(name, weight)
            if MARK not in name:
                raise ValueError(f"{name} is no state")
        if not states or not {"mixer", "model"} <= content.keys():
            raise ValueError("it does not say of which model they are")
    if not _is_of(content, config):
        raise CheckpointError(f"the states in {path} are of another model; give those tuned from this checkpoint.")
    if "weights" in content and content["weights"] != _digest_of_others(model.state_dict()):
        raise CheckpointError(
            f"the states in {path} were tuned with other weights than these; give a checkpoint of the run that tuned "
            "them, or the one that it began from."
        )
    with reading(path, "states of this model", cure):
        tune_states(model, memory_features(states))
        try:
            _check_like(states, tuned_states(model.state_dict()))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        model.load_state_dict(states, strict=False)
    return _digest_of(states)
