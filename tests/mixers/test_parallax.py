"""What is particular to Parallax: what it equals without a probe, its formula, its cost, how its probe is trained."""

import pytest
import torch
from mixer_table import SHAPE

from longmix.mixers.flash import Flash
from longmix.mixers.parallax import Parallax
from longmix.mixers.parts.rotary import rotary_angles, rotate
from longmix.mixers.sliding_window import SlidingWindow
from longmix.recipe import recipe_of

X = torch.randn(2, 23, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = (torch.arange(23) // 9).int().expand(2, -1)


def made(**settings) -> Parallax:
    torch.manual_seed(1)
    return Parallax(SHAPE, 0, **settings).double()


@pytest.mark.parametrize("window", [None, 5])
def test_without_a_probe_it_is_the_mixer_with_the_same_weights(window):
    mixer = made(window=window, probe_std=0.0, num_kv_heads=1)
    plain = (
        Flash(SHAPE, 0, num_kv_heads=1) if window is None else SlidingWindow(SHAPE, 0, window=5, num_kv_heads=1)
    ).double()
    missing, unexpected = plain.load_state_dict(mixer.state_dict(), strict=False)
    assert not missing and unexpected == ["probe.weight"]
    for ids in (None, IDS):
        found, wanted = mixer(X, document_ids=ids), plain(X, document_ids=ids)
        torch.testing.assert_close(found.y, wanted.y, rtol=1e-13, atol=1e-13)
    # It learns from there: the gradient of the probe is not 0.
    (grad,) = torch.autograd.grad(found.y.square().sum(), mixer.probe.weight)
    assert grad.norm() > 0.1


@pytest.mark.parametrize("probe_norm", [False, True])
def test_it_is_the_published_formula(probe_norm):
    mixer = made(probe_std=0.3, probe_norm=probe_norm)
    query, key, value = super(Parallax, mixer).project(X)
    probe = mixer.probe_norm(mixer.probe(X).unflatten(-1, (3, 16)))
    angles = rotary_angles(torch.arange(23)[None], mixer.rotary)
    query, key, probe = (rotate(x, *angles) for x in (query, key, probe))
    s, t = (torch.einsum("bihd,bjhd->bhij", x, key) for x in (query / 4, probe))
    p = s.masked_fill(torch.ones(23, 23).bool().triu(1), -torch.inf).softmax(-1)
    w = p * (1 + (p * t).sum(-1, keepdim=True) - t)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    assert w.min() < 0
    wanted = mixer.output(torch.einsum("bhij,bjhd->bihd", w, value).flatten(2))
    torch.testing.assert_close(mixer(X).y, wanted, rtol=1e-12, atol=1e-12)


def test_pairs_cost_twice_and_the_cache_is_that_of_attention():
    mixer, plain = Parallax(SHAPE, 0), Flash(SHAPE, 0)
    for length in (1, 500):
        pairs = 8 * 48 * length * (length + 1) // 2
        assert mixer.flops(length) == 2 * length * 5 * 48**2 + pairs
        assert mixer.state_bytes(length) == plain.state_bytes(length)
        assert mixer.step_bytes(length) == plain.step_bytes(length)
    assert not mixer.carries_in_slices and Parallax(SHAPE, 0, window=4).carries_in_slices


def test_the_probe_is_a_matrix_for_the_optimizer_and_its_size_is_measured():
    mixer = made(probe_std=0.3)
    assert recipe_of(mixer.probe.weight).role == "matrix"
    assert mixer.probe.weight.std().item() == pytest.approx(0.3, rel=0.05)
    found = mixer(X).metrics["probe_rms"].figure()
    torch.testing.assert_close(found, mixer.probe(X).square().mean().sqrt())
