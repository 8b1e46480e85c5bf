"""Statistics of matrices against numbers worked out by hand."""

import math

import pytest
import torch

from longmix.analysis.attention_statistics import (
    AttentionStatistics,
    by_distance,
    distance_bins,
    effective_rank,
    signed_shares,
)

LENGTH = 16


def summary(matrix: torch.Tensor, document_ids: torch.Tensor | None = None) -> dict:
    """Of the one head of one window."""
    statistics = AttentionStatistics()
    statistics.update(matrix[None, None], document_ids)
    (head,) = statistics.summary()
    return head


def lagged(lag: int) -> torch.Tensor:
    return torch.eye(LENGTH).roll(lag, 0).tril()


def test_the_identity_sees_itself_alone():
    head = summary(2.5 * torch.eye(LENGTH))
    assert head["entropy"] == head["mean_distance"] == head["receptive_field"] == head["negative_mass"] == 0
    assert head["effective_rank"] == pytest.approx(LENGTH)
    assert head["first_token_mass"] == pytest.approx(1 / LENGTH)
    assert head["histogram"] == pytest.approx([1, 0, 0, 0, 0])


def test_the_even_triangle_has_the_means_of_its_rows():
    head = summary(torch.ones(LENGTH, LENGTH).tril())
    rows = range(1, LENGTH + 1)
    assert head["entropy"] == pytest.approx(sum(map(math.log, rows)) / LENGTH)
    assert head["mean_distance"] == pytest.approx(sum((row - 1) / 2 for row in rows) / LENGTH)
    assert head["first_token_mass"] == pytest.approx(sum(1 / row for row in rows) / LENGTH)
    at = [sum(1 / row for row in rows if row > distance) / LENGTH for distance in range(LENGTH)]
    assert head["histogram"] == pytest.approx([at[0], at[1], sum(at[2:4]), sum(at[4:8]), sum(at[8:])])
    field = next(distance for distance in range(LENGTH) if sum(at[: distance + 1]) >= 0.9)
    assert head["receptive_field"] == field


def test_a_lag_is_the_distance_and_rows_without_mass_do_not_count():
    head = summary(lagged(3))
    assert head["mean_distance"] == pytest.approx(3) and head["receptive_field"] == 3
    assert head["histogram"] == pytest.approx([0, 0, 1, 0, 0])
    assert head["effective_rank"] == pytest.approx(LENGTH - 3)
    assert head["first_token_mass"] == pytest.approx(1 / (LENGTH - 3))
    assert summary(torch.zeros(LENGTH, LENGTH))["effective_rank"] == 1


def test_negative_mass_is_a_share_of_magnitudes():
    head = summary(3 * torch.eye(LENGTH) - lagged(1))
    assert head["negative_mass"] == pytest.approx(0.25 * (LENGTH - 1) / LENGTH)
    assert head["mean_distance"] == pytest.approx(0.25 * (LENGTH - 1) / LENGTH)


def test_the_first_token_is_that_of_the_document():
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([10, 6]))[None]
    matrix = torch.zeros(LENGTH, LENGTH)
    matrix[:10, 0] = 1.0
    matrix[10:, 10] = 1.0
    assert summary(matrix, ids.int())["first_token_mass"] == pytest.approx(1)
    assert summary(matrix)["first_token_mass"] == pytest.approx(10 / 16)


def test_the_effective_rank_is_that_of_even_singular_values():
    rows = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double()).Q
    matrix = 7 * rows[:, :5] @ rows[:5]
    assert effective_rank(matrix).item() == pytest.approx(5)
    assert effective_rank(torch.outer(rows[0], rows[1])).item() == pytest.approx(1)


def test_windows_are_averaged_however_they_come():
    matrices = torch.randn(3, 2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)).tril()
    together, apart = AttentionStatistics(), AttentionStatistics()
    together.update(matrices)
    for matrix in matrices:
        apart.update(matrix[None])
    for one, other in zip(together.summary(), apart.summary(), strict=True):
        assert {name: pytest.approx(value) for name, value in one.items()} == other
    means = [summary(matrix[1])["entropy"] for matrix in matrices]
    assert together.summary()[1]["entropy"] == pytest.approx(sum(means) / 3)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17])
def test_bins_hold_every_distance_once(length):
    bins = distance_bins(length)
    assert [distance for start, stop in bins for distance in range(start, stop)] == list(range(length))
    assert all(stop <= 2 * max(start, 1) for start, stop in bins[1:])
    matrix = torch.randn(length, length, generator=torch.Generator().manual_seed(0)).double().tril()
    assert by_distance(matrix).tolist() == pytest.approx([matrix.diagonal(-d).sum().item() for d in range(length)])


def test_shares_keep_signs_and_sum_to_one_in_magnitude():
    shares = signed_shares(torch.tensor([[-2.0, 0.0], [1.0, 3.0], [0.0, 0.0]]))
    assert shares.tolist() == [[-1, 0], [0.25, 0.75], [0, 0]]
