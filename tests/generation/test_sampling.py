"""Sampling: the filters token by token, the smallest and largest settings, and scores that are no numbers."""

import math

import pytest
import torch

from longmix.errors import ConfigError, NonFiniteError
from longmix.generation.sampling import Sampling


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


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, -1)
    sampling = Sampling(temperature=0.5)
    draws = [sampling.draw(logits, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    shares = draws[0].bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.0, 2.0, 4.0]).softmax(0), rtol=0, atol=0.03)
    assert (Sampling(temperature=0.0).draw(logits, torch.Generator()) == 2).all()


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
    scale = max(scale, 1e-8) if settings.get("temperature") == 1e-9 else scale  # far above the temperature
    logits = scale * torch.randn(50, 12, generator=torch.Generator().manual_seed(5)).clamp(-3, 3)
    if "temperature" not in settings:
        logits[:, 3] = logits[:, 8] = 3 * scale  # a tie: one of both, whichever it is
    drawn = Sampling(**settings).draw(logits, torch.Generator().manual_seed(0))
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
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_one_clear_error(wrong, temperature):
    logits = torch.zeros(3, 5)
    logits[1, 2] = wrong
    with pytest.raises(NonFiniteError, match="infinite or not a number in 1 of 3 rows") as caught:
        Sampling(temperature).draw(logits, torch.Generator())
    assert caught.value.exit_code == 3
