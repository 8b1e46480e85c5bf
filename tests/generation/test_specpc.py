"""`shorten=specpc`: against the authors' scores and choices, and through a draft."""

import pytest
import torch

from longmix.analysis.effective_attention import mixing
from longmix.errors import ConfigError
from longmix.generation.prompts import continuation
from longmix.generation.session import Session
from longmix.generation.specpc import SpecPC
from longmix.mixers.flash import Flash
from longmix.mixers.gla import GLA
from longmix.mixers.sliding_window import SlidingWindow
from tests.caches.direct import case
from tests.caches.test_caches import model_of, tokens_of


@pytest.mark.parametrize("number", [0, 1])
def test_scores_and_chooses_as_the_authors_do(number):
    given = case("specpc", number)
    names = {"window": "window", "budget": "capacity", "pool": "kernel", "neighbours": "neighbours"}
    names |= {"first_layer": "first_layer", "lookahead": "lookahead"}
    settings = SpecPC(**{ours: int(given[theirs]) for ours, theirs in names.items()})
    length, end = int(given["length"]), int(given["length"]) + settings.lookahead - 1
    found = []
    for layer in range(settings.first_layer, len(given["key"])):
        # the authors' first step is that of the prompt itself
        query = (
            given["prompt_query"][layer, :, :, length - settings.window :],
            given["lookahead_query"][layer, :, :, 1:],
        )
        found.append(settings.of_attention(torch.cat(query, 2).transpose(1, 2), given["key"][layer, :, :, :end]))
    score = torch.stack(found).amax(0)[0, :length]
    torch.testing.assert_close(score, given["score"], rtol=0, atol=1e-6)
    # pooling makes equals, which the authors leave to topk, and we take in their order
    order = settings.pooled(given["score"]).topk(settings.budget).indices
    assert settings.filled(order, length).tolist() == given["kept"].tolist()


@pytest.mark.parametrize("pool", [1, 4, 5])
def test_chooses_as_a_list_that_fills_up(pool):
    score = torch.rand(50, generator=torch.Generator().manual_seed(pool)).double()
    settings = SpecPC(budget=20, window=6, pool=pool, neighbours=3)
    left = (pool - 1) // 2
    pooled = [max(score[max(0, j - left) : j - left + pool].tolist()) for j in range(50)]
    kept = list(range(44, 50))
    for j in sorted(range(50), key=lambda j: -pooled[j]):
        for near in (j, j - 1, j + 1):
            if 0 <= near < 50 and near not in kept and len(kept) < 20:
                kept.append(near)
    assert settings.chosen(score).tolist() == sorted(kept)


def weights_of(model, layer, tokens):
    """The attention weights [Hq, T, T] of a layer in a full pass, from its own projections."""
    inputs = []
    mixer = model.mixers()[layer]
    handle = mixer.register_forward_pre_hook(lambda _, given, named: inputs.append((given, named)), with_kwargs=True)
    with torch.no_grad():
        model(tokens[None])
    handle.remove()
    given, named = inputs[0]
    with torch.no_grad():
        return mixing(mixer, *given, **named).matrix()[0]


@pytest.mark.parametrize("first_layer", [0, 1])
def test_a_draft_scores_prompts_of_any_length_as_alone(first_layer):
    draft, prompts = model_of(), tokens_of(40, 25, 9)
    settings = SpecPC(budget=12, window=4, pool=3, first_layer=first_layer, lookahead=3)
    kept = settings.shortened(draft, prompts)
    assert [len(x) for x in kept] == [12, 12, 9] and kept[2] is prompts[2]
    for prompt, found, score in zip(prompts[:2], kept, settings.scores(draft, prompts[:2]), strict=False):
        session = Session(draft, 1)
        session.prefill([prompt])
        written = continuation(session, 3)[0]
        text = torch.cat((prompt, written[:2]))
        share = torch.tensor([0, 1 / 3, 2 / 3, 1, 1, 1], dtype=torch.float64)
        wanted = torch.stack(
            [(weights_of(draft, layer, text)[:, -6:] * share[:, None]).amax((0, 1)) for layer in range(first_layer, 2)]
        ).amax(0)[: len(prompt)]
        torch.testing.assert_close(score, wanted, rtol=0, atol=1e-10)
        assert found.tolist() == prompt[settings.chosen(wanted)].tolist()
        assert found[-4:].tolist() == prompt[-4:].tolist()


def test_refuses_drafts_and_settings():
    settings = SpecPC(budget=12, window=4)
    for layer in (GLA, SlidingWindow):
        with pytest.raises(ConfigError, match="needs a draft with layers of softmax attention"):
            settings.shortened(model_of(layer), tokens_of(40))
    with pytest.raises(ConfigError, match="none from layer 2 on"):
        SpecPC(budget=12, window=4, first_layer=2).shortened(model_of(Flash), tokens_of(40))
    for name, value in (("window", 0), ("pool", 0), ("neighbours", 0), ("first_layer", -1), ("lookahead", 0)):
        with pytest.raises(ConfigError, match=rf"shorten\.{name}={value} must be at least"):
            SpecPC(**{name: value})
    with pytest.raises(ConfigError, match=r"shorten\.budget=9 must be at least 64, the window"):
        SpecPC(budget=9)
