"""States before a document that were trained: which parameters they are, and the small file that holds nothing else."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints import load_tensors, reading
from longmix.config import Node
from longmix.errors import CheckpointError, ConfigError
from longmix.files import replace_file
from longmix.mixers.recurrent import RecurrentMixer
from longmix.model.backbone import LanguageModel

FORMAT = 1
MARK = ".tuned."
"""What the names of these parameters, and of no others, have in them."""


def tune_states(model: LanguageModel, features: int = 0, decorrelation: float = 0.0) -> list[str]:
    """Give every recurrent mixer a trainable state before each document; returns the names of these parameters.

    Args:
        model: to change.
        features, decorrelation: of a memory besides; see `longmix.mixers.tuned`.

    Raises:
        ConfigError: no mixer of the model has a state of constant size.
    """
    recurrent = [mixer for mixer in model.mixers() if isinstance(mixer, RecurrentMixer)]
    if not recurrent:
        kinds = ", ".join(sorted({type(mixer).__name__ for mixer in model.mixers()}))
        raise ConfigError(f"trainable=states needs a mixer with a recurrent state, and the model's is {kinds}.")
    for mixer in recurrent:
        mixer.tune_states(features, decorrelation)
    return [name for name, _ in model.named_parameters() if MARK in name]


def tuned_states(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's weights that are states before a document, by name."""
    return {name: weight for name, weight in weights.items() if MARK in name}


def load_weights(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    """Load a model's weights; states among them are given a place first."""
    if tuned_states(weights):
        tune_states(model, _features(weights))
    model.load_state_dict(weights)


def _features(weights: dict[str, Tensor]) -> int:
    """Size of the memories among a model's weights; 0 if there are none."""
    return next((weight.shape[-1] for name, weight in weights.items() if name.endswith(".memory.whitening")), 0)


def save_states(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write the states of a checkpoint's weights to a file of their own, [H, K, V] each (keys by values).

    Raises:
        StorageError: the file cannot be written; what was there before stays.
    """
    config = checkpoint["config"]
    content = {
        "format": FORMAT,
        "layout": "[heads, keys, values]",
        "mixer": config["mixer"],
        "model": config["model"],
        "states": {name: state.clone() for name, state in tuned_states(checkpoint["model"]).items()},
    }
    replace_file(path, lambda temporary: torch.save(content, temporary))


def load_states(model: LanguageModel, path: Path, config: Node) -> None:
    """Let every document begin from the states in a file that `save_states` wrote.

    Args:
        model: without states of its own, or with ones that are replaced.
        path: the file, or the folder of the run that wrote it.
        config: the configuration of the model.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another model.
    """
    path = path / "states.pt" if path.is_dir() else path
    with reading(path, "states", "; give the states.pt of a run with trainable=states"):
        content = load_tensors(path, FORMAT)
        states = content["states"]
    if content["mixer"] != config["mixer"] or content["model"] != config["model"]:
        raise CheckpointError(f"the states in {path} are of another model; give those tuned from this checkpoint.")
    tune_states(model, _features(states))
    model.load_state_dict({**model.state_dict(), **states})
