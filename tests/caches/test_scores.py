"""The attention that keys got, whatever is computed at once."""

import pytest
import torch

from longmix.caches import scores
from longmix_kernels.attention import attention, column_mass


@pytest.mark.parametrize("most", [2**24, 400, 1])
def test_mass_is_that_of_the_kernel(most, monkeypatch):
    monkeypatch.setattr(scores, "MOST_SCORES", most)
    torch.manual_seed(0)
    query, key = torch.randn(2, 20, 4, 8, dtype=torch.float64), torch.randn(2, 20, 2, 8, dtype=torch.float64)
    ids = (torch.arange(20) >= torch.tensor([[0], [12]])).int()
    _, logsumexp = attention(query, key, key, document_ids=ids, return_logsumexp=True)
    first = torch.tensor([0, 12])
    wanted = column_mass(query[:, 12:], key.transpose(1, 2), logsumexp[:, 12:], first=first)
    found = scores.attention_mass(query[:, 12:], key.transpose(1, 2), first=first)
    torch.testing.assert_close(found[:, :, 0], wanted, rtol=0, atol=1e-12)
    by_head = scores.attention_mass(query[:, 12:], key.transpose(1, 2), first=first, by_head=True)
    torch.testing.assert_close(by_head.sum(2), wanted, rtol=0, atol=1e-12)
