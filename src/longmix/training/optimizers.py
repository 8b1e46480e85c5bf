"""Builds torch's optimizers from the recipes that parameters carry (see `longmix.recipe`)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from longmix.errors import ConfigError
from longmix.recipe import Recipe, recipe_of

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
    _check_rates(learning_rate=learning_rate, weight_decay=weight_decay, eps=eps)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas={list(betas)} must be two numbers from 0 up to, but not, 1.")
    groups = _groups(parameters, learning_rate, weight_decay)
    return [torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=_has_fused(parameters))]


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
    """torch's Muon for the hidden matrices (Jordan et al. 2024), AdamW for everything else.

    Updates are scaled to AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that learning rates
    carry over. Newton-Schulz runs in bfloat16, which is slow on a CPU without bfloat16 instructions.

    Args:
        parameters: trainable parameters by name.
        learning_rate: peak rate of the matrices.
        weight_decay: decoupled decay of the parameters whose recipe takes it.
        momentum: Muon's momentum.
        adamw_learning_rate: peak rate of embeddings, head, norms and gates; None takes `learning_rate`.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
    """
    _check_rates(learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum)
    matrices = {name: weight for name, weight in parameters.items() if recipe_of(weight).role == "matrix"}
    others = {name: weight for name, weight in parameters.items() if name not in matrices}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        groups = _groups(matrices, learning_rate, weight_decay)
        optimizers.append(torch.optim.Muon(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
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


def _check_rates(**rates: float) -> None:
    for key, value in rates.items():
        if value < 0 or (key == "learning_rate" and value == 0):
            raise ConfigError(f"optimizer.{key}={value} must be above 0.")
