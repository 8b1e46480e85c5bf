"""Muon on matrices whose rows are divided over processes, as FSDP divides them, steps as on whole ones."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from longmix.training.optimizers import muon

SHAPES = {
    "as-many-as-divide": (24, 128, 128),
    "fewer-than-processes": (1, 12, 16),
    "rows-that-do-not-divide": (3, 10, 6),
}


def stepped(shape: tuple[int, int, int], mesh: DeviceMesh | None) -> torch.Tensor:
    """The matrices after three steps on drawn gradients."""
    drawn = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    placed = drawn if mesh is None else [[distribute_tensor(x, mesh, [Shard(0)]) for x in row] for row in drawn]
    weights = {str(index): nn.Parameter(weight.clone()) for index, weight in enumerate(placed[0])}
    (optimizer,) = muon(weights, learning_rate=0.1)
    for gradients in placed[1:]:
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return torch.stack([w.full_tensor() if isinstance(w, DTensor) else w for w in weights.values()]).detach()


def divided(group: dist.ProcessGroup, shape: tuple[int, int, int]) -> torch.Tensor:
    return stepped(shape, DeviceMesh.from_group(group, "cpu"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_divided_matrices_step_as_whole_ones(pool, shape):
    wanted = stepped(shape, None)
    for size in (2, 4):
        for found in pool.run(size, divided, shape):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
