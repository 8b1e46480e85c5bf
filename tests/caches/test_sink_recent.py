"""The first and the newest tokens, against the authors' positions and an independent cache of places."""

import json

import pytest
import torch

from longmix.caches.sink_recent import SinkRecent
from longmix.errors import ConfigError
from tests.caches.direct import FIXTURES, attended, built, case
from tests.caches.rotations import Exact64, turned

SPLITS = {"steps": [1] * 60, "pieces": [20, 7, 1, 1, 16, 15], "whole": [60], "short-then-long": [2, 1, 57]}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("number", [0, 1])
def test_places_are_those_of_a_cache_that_counts_them(number, split):
    given = case("sinks_own", number)
    length, rotary = len(given["query"]), Exact64(10_000.0, 8)
    query, key, value = (given[name][None, :, None] for name in ("query", "key", "value"))
    query, key = (turned(x[0], torch.arange(length), rotary)[None] for x in (query, key))
    cache = built(SinkRecent(start=int(given["start"]), recent=int(given["recent"])), query, key, value, rotary)
    found, place = [], 0
    for count in SPLITS[split]:
        if place < length:
            found.append(attended(cache, query, key, value, slice(place, place + count)))
        place += count
    torch.testing.assert_close(torch.cat(found, 1)[0, :, 0], given["output"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_true_positions_are_attention_to_both_ends(split):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 60, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    cache = built(SinkRecent(start=3, recent=9, positions=True), query, key, value)
    found, place = [], 0
    for count in SPLITS[split]:
        found.append(attended(cache, query, key, value, slice(place, place + count)))
        place += count
    age = torch.arange(60)[:, None] - torch.arange(60)
    seen = (age >= 0) & ((age < 9) | (torch.arange(60) < 3))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_keeps_the_positions_that_the_authors_keep(number):
    given = json.loads((FIXTURES / "streaming.json").read_text())[number]
    prompt, start, recent = (given[name] for name in ("prompt", "start", "recent"))
    tokens = torch.arange(prompt + given["steps"], dtype=torch.float64)
    key = tokens[None, :, None, None].expand(-1, -1, 1, 4)
    cache = built(SinkRecent(start=start, recent=recent), key, key, key)
    attended(cache, key, key, key, slice(0, prompt))
    for step, wanted in enumerate(given["kept"]):
        if step:
            attended(cache, key, key, key, slice(prompt + step - 1, prompt + step))
        parts = [cache.whole()[0]] if cache.ring_key is None else [cache.sink_key, cache.ring_key]
        assert sorted(torch.cat(parts, 2)[0, 0, :, 0].tolist()) == wanted


@pytest.mark.parametrize("settings", [{"start": -1}, {"recent": 0}, {"recent": 0.5}])
def test_refuses_what_is_no_number_of_tokens(settings):
    with pytest.raises(ConfigError, match=f"cache.{next(iter(settings))}=.* must be a whole number of tokens"):
        SinkRecent(**settings)
