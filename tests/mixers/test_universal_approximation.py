"""One layer fits causal maps of a row of numbers, and one that sees two tokens cannot (arXiv 2507.10581)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.blocks import SwiGLU

ROWS = np.load(Path(__file__).parents[1] / "fixtures/model_side/uat_targets.npz")
SHAPE = ModelShape(d_model=16, num_layers=1, num_heads=2)
MAPS = ("prefix_mean", "soft_maximum", "first_times_current")
MOST_STEPS = 500
FITTED, CANNOT = 0.01, 0.3
"""Mean squared errors over the variance of the map."""


def softmax() -> Flash:
    return Flash(SHAPE, 0, qk_norm=False)


def error_of(mixer: Mixer, target: torch.Tensor, steps: int) -> float:
    """The error of mixer, channel mixer and a linear read-out after training, which ends early where it is small.

    A number times one fixed vector, plus another, is what the layer is given; a norm would leave only its sign.
    """
    mlp, read, number, place = SwiGLU(SHAPE, 32), nn.Linear(16, 1), torch.randn(16), torch.randn(16)
    x = torch.tensor(ROWS["x"]).float().unsqueeze(-1) * number + place
    weights = [*mixer.parameters(), *mlp.parameters(), *read.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / MOST_STEPS))
    for _ in range(steps):
        mixed = x + mixer(x).y
        error = (read(mixed + mlp(mixed).y).squeeze(-1) - target).square().mean() / target.var()
        if error < FITTED:
            break
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return error.item()


@pytest.mark.parametrize(
    ("mixer", "name"),
    [
        *(pytest.param(softmax, name, id=f"flash, {name}") for name in MAPS),
        pytest.param(lambda: GLA(SHAPE, 0, num_heads=2), "prefix_mean", id="gla", marks=pytest.mark.slow),
    ],
)
def test_a_layer_that_sees_the_prefix_fits(mixer, name):
    torch.manual_seed(0)
    assert error_of(mixer(), torch.tensor(ROWS[name]).float(), MOST_STEPS) < FITTED


@pytest.mark.parametrize("name", MAPS)
def test_a_window_of_two_does_not(name):
    torch.manual_seed(0)
    mixer = SlidingWindow(SHAPE, 0, window=2, qk_norm=False)
    assert error_of(mixer, torch.tensor(ROWS[name]).float(), steps=150) > CANNOT
