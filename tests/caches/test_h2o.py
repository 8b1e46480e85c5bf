"""The heavy hitters and the newest tokens, against the authors' code."""

import pytest
import torch
from tests.caches.direct import attended, built, case

from longmix.caches.h2o import H2O
from longmix.caches.kinds import kind_of
from longmix.errors import ConfigError


def kept(cache, key) -> list[list[int]]:
    """Positions that each head of the only row holds, by their keys [1, S, Hkv, D]."""
    heavy, recent = (int(count[0]) for count in cache._used())
    held = torch.cat((cache.heavy_key[0, :, :heavy], cache.recent_key[0, :, :recent]), 1)
    return [
        sorted(int((key[0, :, head] == one).all(-1).nonzero()[0, 0]) for one in held[head]) for head in range(len(held))
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_keeps_what_the_authors_keep(number):
    given = case("h2o", number)
    rows = given["query"], given["key"], given["value"]
    prompt, heavy, recent = (int(given[name]) for name in ("prompt", "heavy", "recent"))
    cache = built(H2O(budget=heavy + recent, recent=recent), *rows)
    outputs = [attended(cache, *rows, slice(0, prompt))]
    cache.prompt_ended()
    for step, wanted in enumerate(given["kept"]):
        assert kept(cache, given["key"]) == wanted.tolist()
        if prompt + step < rows[0].shape[1]:
            outputs.append(attended(cache, *rows, slice(prompt + step, prompt + step + 1)))
    torch.testing.assert_close(torch.cat(outputs, 1), given["output"], rtol=0, atol=1e-12)
