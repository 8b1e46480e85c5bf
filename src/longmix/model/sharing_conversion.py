"""Checkpoints whose layers share matrices, made of ones whose layers do not, and the other way round.

The weights of a name, one row of numbers for each layer, are a matrix M [layers, out in]. Of all products of
coefficients [layers, S] and atoms [S, out in] the S largest singular values give the nearest one, and what is left out
is the sum of the squares of the others (Eckart & Young 1936).
"""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints.average import KEPT
from longmix.checkpoints.contents import ModelState, Weights, load_model_state, rebuilding
from longmix.checkpoints.find import chosen_checkpoint
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.config import ModelConfig
from longmix.errors import ConfigError
from longmix.files import atomic_directory, check_folder, write_json
from longmix.model.build import build_model, model_over_checkpoint
from longmix.model.sharing import NOTHING_SHARED, SharedLinear, Sharing, dictionary_name
from longmix.model.tuned_states_file import check_weights
from longmix.progress import bytes_bar
from longmix.trust import check_model_nodes

SHARE = "share"
"""The setting of the model that says what is shared."""


def is_shared(state: ModelState) -> bool:
    """Whether the layers of a checkpoint's model share matrices."""
    return bool((state["config"]["model"].get(SHARE) or {}).get("names"))


def dense_state(state: ModelState) -> ModelState:
    """The state of the same model whose layers have weights of their own, without the setting `share`."""
    weights = dict(state["model"])
    if is_shared(state):
        for name, layer in model_over_checkpoint(state).named_modules():
            if isinstance(layer, SharedLinear):
                weights.pop(f"{name}.coefficients", None)
                weights[f"{name}.weight"] = layer.weight.detach()
        weights = {name: weight for name, weight in weights.items() if not name.startswith("shared.")}
    config = copy.deepcopy(state["config"])
    config["model"].pop(SHARE, None)
    return {**state, "config": config, "model": weights}


def shared_state(state: ModelState, sharing: Sharing) -> tuple[ModelState, dict[str, float]]:
    """The state of the nearest model whose layers share matrices, and what each name leaves out.

    Args:
        state: of any model; it stays.
        sharing: coefficients are plain.

    Returns:
        The state; and by name the share of the squares of its weights that is left out.

    Raises:
        ConfigError: a name that no mixer has, or a number of atoms that makes no sense.
    """
    dense = dense_state(state)
    config, weights = dense["config"], dict(dense["model"])
    target = f"{Sharing.__module__}.{Sharing.__qualname__}"
    config["model"][SHARE] = {"_target_": target, **asdict(sharing)}
    with torch.device("meta"):
        model = build_model(ModelConfig.of(config), weights["embedding.weight"].shape[0])
    left_out: dict[str, float] = {}
    for name in dict.fromkeys(sharing.names or []):
        layers = [own for own, layer in model.named_modules() if _is_shared_as(own, layer, name)]
        own = [weights.pop(f"{layer}.weight") for layer in layers]
        coefficients, atoms, left_out[name] = nearest_shared(own, sharing.atoms or 0)
        for layer, row in zip(layers, coefficients, strict=True):
            weights[f"{layer}.coefficients"] = row.clone()
        for number, atom in enumerate(atoms):
            weights[f"shared.{dictionary_name(name)}.atoms.{number}"] = atom
    check_weights(model, weights)
    return {**dense, "model": weights}, left_out


def _is_shared_as(place: str, layer: Any, name: str) -> bool:
    return isinstance(layer, SharedLinear) and place.partition(".mixer.")[2] == name


def nearest_shared(weights: list[Tensor], atoms: int) -> tuple[Tensor, list[Tensor], float]:
    """The nearest combinations of a few matrices.

    Args:
        weights: [out, in] each.
        atoms: how many matrices.

    Returns:
        Coefficients [layers, atoms], whose squares have mean 1; the atoms; and the share of the squares of all weights
        that is left out.
    """
    rows = [weight.double().flatten() for weight in weights]
    gram = torch.stack([torch.stack([one @ other for other in rows]) for one in rows])
    squares, vectors = torch.linalg.eigh(gram)
    chosen = vectors.flip(-1)[:, :atoms]
    scale = len(weights) ** 0.5
    shape, dtype = weights[0].shape, weights[0].dtype
    found = []
    for column in chosen.T:
        atom = torch.zeros_like(rows[0])
        for share, row in zip(column, rows, strict=True):
            atom.add_(row, alpha=float(share) / scale)
        found.append(atom.view(shape).to(dtype))
    left_out = squares.flip(-1)[atoms:].clamp_min(0).sum() / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return (chosen * scale).to(dtype), found, float(left_out)


def convert(
    checkpoint: Path | str, target: Path | str, sharing: Sharing = NOTHING_SHARED, weights: Weights = "trained"
) -> dict[str, float]:
    """Write a checkpoint whose layers share what `sharing` says, or nothing, from which new runs begin.

    Args:
        checkpoint: folder of a run or checkpoint, which stays.
        target: the folder to make.
        sharing: see `shared_state`.
        weights: "trained", or "ema" for their average over the steps.

    Returns:
        What each name leaves out, see `shared_state`.

    Raises:
        ConfigError: the target is there, names are wrong, or there is nothing to undo.
        CheckpointError: the checkpoint is damaged.
        StorageError: the target cannot be written.
    """
    path, target = chosen_checkpoint(checkpoint), Path(target)
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder.")
    check_folder(target.parent)
    state = load_model_state(path, weights)
    with rebuilding(path):
        check_model_nodes(state["config"])
        if not sharing.names and not is_shared(state):
            raise ConfigError(f"{path} shares no matrices between layers, so there is nothing to undo.")
        state, left_out = shared_state(state, sharing) if sharing.names else (dense_state(state), {})
    kept: dict[str, Any] = {key: value for key, value in state.items() if key in (*KEPT, "model")}
    size = sum(weight.nbytes for weight in state["model"].values())
    about = {key: value for key, value in read_info(path).items() if key in ("tokens", "stage")}
    info = {"format": WHOLE, "step": state["step"], "validation": {}}
    with atomic_directory(target) as folder, bytes_bar(f"writing {target}", size) as advance:
        facts = write_whole(folder, kept, advance)
        write_json(folder / INFO_FILE, about | info | facts)
    return left_out
