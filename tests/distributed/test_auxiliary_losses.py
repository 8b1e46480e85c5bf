"""Auxiliary losses, and the gradients that come of them, are the same however a batch's rows are divided."""

import pytest
import torch
import torch.distributed as dist
from sliced import Case, gradients, rows
from torch.distributed.device_mesh import DeviceMesh

from longmix.batch import Batch
from longmix.training import strategies
from longmix.training.module import split_batch

NODES = {
    "mixture": "flash heads_kept=1 heads_balance=3",
    "mixture-by-queries": "flash num_heads=4 heads_kept=2 heads_router=query_norm qk_norm=false heads_balance=3",
    "mixture-of-a-recurrence": "simple_gla num_heads=4 heads_shared=1 heads_kept=2 heads_balance=3",
    "kept-share": "sparse_flash_drop window=3 balance=3",
    "commitment": "routing clusters=3 window=4 commitment=3",
}
DIVISIONS = [("micro-batches", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("slices", 2), ("ddp-of-micro-batches", 2)]


def auxiliary(group: dist.ProcessGroup, node: dict, division: str) -> dict[str, torch.Tensor]:
    """Losses and gradients of auxiliary losses alone, of all rows, in float64."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    model = Case(node).model()
    tokens, targets, ids = rows(packed=True)
    batch = Batch(tokens=tokens, targets=targets, document_ids=ids)
    if division != "slices":
        batch = Batch(**{name: part.chunk(size)[rank] for name, part in batch.items()})
    if division == "fsdp":
        strategies.shard(model, DeviceMesh.from_group(group, "cpu"), None)
    parts = split_batch(batch, 1 if "micro-batches" in division else None)
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        if division == "slices":
            output = strategies.run_slice(model, part, group)
        else:
            output = model(part["tokens"], part["targets"], document_ids=part["document_ids"])
        assert output.losses
        (sum(output.losses.values()) / len(parts)).backward()
        for name, loss in output.losses.items():
            found[name] = found.get(name, 0) + loss.detach() / len(parts)
    found |= {name: strategies.whole(grad).clone() for name, grad in gradients(model).items()}
    if division != "fsdp":  # which divides by the processes itself, as DDP does
        for name in found.keys() & gradients(model).keys():
            dist.all_reduce(found[name], group=group)
            found[name] /= size
    for name in output.losses:
        dist.all_reduce(found[name], group=group)
        found[name] /= size
    return found


@pytest.mark.parametrize("words", NODES.values(), ids=NODES)
def test_any_division_of_the_rows_gives_the_same(pool, node_of, words):
    node = node_of(words)
    (wanted,) = pool.run(1, auxiliary, node, "whole")
    assert any(part.abs().max() > 1e-3 for name, part in wanted.items() if "blocks" in name)
    for division, size in DIVISIONS:
        for found in pool.run(size, auxiliary, node, division):
            assert found.keys() == wanted.keys(), division
            for name, part in wanted.items():
                torch.testing.assert_close(found[name], part, rtol=0, atol=1e-11, msg=f"{name} in {size} {division}")
