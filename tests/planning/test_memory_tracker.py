import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longmix.planning.memory_tracker import Ledger, bytes_of


def test_storages_count_once_and_leave_when_they_are_freed():
    with Ledger() as ledger:
        x = torch.ones(256)
        assert ledger.live == 1024
        y = x.view(16, 16).t()
        x.add_(1)
        assert ledger.live == 1024
        z = x + 1
        assert ledger.live == 2048
        del x, z
        assert ledger.live == 1024
        del y
    assert ledger.live == 0
    assert ledger.peak == 2048


def test_what_is_known_is_not_counted():
    weight = torch.ones(8, 8)
    with Ledger([weight]) as ledger:
        shape = weight.t().reshape(4, 16) if weight.t().is_contiguous() else weight.view(4, 16)
        assert ledger.live == 0
        shape.mul_(2)
        assert ledger.live == 0


def test_a_mark_begins_anew():
    with Ledger() as ledger:
        kept = torch.ones(64)
        torch.ones(1024)
        assert ledger.peak == 256 + 4096
        assert ledger.mark() == 256
        assert ledger.peak == 256
        torch.ones(32)
        assert ledger.peak == 256 + 128
    assert bytes_of(kept) == 256


def test_traffic_is_that_of_operators_which_multiply_no_matrices():
    x, y = torch.ones(4, 8), torch.ones(8, 4)
    with Ledger([x, y]) as ledger:
        x.t()
        x @ y
        assert ledger.moved == 0
        x + x
        assert ledger.moved == 3 * 128
        y.mul_(2.0)
        assert ledger.moved == 3 * 128 + 2 * 128


def held_by_a_step() -> tuple[int, int, int]:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8))
    x = torch.empty(32, 64)
    with Ledger([x, *layer.parameters()]) as ledger:
        loss = layer(x).square().sum()
        kept = ledger.live
        loss.backward()
    return kept, ledger.peak, ledger.live


def test_fake_tensors_count_as_real_ones():
    real = held_by_a_step()
    with FakeTensorMode():
        fake = held_by_a_step()
    assert real == fake
    assert real[0] >= 4 * 32 * (96 + 96 + 8)
