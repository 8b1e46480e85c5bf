"""Providers of one operation, measured side by side on one shape after the other.

What a shape is, and what providers do with it, is the benchmark's matter; here it has a `length` and a `dim`.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import timing
from benchmarks.command import progress
from benchmarks.results import Record

FORWARD, TRAINING = "fwd", "fwd+bwd"
PASSES = (FORWARD, TRAINING)

Announce = Callable[[str], None]


class Sized(Protocol):
    """A shape, as far as records name it."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    @property
    def dim(self) -> int:
        """Columns of a head."""

    @property
    def batch(self) -> int:
        """Sequences."""

    @property
    def heads(self) -> int:
        """Heads of a token."""


@dataclass(frozen=True)
class Workload:
    """A provider made ready for a shape.

    Attributes:
        calls: by pass.
        flops: floating-point operations of its mathematics, by pass.
        parts: parts of the calls to be timed on their own, by the column that their median gets, in ms.
        columns: what else is to be recorded.
        bytes: what has to be moved, by pass, where that is counted.
    """

    calls: Mapping[str, timing.Call]
    flops: Mapping[str, float]
    parts: Mapping[str, timing.Call] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """An implementation to time.

    Attributes:
        name: in the table.
        build: makes it ready for a shape.
        missing: why it cannot run on a device at all; empty if it can.
        refuses: why it does not do a pass of a shape; empty if it does.
    """

    name: str
    build: Callable[[Any], Workload]
    missing: Callable[[torch.device], str] = lambda device: ""
    refuses: Callable[[Any, str], str] = lambda shape, direction: ""


