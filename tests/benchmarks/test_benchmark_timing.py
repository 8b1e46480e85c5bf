"""How benchmarks measure."""

import gc

import pytest
import torch

from benchmarks import timing


class FakeClock(timing.CpuClock):
    """Calls return the seconds they take."""

    def start(self, call):
        return call()

    def peak_bytes(self, call):
        call()
        return 7


def measured(calls, seconds=1.0, limit=10.0):
    return timing.measure(calls, FakeClock(), seconds=seconds, limit=limit)


def test_calls_take_turns_until_each_had_its_time():
    made = []
    calls = {name: lambda name=name, took=took: (made.append(name), took)[1] for name, took in (("a", 0.2), ("b", 5.0))}
    outcomes = measured(calls)
    assert outcomes["a"].seconds == (0.2,) * 5
    assert outcomes["b"].seconds == (5.0,) * timing.LEAST_ROUNDS
    assert (outcomes["a"].median, outcomes["a"].peak_bytes, outcomes["a"].note) == (0.2, 7, "")
    rounds = made[len(made) - 8 :]
    for begin in range(0, 2 * timing.LEAST_ROUNDS, 2):
        assert set(rounds[begin : begin + 2]) == {"a", "b"}


def test_quartiles():
    assert timing.Outcome((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles() == (2.0, 4.0)


def test_a_call_that_fails_is_noted_and_the_others_go_on():
    turns = iter([0.1] * 4)

    def later():
        try:
            return next(turns)
        except StopIteration:
            raise RuntimeError("no more\nof this") from None

    def at_once():
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    outcomes = measured({"later": later, "at once": at_once, "well": lambda: 0.5})
    assert outcomes["later"] == timing.Outcome(note="failed: RuntimeError: no more")
    assert outcomes["at once"] == timing.Outcome(note="failed: out of memory")
    assert outcomes["well"].seconds == (0.5,) * timing.LEAST_ROUNDS


def test_a_call_that_takes_too_long_is_made_twice_because_the_first_may_compile():
    made = {"slow": 0, "compiled": 0}

    def slow():
        made["slow"] += 1
        return 20.0

    def compiled():
        made["compiled"] += 1
        return 20.0 if made["compiled"] == 1 else 0.5

    outcomes = measured({"slow": slow, "compiled": compiled})
    assert made["slow"] == 2
    assert outcomes["slow"].note == "skipped: one call took 20 s, more than --limit 10"
    assert outcomes["slow"].call_seconds == 20.0
    assert outcomes["compiled"].seconds == (0.5,) * timing.LEAST_ROUNDS


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 12.0),
        ([(1.0, 3.0), (4.0, 6.0)], 6.0),
        ([(1.0, 3.0), (2.0, 6.0)], 12.0),
        ([(1.0, 1.0), (2.0, 8.0)], 16.0),
        ([(1.0, 3.0), (2.0, 2.0)], 2.0),
    ],
)
def test_prediction(history, expected):
    assert timing.predict(history, 4.0) == pytest.approx(expected)


@pytest.mark.slow
def test_peak_memory_counts_what_is_held_at_once():
    mebi = torch.empty(1 << 20, dtype=torch.uint8)

    def call():
        first = torch.cat([mebi] * 3)
        del first
        held = torch.cat([mebi] * 2)
        return held, torch.cat([mebi] * 2)

    assert timing.CpuClock().peak_bytes(call) == pytest.approx(4 << 20, rel=0.01)


@pytest.mark.slow
def test_peak_memory_is_not_lowered_by_what_earlier_calls_left_in_cycles(request):
    def call():
        gc.collect()
        kept = [torch.ones(1 << 20, dtype=torch.uint8)]
        kept.append(kept)

    request.addfinalizer(gc.enable)
    gc.disable()
    assert [timing.CpuClock().peak_bytes(call) for _ in range(3)] == pytest.approx([1 << 20] * 3, rel=0.01)
