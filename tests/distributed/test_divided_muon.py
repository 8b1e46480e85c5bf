"""Muon on matrices whose rows are divided over processes, as FSDP divides them, steps as on whole ones."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longmix.distributed.divided_matrices import takers_of
from longmix.recipe import Recipe, set_recipe
from longmix.training import batched_muon
from longmix.training.batched_muon import BatchedMuon
from longmix.training.optimizers import muon

SHAPES = {
    "as-many-as-divide": [(64, 64)] * 24,
    "fewer-than-processes": [(12, 16)],
    "rows-that-do-not-divide": [(10, 6)] * 3,
    "fewer-rows-than-processes": [(3, 8), (1, 5), (8, 3)],
    "many-shapes": [(12, 16), (16, 12), (12, 16), (10, 10), (16, 12), (12, 16), (10, 10)],
}


def stepped(shapes: Sequence[tuple[int, int]], mesh: DeviceMesh | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """The matrices after three steps on drawn gradients; every third has a learning rate of its own."""
    weights, gradients = matrices(shapes, 4, mesh)
    (optimizer,) = muon(weights, learning_rate=0.1)
    optimizer.iterated_in = dtype
    for drawn in gradients:
        for weight, gradient in zip(weights.values(), drawn, strict=True):
            weight.grad = gradient
        optimizer.step()
    return [w.full_tensor() if isinstance(w, DTensor) else w.detach() for w in weights.values()]


def matrices(shapes: Sequence[tuple[int, int]], count: int, mesh: DeviceMesh | None) -> Any:
    """Weights by name, and gradients of `count - 1` steps."""
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]
    if mesh is not None:
        drawn = [[distribute_tensor(x, mesh, [Shard(0)]) for x in row] for row in drawn]
    weights = {str(index): nn.Parameter(weight) for index, weight in enumerate(drawn[0])}
    for index, weight in enumerate(weights.values()):
        set_recipe(weight, Recipe("matrix", learning_rate_multiplier=0.5 if index % 3 == 1 else 1.0))
    return weights, drawn[1:]


def divided(group: dist.ProcessGroup, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[torch.Tensor]:
    return stepped(shapes, DeviceMesh.from_group(group, "cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_divided_matrices_step_as_whole_ones(pool, shapes, dtype):
    """In bfloat16 as far as its digits go: how many matrices are multiplied together may change their last one."""
    wanted = stepped(shapes, None, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 3 * 0.1 * 2**-7  # three steps of 0.1
    for size in (1, 2, 4):
        for found in pool.run(size, divided, shapes, dtype):
            for weight, whole in zip(found, wanted, strict=True):
                torch.testing.assert_close(weight, whole, rtol=1e-6, atol=tolerance)


class Counted(TorchDispatchMode):
    """Counts operators that make or change a tensor, each of which is a launch or a few, and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to the parts comes here too
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += func._overloadpacket.__name__ not in ("wait_tensor", "barrier")
        elif not func.is_view and not any(word in func._schema.name for word in ("empty", "detach", "alias")):
            self.launches += 1
        return func(*args, **(kwargs or {}))


TRANSFORMER = [(32, 32)] * 48 + [(64, 32)] * 24 + [(32, 64)] * 12
"""The matrices of 12 layers, scaled down."""


def counts(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Launches and collectives of a second step."""
    weights, (gradients,) = matrices(TRANSFORMER, 2, None if group is None else DeviceMesh.from_group(group, "cpu"))
    optimizer = BatchedMuon(list(weights.values()), lr=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer.iterated_in = torch.bfloat16
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        weight.grad = gradient
    optimizer.step()
    with Counted() as counted:
        optimizer.step()
    return counted.launches, counted.collectives


def test_a_step_takes_few_launches_and_two_collectives(pool):
    """These numbers may only fall. torch's Muon takes 1,934 launches, with 2 processes 2,402 and 2,448 collectives."""
    launches, collectives = counts(None)
    assert launches <= 89
    assert collectives == 0
    for launches, collectives in pool.run(2, counts):
        assert launches <= 87
        assert collectives <= 2


def test_processes_take_matrices_of_equal_cost_together():
    for size in (2, 3, 4, 8):
        takers = takers_of(TRANSFORMER, size)
        costs = [0] * size
        for taker, (rows, columns) in zip(takers, TRANSFORMER, strict=True):
            costs[taker] += min(rows, columns) ** 2 * max(rows, columns)
        assert max(costs) - min(costs) <= 2 * 32**3  # one matrix
    assert takers_of([(4, 4)], 3) == [0]


def test_another_division_is_refused(pool):
    for found in pool.run(2, refusal):
        assert found == "a matrix is placed as (Shard(dim=1),); allowed is (Shard(dim=0),), as FSDP does it"


def refusal(group: dist.ProcessGroup) -> str:
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    weight.grad = torch.ones_like(weight)
    copied = nn.Parameter(distribute_tensor(torch.eye(4), mesh, [Replicate()]))
    copied.grad = torch.ones_like(copied)
    BatchedMuon([copied], lr=0.1, adjust_lr_fn="match_rms_adamw").step()
    with pytest.raises(ValueError) as error:
        BatchedMuon([weight], lr=0.1, adjust_lr_fn="match_rms_adamw").step()
    return str(error.value)


def test_many_numbers_are_iterated_in_parts(pool, monkeypatch):
    wanted = stepped(SHAPES["many-shapes"], None, torch.float32)
    monkeypatch.setattr(batched_muon, "STACK_NUMBERS", 250)
    found = [stepped(SHAPES["many-shapes"], None, torch.float32), *pool.run(2, divided_in_parts)]
    for weights in found:
        for weight, whole in zip(weights, wanted, strict=True):
            torch.testing.assert_close(weight, whole, rtol=1e-6, atol=1e-6)


def divided_in_parts(group: dist.ProcessGroup) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_muon, "STACK_NUMBERS", 250)
        return divided(group, SHAPES["many-shapes"], torch.float32)
