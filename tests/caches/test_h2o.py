"""The heavy hitters and the newest tokens, against the authors' code."""

import pytest
import torch

from longmix.caches.h2o import H2O
from longmix.errors import ConfigError
from tests.caches.direct import attended, built, case


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


class Naive:
    """One row, one token at a time, from the definition: a list of what each key head holds."""

    def __init__(self, budget, recent, mean):
        self.budget, self.recent, self.mean = budget, recent, mean

    def read(self, query, key, value, prompt):
        """Output [T, Hq, D] of tokens [T, H, D]; all of the prompt is held until its end."""
        heads, key_heads = query.shape[1], key.shape[1]
        held = [{} for _ in range(key_heads)]  # positions and their scores
        output = torch.zeros_like(query)
        for token in range(len(query)):
            for head in range(key_heads):
                mine = held[head]
                mine[token] = 0.0
                places = list(mine)
                for number in range(head * heads // key_heads, (head + 1) * heads // key_heads):
                    scores = key[places, head] @ query[token, number] / query.shape[2] ** 0.5
                    weights = scores.softmax(0)
                    output[token, number] = weights @ value[places, head]
                    for place, weight in zip(places, weights.tolist(), strict=True):
                        mine[place] += weight
                if token >= prompt - 1 and len(mine) > self.budget:
                    newest = [place for place in mine if place > token - self.recent]
                    others = [place for place in mine if place <= token - self.recent]
                    rank = {at: mine[at] / (token + 1 - at if self.mean else 1) for at in others}
                    others.sort(key=lambda at: -rank[at])
                    stay = sorted([*others[: self.budget - self.recent], *newest])
                    held[head] = {place: mine[place] for place in stay}
        return output


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("budget", "recent"), [(9, 4), (9, 9), (40, 7), (7, 1)])
def test_rows_of_any_length_are_those_of_the_definition(budget, recent, mean):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 48, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    cache = built(H2O(budget=budget, recent=recent, mean=mean), query, key, value)
    ids = torch.zeros(2, 48, dtype=torch.int32)
    ids[1, 11:] = 1  # the second row begins behind padding
    positions = torch.arange(48) - torch.tensor([[0], [11]])
    positions[1, :11] = torch.arange(11)
    found = []
    for part in (slice(0, 7), slice(7, 30), *(slice(at, at + 1) for at in range(30, 48))):
        given = ids[:, part] if part.start < 30 else None
        with torch.no_grad():
            found.append(cache.attend(query[:, part], key[:, part], value[:, part], positions[:, part], given)[0])
        if part.stop == 30:
            cache.prompt_ended()
    found = torch.cat(found, 1)
    naive = Naive(budget, recent, mean)
    for row, start in ((0, 0), (1, 11)):
        wanted = naive.read(*(x[row, start:] for x in (query, key, value)), prompt=30 - start)
        torch.testing.assert_close(found[row, start:], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "cache.budget=0 must be a whole number of tokens, at least 1, or a share"),
        ({"budget": 5.5, "recent": 2}, "cache.budget=5.5 must be a whole number"),
        ({"budget": 5}, "cache.recent=0.1 must be at most cache.budget=5, and a share if that is one"),
        ({"budget": 5, "recent": 6}, "cache.recent=6 must be at most cache.budget=5"),
        ({"when": "never"}, "cache.when=never must be prompt or piece"),
        ({"when": "piece"}, "cache.when=piece needs a number of tokens; cache.budget=0.2 is a share"),
        ({"when": "piece", "budget": 9, "recent": 3, "representatives": 0.1}, "are chosen once, from a whole prompt"),
        ({"piece": 0}, "cache.piece=0 must be at least 1"),
        ({"representatives": 1.0}, "cache.representatives=1.0 must be a share of the budget"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        H2O(**settings)
