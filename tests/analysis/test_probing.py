"""Efficient probing: the authors' outputs and gradients, and that it finds what means and last tokens miss."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.analysis.probing import EfficientProbe, Labelled, LastToken, MeanPool, accuracy_of

FIXTURE = Path(__file__).parents[1] / "fixtures/model_side/efficient_probe.npz"


def test_outputs_and_gradients_are_the_authors():
    wanted = {name: torch.tensor(array) for name, array in np.load(FIXTURE).items()}
    probe = EfficientProbe(12, queries=4, d_out=int(wanted["d_out"])).double()
    with torch.no_grad():
        probe.queries.copy_(wanted["queries"][0])
        probe.value.weight.copy_(wanted["value_weight"])
    x = wanted["x"].requires_grad_()
    y = probe(x)
    y.square().sum().backward()
    for found, name in (
        (probe.attention(x), "attention"),
        (y, "y"),
        (probe.queries.grad[None], "grad_queries"),
        (probe.value.weight.grad, "grad_value_weight"),
    ):
        assert (found - wanted[name]).abs().max() <= 1e-12 * wanted[name].abs().max(), name


def planted(count: int, seed: int) -> Labelled:
    """The class is in the one position of seven that a mark tells; the others say other classes as loudly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    states = torch.randn(count, 7, 16, generator=generator) * 0.1
    classes = torch.randint(4, (count, 7), generator=generator)
    place = torch.randint(6, (count,), generator=generator)
    rows = torch.arange(count)
    classes[rows, place] = labels
    states[rows[:, None], torch.arange(7), classes] += 2
    states[rows, place, 10] += 4
    return Labelled(states, labels)


def test_a_query_finds_what_the_mean_and_the_last_token_miss():
    fit, held_out = planted(384, 0), planted(256, 1)
    asked = partial(accuracy_of, fit=fit, held_out=held_out, classes=4, epochs=30, seed=0)
    before = torch.random.get_rng_state()
    found = asked(partial(EfficientProbe, queries=4))
    assert found > 0.95 and asked(MeanPool) < 0.75 and asked(LastToken) < 0.4
    assert asked(partial(EfficientProbe, queries=4)) == found, "the same on every call"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("count", [2, 65])
def test_few_rows_and_a_last_row_alone_are_fitted(count):
    fit = planted(count, 0)
    assert 0 <= accuracy_of(LastToken, fit, fit, 4, 2, 0) <= 1
