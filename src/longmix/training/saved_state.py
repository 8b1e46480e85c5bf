"""The part of a checkpoint for model and optimizers, divided over processes or not."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longmix.checkpoints import Checkpoint
from longmix.checkpoints.tensors import split, without_aliases
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError


def named_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights and optimizer states as they are, each process's part; optimizers name parameters instead of counting.

    Nothing is copied. torch's optimizers load states with names as well as with numbers.
    """
    weights = model.state_dict()  # before names are asked for: behind a validation FSDP has whole weights until then
    names = _names(model)
    return {
        "model": weights,
        "optimizers": [
            {
                "state": {names[weight]: dict(values) for weight, values in optimizer.state.items()},
                "param_groups": [
                    {**group, "params": [names[weight] for weight in group["params"]]}
                    for group in optimizer.param_groups
                ],
            }
            for optimizer in optimizers
        ],
    }


def restore_state(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    saved: Checkpoint,
    groups: list[dict[str, Any]],
    processes: Processes,
    more: dict[str, Tensor] | None = None,
) -> None:
    """Restore a state that `named_state` made, on any number of processes; each reads its part.

    Args:
        model, optimizers: as they were built for these processes.
        saved: the checkpoint.
        groups: its "optimizers" without their tensors.
        processes: all that train; all must call it.
        more: further tensors of the checkpoint that are to be filled, by name.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model or optimizer; the same in all processes.
    """
    live, aliases = without_aliases(split({"model": model.state_dict()})[0])
    names = _names(model)
    parts: list[_SavedOptimizer] = []

    def prepare() -> None:
        if {name for name in saved.shapes if name.startswith("model/")} - set(aliases) != set(live):
            raise CheckpointError(f"{saved.checkpoint} is of another model: its weights have other names.")
        if len(groups) != len(optimizers):
            raise CheckpointError(
                f"{saved.checkpoint} is of a run with {len(groups)} optimizers, not {len(optimizers)}."
            )
        for index, optimizer in enumerate(optimizers):
            parts.append(_SavedOptimizer(f"optimizers/{index}/state", optimizer, names, saved, groups[index]))

    processes.each(prepare)
    for part in parts:
        live |= part.targets
    saved.read_into(live | (more or {}), processes)
    for part in parts:
        part.load()


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {weight: name for name, weight in model.named_parameters()}


class _SavedOptimizer:
    """An optimizer's state while it is read: tensors like its parameters, which know how they are divided."""

    def __init__(
        self,
        prefix: str,
        optimizer: torch.optim.Optimizer,
        names: dict[Tensor, str],
        saved: Checkpoint,
        content: dict[str, Any],
    ) -> None:
        self.optimizer, self.groups = optimizer, content["param_groups"]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        own = [[names[weight] for weight in group["params"]] for group in optimizer.param_groups]
        theirs = [group["params"] for group in self.groups]
        if own != theirs and own != _named(theirs, [names[weight] for weight in weights]):
            raise CheckpointError(f"{saved.checkpoint} is of a run whose optimizer has other parameters.")
        self.targets: dict[str, Tensor] = {}
        self.state: dict[int, dict[str, Any]] = {}
        parameters = [parameter for group in theirs for parameter in group]
        found = _by_parameter(saved.shapes, prefix)
        for number, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
            values = dict(content["state"].get(parameter, {}))
            for key in found.get(str(parameter), ()):
                name = f"{prefix}/{parameter}/{key}"
                values[key] = self.targets[name] = _like(weight, saved.shapes[name], saved.dtypes[name])
            if values:
                self.state[number] = values

    def load(self) -> None:
        """Load the read state into the optimizer, which keeps the settings of its configuration.

        The rate, which the next step sets anew from its peak and the schedule, is the saved one until then.
        """
        counts = iter(range(sum(len(group["params"]) for group in self.groups)))
        groups = [
            {**group, **built, "lr": group["lr"], "params": [next(counts) for _ in group["params"]]}
            for group, built in zip(self.groups, self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": self.state, "param_groups": groups})


def _named(groups: list[list[Any]], names: list[str]) -> list[list[Any]]:
    """Optimizer values by the names of parameters. torch counts parameters; names that are there already stay."""
    return [[names[which] if isinstance(which, int) and which < len(names) else which for which in g] for g in groups]


def _by_parameter(shapes: Iterable[str], prefix: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        if name.startswith(f"{prefix}/"):
            parameter, _, key = name.removeprefix(f"{prefix}/").rpartition("/")
            found[parameter].append(key)
    return found


def _like(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for an optimizer's value, divided among processes like its parameter if it has the same shape."""
    if shape == weight.shape:
        return torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