def both_passes(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, timing.Call]:
    """Calls of a function's forward pass, and of forward and backward with the gradients of all inputs.

    Args:
        function: takes `inputs`.
        grad: gradient of its result.
        context: what to run each call in, the backward pass included.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> None:
        with torch.no_grad(), context():
            function(*inputs)

    def training() -> None:
        with context():
            torch.autograd.grad(function(*leaves), leaves, grad)

    return {FORWARD: forward, TRAINING: training}


@dataclass
class Comparison:
    """One run, as far as it has come.

    Attributes:
        providers: those that can run on the device.
        clock: of the device.
        seconds: how long to time a call, in sum.
        limit: most seconds that one call may take; what takes longer is skipped.
        peak_flops: peak rate of the device, if known.
        peak_bytes: the same for its memory.
        records: the measurements.
    """

    providers: Sequence[Provider]
    clock: timing.Clock
    seconds: float
    limit: float
    peak_flops: float | None = None
    peak_bytes: float | None = None
    records: list[Record] = field(default_factory=list)
    _costs: dict[tuple[str, str, int], list[tuple[float, float]]] = field(default_factory=dict)
    """FLOPs and seconds of the calls so far, by provider, pass and dim."""

    def compare(self, shape: Sized, passes: Sequence[str], announce: Announce) -> Iterator[str]:
        """Measure all providers on one shape, pass by pass; yields what is done."""
        built = {provider.name: self._build(provider, shape, passes) for provider in self.providers}
        for direction in passes:
            where = f"T = {shape.length}, d{shape.dim}, {direction}"
            self._compare_pass(shape, direction, built, _prefixed(announce, where))
            yield where

    def _build(self, provider: Provider, shape: Sized, passes: Sequence[str]) -> Workload | str:
        """A workload, or why there is none."""
        refusals = [provider.refuses(shape, direction) for direction in passes]
        if all(refusals):
            return refusals[0]
        try:
            return provider.build(shape)
        except Exception as error:
            return timing.reason(error)

    def _compare_pass(
        self, shape: Sized, direction: str, built: Mapping[str, Workload | str], announce: Announce
    ) -> None:
        notes, calls = {}, {}
        for provider in self.providers:
            name, workload = provider.name, built[provider.name]
            if isinstance(workload, str):
                notes[name] = workload
                continue
            notes[name] = provider.refuses(shape, direction) or self._too_long(name, shape, direction, workload)
            if not notes[name]:
                calls[name] = workload.calls[direction]
                calls |= {f"{name}, {column}": call for column, call in workload.parts.items()}
        outcomes = timing.measure(calls, self.clock, seconds=self.seconds, limit=self.limit, announce=announce)
        for name, workload in built.items():
            outcome = outcomes.get(name) or timing.Outcome(note=notes[name])
            about = {"provider": name, "pass": direction, "dim": shape.dim, "length": shape.length}
            sizes = {"batch": shape.batch, "heads": shape.heads}
            sizes |= {"tokens": shape.batch * shape.length, "columns": shape.heads * shape.dim}
            record = about | sizes | _times(outcome)
            if isinstance(workload, Workload):
                parts = {column: outcomes.get(f"{name}, {column}") for column in workload.parts}
                record |= {column: _milliseconds(part.median) for column, part in parts.items() if part}
                record |= workload.columns
                record |= self._rates(name, shape, direction, workload, outcome)
            self.records.append(record)

    def _too_long(self, name: str, shape: Sized, direction: str, workload: Workload) -> str:
        """Why not to make a call that would take too long, as an earlier one tells; empty if it would not."""
        predicted = timing.predict(self._costs.get((name, direction, shape.dim), []), workload.flops[direction])
        if predicted <= self.limit:
            return ""
        return f"skipped: one call would take about {predicted:.3g} s, more than --limit {self.limit:g}"

    def _rates(self, name: str, shape: Sized, direction: str, workload: Workload, outcome: timing.Outcome) -> Record:
        flops = workload.flops[direction]
        if outcome.call_seconds is not None:
            self._costs.setdefault((name, direction, shape.dim), []).append((flops, outcome.call_seconds))
        rate = flops / outcome.median if outcome.median is not None else None
        rates: Record = {
            "gflop": flops / 1e9,
            "tflops": rate and rate / 1e12,
            "of_peak": rate and self.peak_flops and rate / self.peak_flops,
        }
        if direction in workload.bytes:
            moved, share = workload.bytes[direction], None
            if outcome.median is not None and self.peak_flops and self.peak_bytes:
                share = max(moved / self.peak_bytes, flops / self.peak_flops) / outcome.median
            rates |= {"moved_gb": moved / 1e9, "of_roofline": share}
        return rates


def carry_out(
    run: Comparison,
    shapes: Iterable[Sized],
    steps: int,
    passes: Sequence[str],
    missing: Mapping[str, str],
    save: Callable[[], Path],
    report: Callable[[Path, Record], str],
) -> int:
    """Measure, write and print; 1 if nothing could be measured.

    Args:
        run: what to carry out.
        shapes: made one at a time, so that only one has its tensors.
        steps: how many shapes times passes there are.
        passes: of each shape.
        missing: why providers were left out.
        save: writes the JSON of the run as far as it has come, and returns its path.
        report: writes table and picture beside it, and returns the table.
    """
    path = save()
    with progress(steps) as (announce, finish):
        try:
            for shape in shapes:
                for done in run.compare(shape, passes, announce):
                    save()
                    finish(done)
        except KeyboardInterrupt:
            finish("interrupted; what follows was measured before")
    content = json.loads(path.read_text(encoding="utf-8"))
    if all(record["median_ms"] is None for record in run.records):
        reasons = {record["note"] for record in run.records} | {f"{name} {why}" for name, why in missing.items()}
        print("nothing was measured:", *sorted(reasons), sep="\n", file=sys.stderr)
        return 1
    print(report(path, content))
    print(f"written: {path} and the same as .txt and .png")
    return 0


def _times(outcome: timing.Outcome) -> Record:
    low, high = outcome.quartiles() if outcome.seconds else (None, None)
    return {
        "median_ms": _milliseconds(outcome.median),
        "least_ms": _milliseconds(min(outcome.seconds, default=None)),
        "low_ms": _milliseconds(low),
        "high_ms": _milliseconds(high),
        "repetitions": len(outcome.seconds),
        "peak_mib": None if outcome.peak_bytes is None else outcome.peak_bytes / 2**20,
        "note": outcome.note,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _prefixed(announce: Announce, where: str) -> Announce:
    return lambda what: announce(f"{where}: {what}")
