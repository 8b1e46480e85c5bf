"""Builds torch's optimizers from the recipes that parameters carry (see `longmix.recipe`)."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

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
    """torch's Muon for the hidden matrices (Jordan et al. 2024), AdamW for everything else.

    Updates are scaled to AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that learning rates
    carry over. On a CPU the same steps are taken in float32 (`Float32Muon`).

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
        on_cpu = all(weight.device.type == "cpu" for weight in matrices.values())
        kind = Float32Muon if on_cpu else torch.optim.Muon
        optimizers.append(kind(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
    if others:
        rate = learning_rate if adamw_learning_rate is None else adamw_learning_rate
        optimizers += adamw(others, learning_rate=rate, weight_decay=weight_decay, betas=betas, eps=eps)
    return optimizers


class Float32Muon(torch.optim.Muon):
    """torch's Muon with its Newton-Schulz iteration in float32, and matrices of one shape iterated together.

    torch iterates in bfloat16, which a CPU without bfloat16 instructions emulates hundreds of times slower. Of matrices
    whose rows are divided over processes, each process takes some whole ones.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; state and parameter groups are those of `torch.optim.Muon`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                updates = torch.stack([self._momentum(weight, group) for weight in weights])
                settings = {"coefficients": group["ns_coefficients"], "steps": group["ns_steps"], "eps": group["eps"]}
                directions = each_whole(functools.partial(orthogonalised, **settings), updates)
                rate = group["lr"] * 0.2 * math.sqrt(max(weights[0].shape))
                for weight, direction in zip(weights, directions, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)
        return loss

    def _momentum(self, weight: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"]) if group["nesterov"] else average


def each_whole(function: Callable[[torch.Tensor], torch.Tensor], matrices: torch.Tensor) -> torch.Tensor:
    """A function of each matrix of [N, rows, columns], which may be divided over processes: then so is the result."""
    if not isinstance(matrices, DTensor):
        return function(matrices)
    whole = [Replicate()]  # in between, as gloo exchanges no shards for others directly
    spread = matrices.redistribute(placements=whole).redistribute(placements=[Shard(0)])
    found = DTensor.from_local(
        function(spread.to_local()),
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=matrices.shape,
        stride=matrices.stride(),
    )
    return found.redistribute(placements=whole).redistribute(placements=matrices.placements)


def orthogonalised(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: quintic Newton-Schulz iteration (Jordan et al. 2024).

    Singular values end between about 0.7 and 1.2 instead of at 1, which is as good for the optimizer.

    Args:
        matrices: [N, rows, columns].
        coefficients: (a, b, c) of x <- a x + b x^3 + c x^5 on the singular values.
        steps: iterations.
        eps: smallest norm to divide by.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
