"""Dropout of the embedding, of branches and of attention weights, in training alone."""

import functools

import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.attention_dropout import dropped_attention
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.backbone import LanguageModel
from longmix.training import random_state
from longmix_kernels.attention import attention

SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48}
IDS = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7], dtype=torch.int32)
DROPPED = {"embedding_dropout": 0.3, "residual_dropout": 0.3}


def model(mixer=Flash, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(mixer, 20, **{**SIZES, **options})


def losses_and_gradient(net: LanguageModel, ids=None, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    losses = net(tokens, tokens, document_ids=ids).token_losses
    gradients = torch.autograd.grad(losses.sum(), list(net.parameters()))
    return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [16, 6])
def test_the_weights_that_stay_are_those_of_attention_and_scaled(queries, window, ids, kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, 4, 16, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 16, kv_heads, 16, generator=generator, dtype=torch.float64)
    value = torch.eye(16, dtype=torch.float64)[None, :, None].expand(2, 16, kv_heads, 16)  # reads are the weights
    exact = attention(query, key, value, window=window, document_ids=ids)
    rows = Rows(query, key, value, ids)
    torch.testing.assert_close(dropped_attention(rows, 0.0, window), exact, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    dropped = dropped_attention(rows, 0.4, window)
    stayed = dropped != 0
    torch.testing.assert_close(dropped[stayed], exact[stayed] / 0.6, rtol=1e-12, atol=0)
    visible = exact > 0
    assert not (stayed & ~visible).any()
    assert stayed.sum() / visible.sum() == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("mixer", [Flash, functools.partial(SlidingWindow, window=4)])
def test_training_draws_and_evaluation_does_not(mixer):
    plain, dropped = model(mixer), model(functools.partial(mixer, attention_dropout=0.3), **DROPPED)
    assert dropped.draws() and not plain.draws()
    assert plain.state_dict().keys() == dropped.state_dict().keys()
    for ids in (None, IDS):
        first, again = losses_and_gradient(dropped, ids), losses_and_gradient(dropped, ids)
        other = losses_and_gradient(dropped, ids, seed=6)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
        assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))
        evaluated = [losses_and_gradient(net.eval(), ids) for net in (plain, dropped)]
        assert all(torch.equal(*pair) for pair in zip(*evaluated, strict=True))
        dropped.train()


@pytest.mark.parametrize(
    "where",
    [
        {"embedding_dropout": 0.3},
        {"residual_dropout": 0.3},
        {"mixer": functools.partial(Flash, attention_dropout=0.3)},
    ],
)
def test_each_word_alone_draws_and_recomputed_blocks_draw_the_same(where):
    kept, again = (model(**where, activation_checkpointing=kind) for kind in ("none", "block"))
    before = torch.get_rng_state()
    found = losses_and_gradient(kept, IDS)
    assert not torch.equal(found[0], losses_and_gradient(model(), IDS)[0])
    recomputed = losses_and_gradient(again, IDS)
    assert all(torch.equal(*pair) for pair in zip(found, recomputed, strict=True))
    assert not torch.equal(before, torch.get_rng_state())


def test_processes_draw_other_masks_and_shares_have_bounds():
    def drawn(rank: int, step: int = 0) -> torch.Tensor:
        torch.manual_seed(3)
        random_state.diverge(3, rank, step)
        return torch.rand(4)

    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn(0))  # the first process, and a run of one, as without
    draws = [drawn(0), drawn(1), drawn(2), drawn(1, step=7)]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    for options, word in [
        ({"embedding_dropout": 1.0}, r"model\.embedding_dropout=1\.0 must be at least 0 and below 1"),
        ({"residual_dropout": -0.1}, r"model\.residual_dropout=-0\.1"),
        ({"mixer": functools.partial(Flash, attention_dropout=2.0)}, r"mixer\.attention_dropout=2\.0"),
    ]:
        with pytest.raises(ConfigError, match=word):
            model(**options)
