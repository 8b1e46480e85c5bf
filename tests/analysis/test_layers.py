"""Measures of hidden states: those of StreetMath's code, and reading in pieces."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.analysis.layers import EPSILON, measures_of_layer, measures_of_neighbours, read_layers

FIXTURE = Path(__file__).parents[1] / "fixtures/model_side/layer_metrics.npz"


def test_measures_are_those_of_streetmath():
    wanted = np.load(FIXTURE)
    layers = [torch.tensor(states[0, -int(wanted["max_tokens"]) :]) for states in wanted["states"]]
    found = [measures_of_layer(states) for states in layers]
    for name, of_all in (
        ("spectral_entropy", "spectral_entropies"),
        ("effective_rank", "effective_ranks"),
        ("trace_covariance", "trace_covariances"),
    ):
        np.testing.assert_allclose([layer[name] for layer in found], wanted[of_all], rtol=1e-12)
    means = [states.mean(0) for states in layers]
    pairs = [measures_of_neighbours(*pair) for pair in pairwise(means)]
    for name, of_all in (
        ("cosine", "cosine_similarities"),
        ("distance", "l2_distances"),
        ("angle", "angular_distances"),
    ):
        np.testing.assert_allclose([pair[name] for pair in pairs], wanted[of_all], rtol=1e-11)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_even_dimensions_all_count(rank):
    basis = torch.linalg.qr(torch.randn(20, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    found = measures_of_layer(basis @ torch.eye(rank, 10, dtype=torch.float64))
    assert found["effective_rank"] == rank
    assert found["eigenvalue_rank"] == pytest.approx(rank) and found["spectral_entropy"] == pytest.approx(
        np.log(rank), abs=1e-9
    )


def test_states_of_zeros_and_without_a_number_are_said():
    assert measures_of_layer(torch.zeros(4, 3))["spectral_entropy"] == pytest.approx(0, abs=10 * EPSILON)
    assert np.isnan(measures_of_layer(torch.full((4, 3), torch.nan))["effective_rank"])


@torch.no_grad()
def test_a_row_in_pieces_is_read_as_a_whole(small_model):
    model = small_model("gated_deltanet")
    tokens = torch.randint(20, (1, 23), generator=torch.Generator().manual_seed(0))
    with read_layers(model, keep=9, block=5) as whole:
        hidden = model(tokens).hidden
    with read_layers(model, keep=9, block=5) as pieces:
        state = model.init_state(1)
        for piece in tokens.split(7, 1):
            state = model(piece, state=state).state
    assert [len(reading.blocks) for reading in whole] == [5] * 3, "the last block is more than half of one"
    assert torch.equal(whole[0].last, model.embedding(tokens)[0, -9:])
    torch.testing.assert_close(model.norm(whole[-1].last), hidden[0, -9:])
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.last, other.last, rtol=1e-9, atol=1e-9)
        assert one.blocks[1] == pytest.approx(other.blocks[1], rel=1e-9)
        assert one.blocks[-1] == pytest.approx(other.blocks[-1], rel=1e-9)
    assert not model.blocks[0]._forward_pre_hooks and not model.blocks[0]._forward_hooks
