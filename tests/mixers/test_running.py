"""Running means: when they move, when they must not, and that recomputing or saving changes nothing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longmix.errors import ConfigError
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.between_steps import RunningMean, finish_step
from longmix.mixers.sparse_flash import SparseFlash

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)


def alone(x):
    return x


def test_the_first_updates_weigh_equally_and_later_ones_decay():
    mean, steps = RunningMean((2,), decay=0.75), torch.randn(8, 4, 5, 2)
    expected = torch.zeros(2)
    for index, x in enumerate(steps):
        before = mean.value.clone()
        mean.observe(x[:2])
        mean.observe(x[2:])
        assert torch.equal(mean.value, before), "nothing moves before the step is finished"
        finish_step(mean, True, alone)
        kept = min(0.75, index / (index + 1))
        expected = kept * expected + (1 - kept) * x.mean((0, 1))
        torch.testing.assert_close(mean.value, expected)


def test_processes_are_averaged_over_their_tokens():
    mean, mine, theirs = RunningMean((2,), 0.5), torch.randn(1, 4, 2), torch.randn(1, 12, 2)
    mean.observe(mine)
    other = torch.cat([theirs.sum((0, 1)), torch.tensor([12.0])])
    finish_step(mean, True, lambda x: x + other)
    torch.testing.assert_close(mean.value, torch.cat([mine, theirs], 1).mean((0, 1)))


def test_a_step_left_out_and_an_evaluation_leave_no_trace():
    mean = RunningMean((2,), 0.5)
    mean.observe(torch.full((1, 3, 2), torch.nan))
    finish_step(mean, False, alone)
    mean.eval().observe(torch.ones(1, 3, 2))
    finish_step(mean, True, alone)
    assert not mean.value.any() and mean.updates == 0
    mean.train().observe(torch.ones(1, 3, 2))
    finish_step(mean, True, alone)
    assert torch.equal(mean.value, torch.ones(2))


def test_recomputing_a_pass_changes_neither_gradients_nor_the_mean():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        mixer, x = SparseFlash(SHAPE, 0, buckets=4), torch.randn(2, 30, 48, requires_grad=True)
        for _ in range(2):
            y = (checkpoint(mixer, x, use_reentrant=False) if recompute else mixer(x)).y
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            finish_step(mixer, True, alone)
        results.append([grad, mixer.key_center.value.clone()])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert mixer.key_center.value.any()


def test_the_mean_is_saved_and_restored():
    torch.manual_seed(0)
    mixer = SparseFlash(SHAPE, 0, buckets=4)
    mixer(torch.randn(2, 30, 48))
    finish_step(mixer, True, alone)
    other = SparseFlash(SHAPE, 0, buckets=4)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other.query_center.value, mixer.query_center.value) and other.query_center.updates == 1


def test_centering_spreads_vectors_that_lean_one_way():
    """All keys share a large part; without it they fall into all buckets again."""
    torch.manual_seed(0)
    x = torch.randn(1, 2000, 48) + 3 * torch.randn(48)
    shares = {}
    for decay in (None, 0.5):
        mixer = SparseFlash(SHAPE, 0, buckets=8, center_decay=decay)
        for _ in range(3):
            shares[decay] = mixer(x).metrics["largest_label"].figure()
            finish_step(mixer, True, alone)
    assert shares[None] > 3 > 2 > shares[0.5]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ConfigError, match="decay"):
        RunningMean((2,), decay)
    with pytest.raises(ConfigError, match=r"mixer\.center_decay"):
        SparseFlash(SHAPE, 0, buckets=4, center_decay=decay)
