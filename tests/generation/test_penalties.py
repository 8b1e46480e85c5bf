"""Penalties against transformers and against the formulas of OpenAI's interface; biases by id and by text."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from longmix.data.tokens.tokenizers import ByteTokenizer, NumberTokenizer
from longmix.errors import ConfigError
from longmix.generation.biases import biases
from longmix.generation.penalties import Penalties, TokenCounts

VOCABULARY = 30


@pytest.fixture
def rows() -> torch.Tensor:
    """Tokens of three rows, of which the first five are the prompt."""
    return torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))


def counts_of(rows: torch.Tensor, prompt: int = 5) -> TokenCounts:
    return TokenCounts(rows.tolist(), [prompt] * len(rows), VOCABULARY, "cpu")


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repetition_is_that_of_transformers(rows, logits, penalty, dtype):
    logits = logits.to(dtype)
    for length in (5, 6, 40):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(rows[:, :length], logits.clone())
        assert torch.equal(Penalties(repetition=penalty).applied(logits, counts_of(rows[:, :length])), wanted)


def test_presence_and_frequency_are_those_of_openai(rows, logits):
    """mu[j] -> mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, c counting what was sampled."""
    found = Penalties(presence=0.6, frequency=-0.25).applied(logits.double(), counts_of(rows))
    for row in range(3):
        sampled = rows[row, 5:].tolist()
        for token in range(VOCABULARY):
            count = sampled.count(token)
            wanted = logits[row, token].item() - count * -0.25 - (count > 0) * 0.6
            assert found[row, token].item() == pytest.approx(wanted, abs=1e-12, rel=0)
    assert torch.equal(Penalties(presence=2, frequency=1).applied(logits, counts_of(rows[:, :5])), logits)


def test_a_bias_is_that_of_transformers(rows, logits):
    bias = {3: -100.0, 0: 2.5, 29: 1e6}
    wanted = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(rows, logits.clone())
    assert torch.equal(Penalties(bias=bias).applied(logits, None), wanted)
    assert torch.equal(Penalties().applied(logits, None), logits)


def test_the_order_is_bias_repetition_frequency_presence(rows, logits):
    bias = {token: (-1.0) ** token * 3 for token in range(VOCABULARY)}
    biased = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(rows, logits.double())
    punished = RepetitionPenaltyLogitsProcessor(1.7)(rows, biased)
    counts = torch.stack([row[5:].bincount(minlength=VOCABULARY) for row in rows]).double()
    wanted = punished - 0.3 * counts - 0.9 * (counts > 0).double()
    before = logits.double()
    found = Penalties(1.7, 0.9, 0.3, bias).applied(before, counts_of(rows))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert torch.equal(before, logits.double())


def test_counts_grow_token_by_token_to_those_of_the_whole(rows):
    grown = counts_of(rows[:, :7])
    for step in range(7, 40):
        grown.add(rows[:, step])
    whole = counts_of(rows)
    assert torch.equal(grown.seen, whole.seen) and torch.equal(grown.generated, whole.generated)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({"repetition": wrong}, "repetition_penalty") for wrong in (0.0, -1.0, math.nan, math.inf, 1e7)),
        *(({"presence": wrong}, "presence_penalty") for wrong in (math.nan, -math.inf, 1e7)),
        *(({"frequency": wrong}, "frequency_penalty") for wrong in (math.nan, math.inf, -1e7)),
        *(({"bias": {3: wrong}}, "logit_bias of token 3") for wrong in (math.nan, -math.inf, 1e7)),
    ],
)
def test_impossible_penalties_are_refused(settings, name):
    with pytest.raises(ConfigError, match=f"{name}.* must be from"):
        Penalties(**settings)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {}),
        ("{}", {}),
        ("{ }", {}),
        ({65: 1, "B": -2.5}, {65: 1.0, 66: -2.5}),
        ('{65:1,"B":-2.5}', {65: 1.0, 66: -2.5}),
        ('{"65": 1, B: -2.5}', {65: 1.0, 66: -2.5}),
        ('{\' \':3,",":4,::5,"\\n":6}', {32: 3.0, 44: 4.0, 58: 5.0, 10: 6.0}),
        ({65: 1.0, "A": 2.0}, {65: 3.0}),
        ("{65:1,A:2e1}", {65: 21.0}),
        ({256: -100}, {256: -100.0}),
    ],
)
def test_biases_are_of_ids_and_of_texts_of_one_token(given, wanted):
    assert biases(given, ByteTokenizer(), 257) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("65:1", "logit_bias=65:1 is no mapping; write it like"),
        ("{65}", "'65' lacks a number; write it like"),
        ("{65:x}", "'65:x' lacks a number"),
        ({65: "1"}, "logit_bias of 65 is '1', which is no number"),
        ({65: True}, "is True, which is no number"),
        ({True: 1}, "True is no token"),
        ({257: 1}, "257 is not among the ids, 0 to 256"),
        ({-1: 1}, "-1 is not among the ids"),
        ("{" + "9" * 5000 + ":1}", "is not among the ids"),
        ({"the": 1}, r"the text 'the' is 3 tokens, \[116, 104, 101\]; give a text of one token, or ids"),
        ({"": 1}, "the text '' is no token"),
        ({"\ud800": 1}, "is no text of this model's tokenizer"),
    ],
)
def test_biases_that_mean_no_token_are_refused(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        biases(given, ByteTokenizer(), 257)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="'x' is not a token"):
        biases({"x": 1}, NumberTokenizer(9), 9)
