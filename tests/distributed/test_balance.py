"""Exact attention whose work is shared equally: the same numbers, and as many keys for every process."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from sliced import largest_error, together

from longmix.distributed import slices as slices_module
from longmix.distributed.balance import rows_needed
from longmix.distributed.slices import Slices
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape

LENGTH = 24
IDS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [0] * 12 + [1] * 12], dtype=torch.int32)


def attended(state: Slices | None, packed: bool) -> dict[str, Any]:
    """Output and gradients of one layer, and how many keys it was given in all calls."""
    torch.manual_seed(5)
    flash = Flash(ModelShape(12, 1, 2), 0, num_kv_heads=1).double()
    x, weights = torch.randn(2, 2, LENGTH, 12, dtype=torch.float64).unbind()
    x.requires_grad_()
    own, attend, keys = (lambda y: y) if state is None else state.own, flash.attend, []

    def counted(rows):
        keys.append(rows.key.shape[1])
        return attend(rows)

    flash.attend = counted
    y = flash(own(x), state=state, document_ids=own(IDS) if packed else None).y
    (y * own(weights)).sum().backward()
    gradients = {name: weight.grad for name, weight in flash.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **gradients, "keys": sum(keys)}


def in_slices(group: dist.ProcessGroup, packed: bool) -> dict[str, Any]:
    return attended(Slices(LENGTH, IDS if packed else None, group, balanced=True), packed)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_balanced_attention(pool, size, packed):
    wanted, results = attended(None, packed), pool.run(size, in_slices, packed)
    length = LENGTH // size
    assert [result.pop("keys") for result in results] == [size * length + length // 2] * size
    assert wanted.pop("keys") == LENGTH
    error, name = largest_error(together(results), wanted)
    assert error <= 1e-12, name


def rows_of_keys(group: dist.ProcessGroup) -> list[float]:
    slices = Slices(8, group=group)
    return rows_needed(slices.own(torch.arange(8.0)[None]), slices)[0].tolist()


def test_keys_go_to_those_who_need_them(pool):
    """Process r of 2 computes the last but r quarters of the row."""
    assert pool.run(2, rows_of_keys) == [list(range(8)), list(range(6))]


def decided(group: dist.ProcessGroup) -> list[bool]:
    ids = torch.zeros(1, 16, dtype=torch.int32)
    calls = (16, None), (14, None), (18, None), (16, ids)
    with patch.object(slices_module, "BALANCED_FROM", 8):
        return [Slices(length, ids, group).balanced for length, ids in calls]


def test_work_is_shared_where_it_pays(pool):
    """In long slices without documents, of an even length."""
    assert pool.run(2, decided) == [[True, False, False, False]] * 2
