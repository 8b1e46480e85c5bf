"""Sampling: the filters token by token, the smallest and largest settings, and scores that are no numbers."""

import math

import pytest
import torch

from longmix.config import LARGEST_SEED
from longmix.errors import ConfigError, NonFiniteError
from longmix.generation.draws import forked, key_of, uniforms
from longmix.generation.sampling import Sampling, check_finite


def plain_probabilities(logits: list[float], top_k: int | None, top_p: float, min_p: float) -> list[float]:
    """The filters one after the other, token by token."""
    kept = {i: torch.tensor(x, dtype=torch.float64).exp().item() for i, x in enumerate(logits)}

    def shares() -> dict[int, float]:
        return {i: x / sum(kept.values()) for i, x in kept.items()}

    def largest() -> list[int]:
        return sorted(kept, key=lambda i: -kept[i])

    kept = {i: kept[i] for i in largest()[:top_k]}
    total, nucleus = 0.0, []
    for i in largest():
        if total < top_p:
            nucleus.append(i)
        total += shares()[i]
    kept = {i: kept[i] for i in nucleus}
    least = min_p * max(shares().values())
    kept = {i: x for i, x in kept.items() if shares()[i] >= least}
    return [shares().get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_filters_keep_what_they_say(top_k, top_p, min_p):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    found = Sampling(0.7, top_k, top_p, min_p).probabilities(logits)
    for row in range(3):
        wanted = plain_probabilities((logits[row].double() / 0.7).tolist(), top_k, top_p, min_p)
        torch.testing.assert_close(found[row], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def numbers(count: int, key: int = 0) -> torch.Tensor:
    return uniforms([key] * count, list(range(count)))


def test_draws_follow_the_probabilities_and_the_key():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, -1)
    sampling = Sampling(temperature=0.5)
    draws = [sampling.draw(logits, numbers(4000, key)) for key in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    shares = draws[0].bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 2.0, 4.0]).softmax(0), rtol=0, atol=0.03)
    assert (Sampling(temperature=0.0).draw(logits, numbers(4000)) == 2).all()


def test_a_draw_is_the_token_in_whose_share_the_number_lies():
    logits = torch.randn(300, 9, generator=torch.Generator().manual_seed(7))
    sampling = Sampling(top_k=4)
    for number in (0.0, 0.25, 0.5, 1 - 2.0**-53):
        drawn = sampling.draw(logits, torch.full((300,), number, dtype=torch.float64))
        for row, token in zip(sampling.probabilities(logits).tolist(), drawn.tolist(), strict=True):
            assert row[token] > 0
            below = math.fsum(row[:token])
            assert below - 1e-12 <= number <= below + row[token] + 1e-12


def test_a_row_draws_alone_what_it_draws_among_others():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(8))
    keys, lengths = [key_of(3, [row, row + 1]) for row in range(64)], list(range(5, 69))
    for sampling in (Sampling(), Sampling(0.8, 20, 0.9, 0.01)):
        together = sampling.draw(logits, uniforms(keys, lengths))
        for row in range(0, 64, 7):
            one = sampling.draw(logits[row : row + 1], uniforms([keys[row]], [lengths[row]]))
            assert one[0] == together[row]


def test_random_numbers_are_even_and_those_of_other_rows_are_others():
    found = numbers(20000)
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() < 1
    torch.testing.assert_close(found.histc(20, 0, 1) / 20000, torch.full((20,), 0.05).double(), rtol=0, atol=0.006)
    assert abs(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1]) < 0.03
    keys = {key_of(seed, row) for seed in range(20) for row in ([], [1], [1, 0], [0, 1], [257])}
    assert len(keys) == 100 and all(0 <= key < 2**63 for key in keys)
    assert key_of(LARGEST_SEED, [5]) == key_of(LARGEST_SEED, [5])
    assert forked(7, 0) == 7 and len({forked(7, sample) for sample in range(50)}) == 50


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({"temperature": wrong}, "temperature") for wrong in (-1.0, -1e-320, math.nan, math.inf, -math.inf)),
        *(({"top_k": wrong}, "top_k") for wrong in (0, -1)),
        *(({"top_p": wrong}, "top_p") for wrong in (0.0, -0.1, 1.0001, math.nan, math.inf)),
        *(({"min_p": wrong}, "min_p") for wrong in (2.0, -1e-9, math.nan, -math.inf)),
    ],
)
def test_impossible_sampling_is_refused(settings, name):
    with pytest.raises(ConfigError, match=f"{name}="):
        Sampling(**settings)


GREEDY = (
    *({"temperature": smallest} for smallest in (0.0, 1e-10, 1e-300, 1e-308, 1e-320, 5e-324)),
    *({"top_k": 1}, {"top_p": 1e-9}, {"top_p": 5e-324}, {"temperature": 1e-9, "top_k": 10**9, "min_p": 0.5}),
)


@pytest.mark.parametrize("settings", GREEDY, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_the_smallest_settings_take_the_most_likely_token(settings, scale):
    scale = max(scale, 1e-6) if settings.get("temperature") == 1e-9 else scale  # far above the temperature
    logits = scale * torch.randn(50, 12, generator=torch.Generator().manual_seed(5)).clamp(-3, 3)
    if "temperature" not in settings:
        logits[:, 3] = logits[:, 8] = 3 * scale  # a tie: one of both, whichever it is
    drawn = Sampling(**settings).draw(logits, numbers(50))
    assert (logits.gather(1, drawn[:, None])[:, 0] == logits.amax(-1)).all()
    if "temperature" in settings:
        assert torch.equal(drawn, logits.argmax(-1))


def test_widest_settings_keep_everything_and_the_largest_share_alone_is_kept():
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(6))
    plain = Sampling().probabilities(logits)
    assert torch.equal(Sampling(top_k=13, top_p=1.0, min_p=0.0).probabilities(logits), plain)
    assert torch.equal(Sampling(min_p=1.0).probabilities(logits), (logits == logits.amax(-1, keepdim=True)).double())
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert (Sampling(top_k=2).probabilities(tied) > 0).sum() == 2
    assert (Sampling(temperature=1e300).probabilities(logits) - 1 / 12).abs().max() < 1e-15


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_one_clear_error(wrong):
    logits = torch.zeros(3, 5)
    logits[1, 2] = wrong
    with pytest.raises(NonFiniteError, match="infinite or not a number in 1 of 3 rows") as caught:
        check_finite(logits)
    assert caught.value.exit_code == 3
