"""`prefill=star`: against the authors' block-by-block procedure, and against masks."""

from types import SimpleNamespace

import pytest
import torch

import longmix.generation.session as sessions
from longmix.caches.exact import Exact
from longmix.caches.kinds import kind_of
from longmix.caches.star import Star, StarReading
from longmix.errors import ConfigError
from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.parts.states import caches
from longmix.mixers.sliding_window import SlidingWindow
from tests.caches.direct import attended, built, case
from tests.caches.rotations import Exact64, turned
from tests.caches.test_caches import model_of, steps, tokens_of


class Llama:
    """The fixture's model in float64, as far as a session asks for one."""

    def __init__(self, given):
        self.given = {name.removeprefix("weight."): x for name, x in given.items() if name.startswith("weight.")}
        self.rotary = Exact64(10_000.0, 4)

    def decoding_state(self, batch, kind):
        query, key = (torch.zeros(batch, 1, heads, 4, dtype=torch.float64) for heads in (4, 2))
        return [built(kind, query, key, key, self.rotary) for _ in range(2)]

    def __call__(self, tokens, state, document_ids):
        x = self.given["model.embed_tokens.weight"][tokens]
        positions = state[0].next_position[:1, None] + torch.arange(tokens.shape[1])
        for number, cache in enumerate(state):
            part = f"model.layers.{number}."
            normed = norm(x, self.given[f"{part}input_layernorm.weight"])
            query, key, value = (
                (normed @ self.given[f"{part}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 4)) for name in "qkv"
            )
            query, key = (turned(each[0], positions[0], self.rotary)[None] for each in (query, key))
            mixed, _ = cache.attend(query, key, value, positions)
            x = x + mixed.flatten(2) @ self.given[f"{part}self_attn.o_proj.weight"].T
            normed = norm(x, self.given[f"{part}post_attention_layernorm.weight"])
            gate, up, down = (self.given[f"{part}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x = x + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
        return SimpleNamespace(hidden=x, state=state)

    def logits(self, hidden):
        return norm(hidden, self.given["model.norm.weight"]) @ self.given["lm_head.weight"].T


def norm(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.parametrize("most", [4096, 4, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_reads_and_writes_what_the_authors_do(number, most, monkeypatch):
    given = case("star", number)
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", most)
    session = Session(Llama(given), 1, Exact(), Star(block=int(given["block"]), anchor=int(given["anchor"])))
    session.prefill([given["tokens"]], given["question"])
    length = len(given["tokens"])
    for layer, cache in enumerate(session.state):
        for name, held in zip(("key", "value"), cache.store.used, strict=True):
            torch.testing.assert_close(held[0, :, :length].transpose(0, 1), given[name][layer], rtol=0, atol=2e-6)
    written = []
    for logits in given["logits"]:
        torch.testing.assert_close(session.logits[0], logits, rtol=0, atol=2e-6)
        written.append(int(session.logits.argmax()))
        session.step(torch.tensor(written[-1:]))
    assert written == given["generated"].tolist()
    dense = Session(Llama(given), 1, Exact())
    dense.prefill([torch.cat((given["tokens"], given["question"]))])
    torch.testing.assert_close(dense.logits[0], given["dense_first_logits"], rtol=0, atol=2e-6)
    assert (dense.logits[0] - given["logits"][0]).abs().max() > 1e-3


@pytest.mark.sampled(3)
@pytest.mark.parametrize("split", [[40], [1] * 40, [9, 1, 22, 8], [16, 24]], ids=["one", "steps", "mixed", "two"])
@pytest.mark.parametrize(("block", "anchor"), [(7, None), (7, 3), (7, 0), (1, None), (16, 16), (64, None)])
def test_sees_what_the_mask_says(block, anchor, split):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 40, heads, 8, generator=generator).double() for heads in (4, 2, 2))
    star, dense_from = Star(block=block, anchor=anchor), 37
    cache = built(Exact(), query, key, value)
    cache.reading = StarReading(star, dense_from)
    found, start = [], 0
    for count in split:
        found.append(attended(cache, query, key, value, slice(start, start + count)))
        start += count
    i, j = torch.arange(40)[:, None], torch.arange(40)
    of_star = ((i // block == j // block) | (j < star.anchor_tokens)) & (j <= i)
    assert star.visible_pairs(40) == int(of_star.sum())
    seen = of_star | ((i >= dense_from) & (j <= i))
    scores = torch.einsum("bihk,bjhk->bhij", query, key.repeat_interleave(2, 2)) * 8**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhij,bjhv->bihv", weights, value.repeat_interleave(2, 2))
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-12)


KINDS = {
    "a2ats": kind_of("a2ats", {"sinks": 1, "window": 3, "share": 0.15, "codes": 0.4}),
    "exact": None,
    "snapkv": kind_of("snapkv", {"budget": 14, "window": 4}),
    "quantised": kind_of("quantised", {"bits": 8}),
}
LAYERS = {"flash": (Flash,), "hybrid": (Flash, GLA), "window": (Flash, SlidingWindow)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("asked", [False, True])
def test_rows_of_any_length_and_pieces_of_any_size_are_as_alone(name, kind, asked, monkeypatch):
    layers, star = LAYERS[name], Star(block=8, anchor=5)
    model = model_of(lambda shape, index: layers[index % len(layers)](shape, index))
    prompts, question, more = tokens_of(41, 9, 26), tokens_of(4)[0] if asked else None, torch.stack(tokens_of(6, 6, 6))

    def read(rows):
        session = Session(model, len(rows), kind, star)
        session.prefill(rows, question)
        return session

    together = read(prompts)
    first, later = together.logits, steps(together, more)
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 11)
    for row, prompt in enumerate(prompts):
        alone = read([prompt])
        torch.testing.assert_close(first[row], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(later[row], steps(alone, more[row : row + 1])[0], rtol=0, atol=1e-10)
    assert all(cache.reading is None for cache in caches(together.state))


def test_a_prompt_of_one_or_two_whole_blocks_is_read_densely():
    model, prompts = model_of(), tokens_of(30)
    dense = Session(model, 1)
    dense.prefill(prompts)
    for star, same in ((Star(block=30), True), (Star(block=15), True), (Star(block=8, anchor=0), False)):
        session = Session(model, 1, None, star)
        session.prefill(prompts)
        assert torch.allclose(session.logits, dense.logits, rtol=0, atol=1e-10) == same


def test_refuses_what_does_not_read_so():
    model = model_of(GLA)
    with pytest.raises(ConfigError, match=r"read in blocks by layers of softmax attention that see all tokens"):
        Session(model, 1, None, Star())
    with pytest.raises(ConfigError, match=r"cache=h2o is none"):
        Session(model_of(), 1, kind_of("h2o"), Star())
    for settings, message in (
        ({"block": 0}, "prefill.block=0 must be at least 1"),
        ({"block": 4, "anchor": 5}, "must be from 0 to prefill.block=4"),
        ({"anchor": -1}, "prefill.anchor=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Star(**settings)
