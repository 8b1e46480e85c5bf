"""Builds torch's optimizers from the recipes that parameters carry (see `longmix.recipe`)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from longmix.errors import ConfigError
from longmix.recipe import Recipe, recipe_of
from longmix.training.batched_muon import BatchedMuon

PEAK = "peak_learning_rate"
"""Key of a parameter group that holds its learning rate before the schedule."""


def adamw(
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), fused where torch has it for the device.

    Args:
        parameters: trainable parameters by name.
        learning_rate: peak rate; a parameter's multiplier applies on top.
        weight_decay: decoupled decay of the parameters whose recipe takes it.
        betas: decay rates of the two moments.
        eps: added to the denominator.
    """
    _check_settings(betas, learning_rate=learning_rate, weight_decay=weight_decay, eps=eps)
    groups = _groups(parameters, learning_rate, weight_decay)
    return [torch.optim.AdamW(groups, betas=(float(betas[0]), float(betas[1])), eps=eps, fused=_has_fused(parameters))]


def muon(
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    adamw_learning_rate: float | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices (Jordan et al. 2024; `BatchedMuon`), AdamW for everything else.

    Updates are scaled to AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that learning rates
    carry over.

    Args:
        parameters: trainable parameters by name.
        learning_rate: peak rate of the matrices.
        weight_decay: decoupled decay of the parameters whose recipe takes it.
        momentum: Muon's momentum.
        adamw_learning_rate: peak rate of embeddings, head, norms and gates; None takes `learning_rate`.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
    """
    _check_settings(
        betas,
        learning_rate=learning_rate,
        adamw_learning_rate=adamw_learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        eps=eps,
    )
    matrices = {name: weight for name, weight in parameters.items() if recipe_of(weight).role == "matrix"}
    others = {name: weight for name, weight in parameters.items() if name not in matrices}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        groups = _groups(matrices, learning_rate, weight_decay)
        optimizers.append(BatchedMuon(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    if others:
        rate = learning_rate if adamw_learning_rate is None else adamw_learning_rate
        optimizers += adamw(others, learning_rate=rate, weight_decay=weight_decay, betas=betas, eps=eps)
    return optimizers


def _groups(parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """One parameter group per distinct pair of multiplier and decay, in order of first appearance."""
    members: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for weight in parameters.values():
        recipe: Recipe = recipe_of(weight)
        members[recipe.learning_rate_multiplier, recipe.weight_decay].append(weight)
    return [
        {
            "params": weights,
            "lr": learning_rate * multiplier,
            PEAK: learning_rate * multiplier,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (multiplier, decays), weights in members.items()
    ]


def _has_fused(parameters: Mapping[str, nn.Parameter]) -> bool:
    return all(weight.device.type in ("cpu", "cuda") and weight.is_floating_point() for weight in parameters.values())


def _check_settings(betas: Sequence[float], **settings: float | None) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas={list(betas)} must be two numbers from 0 up to, but not, 1.")
    for key, value in settings.items():
        if value is None:
            continue
        may_be_zero = key in ("weight_decay", "momentum")
        if value < 0 or (value == 0 and not may_be_zero):
            least = "at least 0" if may_be_zero else "above 0"
            raise ConfigError(f"optimizer.{key}={value} must be {least}.")
        if key == "momentum" and value >= 1:
            raise ConfigError(f"optimizer.momentum={value} must be below 1.")
