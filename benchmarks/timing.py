"""Measuring calls against each other: warm-up, interleaved repetitions, and the memory that each takes at its peak."""

import functools
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEAST_ROUNDS = 3
MOST_ROUNDS = 200
SHORT_SECONDS = 1.0
"""A first call shorter than this is repeated before anything counts."""

# Several times the L2 cache of any GPU so far.
_FLUSH_BYTES = 256 << 20

Call = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        seconds: of each repetition; empty if it was not timed.
        peak_bytes: the most that torch's allocator had handed out to it at once, its results included.
        note: why it was not timed.
        call_seconds: of one call; known also for a call that took too long to be repeated.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    note: str = ""
    call_seconds: float | None = None

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    def quartiles(self) -> tuple[float, float]:
        """The first and the third, seconds; there must be two repetitions."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class CpuClock:
    """Times calls on the CPU."""

    def start(self, call: Call) -> float:
        """Run a call; `seconds` reads the lap that this returns."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def seconds(self, lap: Any) -> float:
        """Seconds of a lap."""
        return lap

    def peak_bytes(self, call: Call) -> int:
        """Peak of what torch's CPU allocator holds for a call; the scratch space of MKL and oneDNN is not in it.

        Where a call throws old entries out of a cache, torch warns once that it does not know their size.
        """
        # The profiler reports on itself otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        # What earlier calls left in reference cycles would be counted as given back by this one.
        gc.collect()
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        assert profile.profiler is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def recover(self) -> None:
        """Clean up after a call that failed."""


class CudaClock:
    """Times calls on a CUDA device by events, each call with an empty L2 cache.

    Laps are read once a round of calls is queued, so that launching the next one hides behind the one that runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def start(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queue a call; `seconds` reads the lap that this returns."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def seconds(self, lap: Any) -> float:
        """Seconds of a lap, once it is over."""
        begin, end = lap
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Call) -> int:
        """Peak of what torch's CUDA allocator holds for a call, above what was there before."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def recover(self) -> None:
        """Clean up after a call that failed."""
        torch.cuda.empty_cache()


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """Return the clock that times calls on a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    seconds: float,
    limit: float,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, Outcome]:
    """Time calls in turns, so that a noisy moment hits all of them.

    Each takes part in every round until it has been timed for `seconds`, and at least `LEAST_ROUNDS` times. A call that
    fails, or takes more than `limit` seconds, is left out with a note, and the others go on.

    Args:
        calls: what to time, by name.
        clock: of the device that the calls run on.
        seconds: how long to time each call, in sum.
        limit: most seconds that one call may take.
        announce: told the name of each call before it is made ready, and of the rounds before they begin.
    """
    outcomes: dict[str, Outcome] = {}
    for name, call in calls.items():
        announce(name)
        outcomes[name] = _ready(call, clock, limit)
    ready = {name: call for name, call in calls.items() if not outcomes[name].note}
    announce("timing")
    laps, notes = _rounds(ready, clock, seconds)
    for name in ready:
        peak = outcomes[name].peak_bytes
        outcomes[name] = (
            Outcome(note=notes[name])
            if name in notes
            else Outcome(tuple(laps[name]), peak, call_seconds=statistics.median(laps[name]))
        )
    return outcomes


def predict(history: Sequence[tuple[float, float]], work: float) -> float:
    """Seconds that a call is going to take, from work and seconds of smaller ones; 0 if there were none.

    Small calls are slow for their work, so the last two tell how time grows; it does not grow faster than the work.
    """
    if not history:
        return 0.0
    last_work, last_seconds = history[-1]
    exponent = 1.0
    if len(history) > 1 and history[-2][0] < last_work:
        earlier_work, earlier_seconds = history[-2]
        exponent = math.log(last_seconds / earlier_seconds) / math.log(last_work / earlier_work)
    return last_seconds * (work / last_work) ** min(max(exponent, 0.0), 1.0)


def reason(error: Exception) -> str:
    """Say in one short line why a call failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "failed: out of memory"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"failed: {type(error).__name__}: {text}"[:200]


def _ready(call: Call, clock: Clock, limit: float) -> Outcome:
    """Warm up and measure memory."""
    try:
        took = _once(call, clock)
        # The first call may compile, so neither a short nor a long one tells how long the next one takes.
        if took < SHORT_SECONDS or took > limit:
            took = _once(call, clock)
        if took > limit:
            return Outcome(note=f"skipped: one call took {took:.3g} s, more than --limit {limit:g}", call_seconds=took)
        return Outcome(peak_bytes=clock.peak_bytes(call))
    except Exception as error:
        outcome = Outcome(note=reason(error))
    clock.recover()
    return outcome


def _once(call: Call, clock: Clock) -> float:
    return clock.seconds(clock.start(call))


def _rounds(calls: Mapping[str, Call], clock: Clock, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each repetition, and notes on calls that failed after all."""
    laps: dict[str, list[float]] = {name: [] for name in calls}
    notes: dict[str, str] = {}
    shuffle = random.Random(0).shuffle
    for done in range(MOST_ROUNDS):
        turn = [n for n in calls if n not in notes and (done < LEAST_ROUNDS or sum(laps[n]) < seconds)]
        if not turn:
            break
        # No call always finds the caches as the same other call left them.
        shuffle(turn)
        started = _attempt({name: functools.partial(clock.start, calls[name]) for name in turn}, notes)
        read = _attempt({name: functools.partial(clock.seconds, lap) for name, lap in started.items()}, notes)
        for name, took in read.items():
            laps[name].append(took)
    return laps, notes


def _attempt(steps: Mapping[str, Call], notes: dict[str, str]) -> dict[str, Any]:
    """Results of the steps that succeed; the others are noted."""
    results = {}
    for name, step in steps.items():
        try:
            results[name] = step()
        except Exception as error:
            notes[name] = reason(error)
    return results
