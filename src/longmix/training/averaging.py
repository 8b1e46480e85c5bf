"""The exponential moving average of the weights over the steps of a run (EMA), beside the weights themselves.

    average <- d average + (1 - d) weights        after each step that was taken, d = min(decay, (1 + n) / (10 + n))

n counts the steps, so that the average soon forgets the first weights (as in TensorFlow and diffusers).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longmix.checkpoints.tensors import AVERAGED, own_part

UPDATES = "ema_updates"
"""Entry of a checkpoint: how many steps are in the average."""


class WeightAverage:
    """The average of a model's trainable weights, divided over processes as they are.

    Args:
        decay: share of the average that a step keeps, above 0 and below 1.

    Attributes:
        values: by the name of the weight; float32, or float64 for such weights.
        updates: steps in the average; with 0 it is the weights as they began.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        self.updates = 0

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Begin from the weights that there are, once they are where they stay."""
        _gather_no_more(model)
        self.updates = 0
        self.values = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in _trainable(model)
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        _gather_no_more(model)
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [own_part(value) for value in self.values.values()]
        weights = [own_part(weight) for _, weight in _trainable(model)]
        weights = [weight.to(average.dtype) for weight, average in zip(weights, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averages as its weights; afterwards it has its own again, bit for bit."""
        own = self._put(model, dict(self.values))
        try:
            yield
        finally:
            self._put(model, own)

    @torch.no_grad()
    def _put(self, model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        _gather_no_more(model)
        before = {}
        for name, weight in _trainable(model):
            before[name] = own_part(weight).clone()
            own_part(weight).copy_(own_part(values[name]))
        return before

    def captured(self, model: nn.Module) -> dict[str, Any]:
        """The entries of a checkpoint, by all names that the weights have; not copied."""
        _gather_no_more(model)
        names = {id(weight): name for name, weight in _trainable(model)}
        every = model.named_parameters(remove_duplicate=False)
        named = {name: self.values[names[id(weight)]] for name, weight in every if id(weight) in names}
        return {AVERAGED: named, UPDATES: self.updates}

    def targets(self) -> dict[str, Tensor]:
        """The averages by the names of a checkpoint's tensors, to be filled."""
        return {f"{AVERAGED}/{name}": value for name, value in self.values.items()}


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _gather_no_more(model: nn.Module) -> None:
    """Let FSDP drop the whole weights that a forward pass without a backward pass has left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
