"""SOFT's features by landmarks: the authors' numbers, the gradients of the whole formula, and who is far from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_decay import HeadDecay
from longmix.mixers.parts.landmarks import GaussianFeatures
from longmix.mixers.simple_gla import SimpleGLA
from longmix_kernels.linear import linear_attention

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures/model_side/soft_nystrom.npz")
SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)


def fixture(name: str) -> torch.Tensor:
    """An array of the fixture, head first as it is there."""
    return torch.from_numpy(FIXTURE[name])


def test_features_and_causal_outputs_are_those_of_the_fixture():
    """The authors' kernels, and gradients of ours against those of the formula with a plain inverse."""
    maps = GaussianFeatures(2, 4, 5, radius=None).double()
    with torch.no_grad():
        maps.landmarks.copy_(fixture("landmarks")[0])
    x = fixture("q_over_fourth_root_of_d").transpose(1, 2).requires_grad_()
    value = fixture("v").transpose(1, 2).clone().requires_grad_()
    features = maps(x, maps.whitening())
    torch.testing.assert_close(features.transpose(1, 2), fixture("features"), rtol=0, atol=1e-12)
    kernel = fixture("kernel_q_landmarks")
    estimate = kernel @ fixture("exact_inverse") @ kernel.mT
    torch.testing.assert_close(features.transpose(1, 2) @ features.permute(0, 2, 3, 1), estimate, rtol=0, atol=1e-12)
    found, _ = linear_attention(features, features, value, log_decay=torch.zeros(2, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(found.transpose(1, 2), fixture("o_causal"), rtol=0, atol=1e-12)

    def gaussian(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1))

    rows, landmarks = x.transpose(1, 2), maps.landmarks
    inverse = (gaussian(landmarks, landmarks) + 0.01 * torch.eye(5, dtype=torch.float64)).inverse()
    weights = gaussian(rows, landmarks) @ inverse @ gaussian(rows, landmarks).mT
    wanted = (weights.tril() @ value.transpose(1, 2)).transpose(1, 2)
    direction = torch.randn_like(found)
    inputs = [x, value, maps.landmarks]
    grads, expected = (torch.autograd.grad((y * direction).sum(), inputs) for y in (found, wanted))
    for grad, wish in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wish, rtol=0, atol=1e-11 * wish.abs().max().item())


def test_landmarks_begin_where_queries_and_keys_are():
    """At unit variance and the paper's scale a random landmark sees nothing; at one length it does."""
    torch.manual_seed(0)
    maps = GaussianFeatures(1, 32, 64, radius=1.0)
    torch.testing.assert_close(maps.landmarks.square().sum(-1), torch.ones(1, 64))
    x = torch.randn(1, 200, 1, 32)
    features = maps(7 * x, maps.whitening())[0, :, 0]
    unit = torch.nn.functional.normalize(x[0, :, 0], dim=-1)
    exact = (unit @ unit.mT - 1).exp()
    error = (features @ features.mT - exact).triu(1).abs().sum() / exact.triu(1).sum()
    assert error < 0.05
    mixer = SimpleGLA(SHAPE, 0, features="gaussian", landmarks=7)
    assert mixer.init_state(1).carried.memory.shape == (1, 3, 7, 16)
    assert mixer.features.landmarks.shape == (3, 7, 8)


REFUSED = {
    "features": ({"features": "x"}, r"mixer.features=x is unknown; use null or gaussian"),
    "landmarks": ({"features": "gaussian", "landmarks": 0}, r"mixer.landmarks=0 must be positive"),
    "radius": ({"radius": 0.0}, r"mixer.radius=0.0 must be positive"),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        HeadDecay(SHAPE, 0, **settings)
