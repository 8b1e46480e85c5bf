"""Models whose layers share matrices, made of ones whose layers do not, and the other way round.

The weights of a name, one row of numbers for each layer, are a matrix M [layers, out in]. Of all products of
coefficients [layers, S] and atoms [S, out in] the S largest singular values give the nearest one, and what is left out
is the sum of the squares of the others (Eckart & Young 1936).
"""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints.contents import ModelState
from longmix.config import ModelConfig
from longmix.model.build import build_model, model_over_checkpoint
from longmix.model.sharing import SharedLinear, Sharing, dictionary_name
from longmix.model.tuned_states_file import check_weights

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
