"""Bytes of many steps at once: for every mixer the sum of its single steps, and what several generations share."""

from pathlib import Path

import pytest
import torch

from longmix.analysis.cost_model import branches
from longmix.mixers.flash import Flash
from longmix.mixers.parts.step_sums import summed

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))

RANGES = ((1, 1), (1, 40), (3, 1), (7, 90), (63, 2), (200, 65), (515, 130))


def test_sums_are_those_of_every_number():
    for length in (0, 1, 5, 12, 40):
        for steps in (0, 1, 3, 30):
            numbers = range(length, length + steps)
            for size in (1, 3, 8):
                assert summed(length, steps, size) == sum(n // size for n in numbers)
                for most in (0, 1, 4, 100):
                    assert summed(length, steps, size, most) == sum(min(n // size, most) for n in numbers)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_many_steps_are_those_of_every_step(small_model, name):
    for part in branches(small_model(name, dtype=torch.bfloat16)):
        for length, steps in RANGES:
            wanted = sum(part.step_bytes(length + step) for step in range(steps))
            assert part.decoding_bytes(length, steps) == wanted, (length, steps)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "words",
    [
        ("flash", "mixer.num_kv_heads=2", "mixer.bias=low_rank"),
        ("fox",),
        ("sliding_window", "mixer.dilation=[1,3]"),
        ("moba", "mixer.block=5", "mixer.top_k=3"),
        ("nsa", "mixer.window=9"),
        ("sparsek", "mixer.keep=11"),
        ("scatterbrain", "mixer.summaries=true", "mixer.num_features=0"),
        ("scatterbrain_content", "mixer.window=3"),
        ("tensor", "mixer.window_1=3", "mixer.window_2=17"),
        ("sparse_flash", "mixer.rounds=2"),
        ("sliding_window*1+rwkv7",),
    ],
    ids=" ".join,
)
def test_the_same_with_other_settings(small_model, words):
    test_bytes_of_many_steps_are_those_of_every_step(lambda name, dtype: small_model(*words, dtype=dtype), words[0])


@pytest.mark.parametrize("name", ["sparsek", "scatterbrain", "scatterbrain_content"])
def test_counts_of_a_context_of_any_length_take_no_time(small_model, name):
    (mixer, *_) = small_model(name).mixers()
    assert mixer.step_bytes(2**40) > 0 and mixer.flops(2**40) > 0


def test_a_mixer_with_its_own_step_is_summed_step_by_step(small_model):
    class Odd(Flash):
        def step_bytes(self, length):
            return length**2

    (mixer, *_) = small_model("flash").mixers()
    odd = Odd.__new__(Odd)
    odd.__dict__ = mixer.__dict__
    assert odd.decoding_bytes(3, 3) == 9 + 16 + 25


@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_window_shares_what_is_left_of_the_prompt_in_it(small_model, window):
    (mixer, *_) = small_model("sliding_window", f"mixer.window={window}", dtype=torch.bfloat16).mixers()
    row = mixer.num_kv_heads * mixer.row_bytes()
    for prompt in (1, 4, 5, 30, 100):
        for steps in (1, 3, 40, 200):
            keys = 0
            for own in range(prompt, prompt + steps):
                keys += len(set(range(prompt)) & set(range(own - mixer.window + 1, own + 1)))
            assert mixer.shared_bytes(prompt, steps) == keys * row


def test_all_of_the_prompt_is_shared_by_flash_and_nothing_by_states(small_model):
    (mixer, *_) = small_model("flash").mixers()
    assert mixer.shared_bytes(10, 3) == 3 * mixer.state_bytes(10)
    for name in ("rwkv7", "sparse_flash", "moba"):
        assert small_model(name).mixers()[0].shared_bytes(10, 3) == 0
    (gaps, *_) = small_model("sliding_window", "mixer.dilation=2").mixers()
    assert gaps.shared_bytes(10, 3) == 0
