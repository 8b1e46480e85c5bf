"""Prompts that are compressed, questions behind them, and tokens that a draft expects."""

import pytest
import torch

from longmix.caches.kinds import kind_of
from longmix.errors import ConfigError
from longmix.generation.prompts import continuation
from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.parts.states import caches
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparse_flash import SparseFlash
from tests.caches.test_caches import SHORT, model_of, steps, tokens_of

CITRUS = {"budget": 12, "piece": 5}


def mixed(*layers):
    """A model whose layers alternate."""
    return model_of(lambda shape, index: layers[index % len(layers)](shape, index))


def read(model, kind, prompts, question=None, lookahead=None):
    session = Session(model, len(prompts), kind)
    session.prefill(list(prompts), question, lookahead)
    return session


@pytest.mark.parametrize("name", SHORT)
def test_short_budgets_are_kept(name):
    kind, model = kind_of(name.partition("-")[0], SHORT[name]), model_of()
    session = read(model, kind, tokens_of(48, 48))
    for cache in caches(session.state):
        assert cache.held_bytes() == 2 * kind.bytes(cache.shape, 48)
        less = kind.step_bytes(cache.shape, 48) if kind.name in ("a2ats", "squeezed") else kind.bytes(cache.shape, 48)
        assert less < 0.9 * 48 * cache.shape.token_bytes  # these two hold all, and read less


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["standard", "single", "dual"])
@pytest.mark.parametrize("layers", [(Flash,), (Flash, GLA), (SlidingWindow, Flash)], ids=["flash", "gla", "window"])
def test_citrus_reads_rows_of_any_length_as_alone(name, layers):
    model, kind = mixed(*layers), kind_of("citrus", CITRUS | {"kind": name})
    question, more = tokens_of(4)[0], torch.stack(tokens_of(6, 6, 6))
    prompts = tokens_of(41, 9, 26)
    together = read(model, kind, prompts, question)
    first, later = together.logits, steps(together, more)
    assert together.length == 41 + 4 + 6
    for row, prompt in enumerate(prompts):
        alone = read(model, kind, [prompt], question)
        torch.testing.assert_close(first[row], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(later[row], steps(alone, more[row : row + 1])[0], rtol=0, atol=1e-10)
    same = read(model, kind, [prompts[0]] * 2, question)
    torch.testing.assert_close(same.logits[1], first[0], rtol=0, atol=1e-10)


def test_citrus_with_room_for_all_is_one_pass():
    model, question = model_of(), tokens_of(4)[0]
    prompts = tokens_of(30, 30)
    for name in ("standard", "single", "dual"):
        session = read(model, kind_of("citrus", {"budget": 30, "piece": 7, "kind": name}), prompts, question)
        wanted = read(model, None, [torch.cat((prompt, question)) for prompt in prompts])
        torch.testing.assert_close(session.logits, wanted.logits, rtol=0, atol=1e-10)


def test_citrus_asks_for_a_question_and_names_layers_that_cannot_join():
    kind = kind_of("citrus", CITRUS)
    with pytest.raises(ConfigError, match=r"cache\.kind=single reads a prompt for a question; give question=TEXT"):
        read(model_of(), kind, tokens_of(40))
    with pytest.raises(ConfigError, match="different lengths, are read apart, and cannot be put together"):
        read(mixed(Flash, SparseFlash), kind, tokens_of(40, 20), tokens_of(3)[0])


@pytest.mark.parametrize("name", ["exact", "h2o", "snapkv", "sink_recent"])
def test_a_question_is_read_behind_the_compressed_prompt(name):
    settings = {"snapkv": {"budget": 9, "window": 4}, "sink_recent": {"start": 2, "recent": 9}}.get(name)
    model, kind = model_of(), kind_of(name, settings)
    prompts, question = tokens_of(30, 17), tokens_of(5)[0]
    session = read(model, kind, prompts, question)
    other = read(model, kind, prompts)
    wanted = steps(other, question.expand(2, -1))
    if name == "h2o":  # a piece drops tokens at its end
        assert session.logits.shape == other.logits.shape
    else:
        torch.testing.assert_close(session.logits, wanted[:, -1], rtol=0, atol=1e-10)
    for cache in caches(session.state):
        assert cache.length == 35


@pytest.mark.parametrize("layers", [(Flash,), (Flash, GLA)], ids=["flash", "gla"])
def test_lookahead_chooses_and_is_forgotten(layers):
    model, more = mixed(*layers), torch.stack(tokens_of(5, 5, 5))
    prompts, ahead = tokens_of(33, 1, 20), torch.stack(tokens_of(7, 7, 7))
    roomy = read(model, kind_of("speckv", {"budget": 64}), prompts, None, ahead)
    exact = read(model, None, prompts)
    torch.testing.assert_close(steps(roomy, more), steps(exact, more), rtol=0, atol=1e-10)
    kind = kind_of("speckv", {"budget": 9, "window": 4, "pool": 3})
    together = read(model, kind, prompts, None, ahead)
    first, later = together.logits, steps(together, more)
    for row, prompt in enumerate(prompts):
        alone = read(model, kind, [prompt], None, ahead[row : row + 1])
        torch.testing.assert_close(first[row], alone.logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(later[row], steps(alone, more[row : row + 1])[0], rtol=0, atol=1e-10)
    others = read(model, kind, prompts, None, (ahead + 1) % 30)
    assert not torch.equal(others.logits[0], first[0])
    assert all(cache.length == 33 for cache in caches(others.state))


def test_a_draft_writes_its_likeliest_tokens():
    model = model_of()
    prompts = tokens_of(12, 7)
    found = continuation(read(model, None, prompts), 5)
    for row, prompt in enumerate(prompts):
        text = prompt
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat((text, model.logits(model(text[None]).hidden[0, -1:]).argmax(-1)))
        assert found[row].tolist() == text[len(prompt) :].tolist()


def test_pieces_of_a_kind_are_counted_from_the_end_of_a_prompt():
    model, kind = model_of(), kind_of("h2o", {"budget": 9, "recent": 4, "when": "piece", "piece": 6})
    prompts = tokens_of(25, 14)
    together = read(model, kind, prompts)
    for row, prompt in enumerate(prompts):
        alone = read(model, kind, [prompt])
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=0, atol=1e-10)
