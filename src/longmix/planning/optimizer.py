"""The memory of a run's optimizers, found by a step of theirs on fake tensors."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longmix.config import Node, build
from longmix.model.backbone import LanguageModel
from longmix.planning.memory_tracker import Ledger, bytes_of, empty_like
from longmix.recipe import Recipe, recipe_of, set_recipe
from longmix.training.optimizers import Float32Muon


@dataclass(frozen=True)
class OptimizerNeeds:
    """Bytes that optimizers need for undivided weights.

    Attributes:
        state: from one step to the next.
        working: the most that a step takes besides.
    """

    state: int
    working: int


def optimizer_needs(
    model: LanguageModel, node: Node, dtype: torch.dtype, device: Literal["cuda", "cpu"]
) -> OptimizerNeeds:
    """Measure a second step, because the first one makes the optimizer's state.

    Args:
        model: on the meta device.
        node: the configuration's `optimizer`.
        dtype: of weights and gradients.
        device: "cuda" has torch's own Muon, which takes one matrix after another.
    """
    alike = Counter((weight.shape, recipe_of(weight)) for weight in model.parameters())
    with FakeTensorMode():
        weights: dict[str, nn.Parameter] = {}
        seen: set[tuple[torch.Size, Recipe]] = set()
        for name, weight in model.named_parameters():
            kind = weight.shape, recipe_of(weight)
            if device == "cpu" or kind not in seen:  # a CPU updates all matrices of one shape together
                seen.add(kind)
                weights[name] = _fake(weight, dtype)
        optimizers = build(node, "optimizer", parameters=weights)
        for optimizer in optimizers:
            _step(optimizer, device)
        states = {weight: tree_leaves(state) for optimizer in optimizers for weight, state in optimizer.state.items()}
        tensors = [x for leaves in states.values() for x in leaves if isinstance(x, torch.Tensor)]
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        with Ledger([*weights.values(), *gradients, *tensors]) as ledger:
            for optimizer in optimizers:
                _step(optimizer, device)
        held = 0
        for weight, leaves in states.items():
            each = bytes_of(*(x for x in leaves if isinstance(x, torch.Tensor)))
            held += each * (1 if device == "cpu" else alike[weight.shape, recipe_of(weight)])
    return OptimizerNeeds(held, ledger.peak)


def _fake(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    fake = nn.Parameter(empty_like(weight, dtype))
    fake.grad = empty_like(weight, dtype)
    set_recipe(fake, recipe_of(weight))
    return fake


def _step(optimizer: torch.optim.Optimizer, device: str) -> None:
    if device == "cuda" and isinstance(optimizer, Float32Muon):  # fake tensors are on a CPU
        torch.optim.Muon.step(optimizer)
    else:
        optimizer.step()
