"""Tokens that stand for dropped ones, against a second implementation and the compiled blocks of OpenVINO."""

import json

import pytest
import torch

from longmix.caches.h2o import H2O
from longmix.caches.representatives import representatives, signature_distance
from tests.caches.direct import FIXTURES, case


def test_stand_for_the_dropped_tokens():
    given = case("kvcrush_tokens_own", 0)
    scores, slots = given["scores"][None], given["scores"].shape[1]
    distance = signature_distance(scores, torch.ones(1, slots, dtype=torch.bool))
    assert distance[0].tolist() == given["distance"].tolist()
    dropped = torch.ones(1, 1, slots, dtype=torch.bool)
    dropped[..., given["keepers"]] = False
    wanted = sorted(given["representatives"].tolist())
    assert representatives(distance, dropped, torch.tensor([len(wanted)]), len(wanted))[0, 0].tolist() == wanted


@pytest.mark.parametrize("number", range(4))
def test_the_better_half_is_that_of_the_authors(number):
    given = json.loads((FIXTURES / "kvcrush_blocks.json").read_text())[number]
    scores = torch.tensor(given["scores"], dtype=torch.float64)
    # of one head alone, whose anchor is 0, the distance is the bit
    bits = signature_distance(scores[None, None], torch.ones(1, len(scores), dtype=torch.bool))
    assert bits[0].tolist() == given["indicators"]


def test_of_each_row_alone():
    torch.manual_seed(0)
    scores = torch.rand(2, 4, 30, dtype=torch.float64)
    allowed = torch.arange(30) >= torch.tensor([[0], [13]])
    together = signature_distance(scores, allowed)
    alone = signature_distance(scores[1:, :, 13:], torch.ones(1, 17, dtype=torch.bool))
    assert together[1, 13:].tolist() == alone[0].tolist()


def test_a_share_of_the_budget_goes_to_them():
    torch.manual_seed(0)
    scores = torch.rand(2, 2, 3, 40, dtype=torch.float64)
    allowed = (torch.arange(40) >= torch.tensor([[0], [25]]))[:, None]
    counts = torch.tensor([12, 8])
    index, standing = H2O(representatives=0.25).chosen(scores, allowed, counts, 12)
    assert standing.tolist() == [3, 2]
    for row in range(2):
        for head in range(2):
            mine = index[row, head, : counts[row]].tolist()
            assert len(set(mine)) == counts[row] and all(allowed[row, 0, at] for at in mine)
            order = scores[row, head].sum(0).masked_fill(~allowed[row, 0], -1).argsort(descending=True).tolist()
            first = int(counts[row] - standing[row])
            assert set(mine[int(standing[row]) :]) == set(order[:first])
            assert not set(mine[: int(standing[row])]) & set(order[:first])
            assert (index[row, head, counts[row] :] == 40).all()
