"""Prompts in pieces whose best tokens a question keeps, against the authors' code around a tiny model."""

import pytest
import torch

from longmix.caches.citrus import Citrus, Reader
from tests.caches.direct import built, case
from tests.caches.rotations import Exact64, turned


class Tiny:
    """The fixture's model: attention without an MLP, RMS norms without weights, and none before the head."""

    def __init__(self, given):
        self.given, self.rotary, self.logits = given, Exact64(10_000.0, 8), None

    def projected(self, x, layer, number):
        weight = self.given["weights"][layer, number]
        out = x @ weight.T
        return out.unflatten(-1, (-1, 8))

    @torch.no_grad()
    def advance(self, tokens, caches):
        x = self.given["embedding"][tokens]
        positions = caches[0].next_position[:1, None] + torch.arange(tokens.shape[1])
        for layer, cache in enumerate(caches):
            normed = norm(x)
            query, key, value = (self.projected(normed, layer, number) for number in range(3))
            heads = cache.shape.key_heads
            key, value = key[:, :, :heads], value[:, :, :heads]
            query, key = (turned(each[0], positions[0], self.rotary)[None] for each in (query, key))
            out, _ = cache.attend(query, key, value, positions)
            x = x + out.flatten(2) @ self.given["weights"][layer, 3].T
        self.logits = x[:, -1] @ self.given["head"].T
        return caches


def norm(x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("name", ["standard", "single", "dual"])
@pytest.mark.parametrize("number", [0, 1])
def test_keeps_and_writes_what_the_authors_do(number, name):
    given = case("citrus", number)
    model = Tiny(given)
    key_heads = given[f"{name}_key"].shape[2]
    kind = Citrus(budget=int(given["k"]), piece=int(given["chunk"]), kind=name)
    shape = torch.zeros(1, 1, 4, 8, dtype=torch.float64), *(torch.zeros(1, 1, key_heads, 8, dtype=torch.float64),) * 2
    state = [built(kind, *shape, model.rotary) for _ in range(2)]
    state = Reader(kind)(model.advance, state, given["tokens"][None], given["instruction"][None])
    for layer, cache in enumerate(state):
        kept = 0 if cache.kept_key is None else cache.kept_key.shape[2]
        key, value = cache._held(cache.kept_key, 0), cache._held(cache.kept_value, 1)
        frame = torch.arange(cache.length - key.shape[2], cache.length)
        plain = turned(key[0].transpose(0, 1), -frame, model.rotary)
        torch.testing.assert_close(plain, given[f"{name}_key"][layer], rtol=0, atol=1e-10)
        torch.testing.assert_close(value[0].transpose(0, 1), given[f"{name}_value"][layer], rtol=0, atol=1e-10)
        assert kept <= int(given["k"])
    written = [int(model.logits.argmax())]
    for logits in given[f"{name}_logits"]:
        state = model.advance(torch.tensor([[written[-1]]]), state)
        torch.testing.assert_close(model.logits[0], logits, rtol=0, atol=1e-10)
        written.append(int(model.logits.argmax()))
    assert written == given[f"{name}_generated"].tolist()
