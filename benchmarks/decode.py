"""What a generated token costs, beside transformers with the same weights: `python -m benchmarks.decode`.

A small model of softmax attention and its export to Llama's type read the same prompts and go on greedily; so does the
model of `--checkpoint`, where a type of Llama's family holds it. Steps are timed in rounds of their own that take
turns, so that nobody's keys are thrown out of the processor's caches by the others' while they are timed. Recurrent
mixers are timed after prompts of growing length.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import longmix
from benchmarks import decode_report as report
from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.decode_providers import COMPILED, DYNAMIC, OURS, STATIC, UNEQUAL, Ours, Provider, Theirs, exported
from benchmarks.results import Record
from longmix.caches.huge_pages import in_huge_pages
from longmix.composing import composed
from longmix.config import ModelConfig
from longmix.errors import LongmixError
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model

DESCRIPTION = "What a generated token costs, beside transformers with the same weights."
RECURRENT = ("mlstm_tfla", "gla", "gated_deltanet", "mamba2", "rwkv7")
SIZES = ("model.d_model=128", "model.num_layers=6", "model.num_heads=2", "model.mlp_hidden=344")
VOCABULARY = 256
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ENOUGH = 60
"""Seconds of reading by all providers after which no further lap begins."""


@dataclass(frozen=True)
class Laps:
    """What a provider took for the same prompts.

    Attributes:
        prefills: seconds of each reading of all prompts.
        steps: seconds of a step, the median of each round.
        tokens: int64 [B, N], what it chose after the last reading.
    """

    prefills: list[float]
    steps: list[float]
    tokens: torch.Tensor


def small_model(*words: str) -> tuple[LanguageModel, ModelConfig]:
    """A model of `SIZES` with fresh weights, in evaluation mode, and its configuration."""
    torch.manual_seed(0)
    config = ModelConfig.of(composed("train", [*words, *SIZES]).content)
    return build_model(config, VOCABULARY).eval(), config


def models(checkpoint: str | None) -> tuple[LanguageModel, ModelConfig]:
    """The model of a checkpoint, or a small one of softmax attention.

    Raises:
        LongmixError: the checkpoint cannot be loaded.
    """
    if checkpoint is None:
        return small_model("mixer=flash", "mixer.qk_norm=false")
    loaded = longmix.load(checkpoint, device="cpu")
    return loaded.model, ModelConfig.of(loaded.config)


def prompts(model: LanguageModel, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Random tokens, int64 [T] for each length; a row's do not depend on the others' lengths."""
    vocabulary = model.embedding.num_embeddings
    generators = [torch.Generator().manual_seed(row) for row in range(len(lengths))]
    return [torch.randint(vocabulary, (n,), generator=g) for n, g in zip(lengths, generators, strict=True)]


def unequal(length: int, batch: int) -> list[int]:
    """Lengths from half of the length up to it, evenly."""
    return [length - (length // 2) * row // max(batch - 1, 1) for row in range(batch)]


def race(
    providers: Mapping[str, tuple[Provider, Sequence[torch.Tensor]]],
    options: argparse.Namespace,
    announce: Callable[[str], None] = lambda what: None,
) -> dict[str, Laps]:
    """Time each provider on its prompts, in turns; the first step of a round does not count."""
    clock = CLOCKS[options.clock]
    names = list(providers)
    laps = {name: Laps([], [], torch.empty(0)) for name in names}
    room = options.rounds * (options.tokens + 1) + 1
    chosen: dict[str, list[torch.Tensor]] = {}
    for provider, rows in providers.values():  # what a process does once
        provider.step(provider.prefill([row[:16] for row in rows], 1))
    for number in range(options.prefills):
        if sum(sum(own.prefills) for own in laps.values()) > ENOUGH:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            announce(f"{name} reads")
            provider, rows = providers[name]
            began = clock()
            chosen[name] = [provider.prefill(rows, room)]
            laps[name].prefills.append(clock() - began)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            announce(f"{name}, round {number + 1} of {options.rounds}")
            times = []
            for _ in range(options.tokens + 1):
                began = clock()
                chosen[name].append(providers[name][0].step(chosen[name][-1]))
                times.append(clock() - began)
            laps[name].steps.append(statistics.median(times[1:]))
    return {name: Laps(own.prefills, own.steps, torch.stack(chosen[name], 1)) for name, own in laps.items()}


def record(what: str, name: str, seconds: Sequence[float], **facts: object) -> Record:
    """A record of some laps, in milliseconds."""
    times = {"median_ms": 1e3 * statistics.median(seconds), "least_ms": 1e3 * min(seconds)}
    return {"pass": what, "provider": name, **facts, **times, "laps_ms": [1e3 * lap for lap in seconds]}


def racing(
    model: LanguageModel, theirs: Any, rows: Sequence[torch.Tensor], options: argparse.Namespace, copies: int = 1
) -> dict[str, tuple[Provider, Sequence[torch.Tensor]]]:
    """The providers that continue each of these prompts so many times."""
    found: dict[str, Provider] = {
        OURS: Ours(model, copies),
        DYNAMIC: Theirs(theirs, static=False, copies=copies),
        STATIC: Theirs(theirs, static=True, copies=copies),
    }
    if options.compile:
        found[COMPILED] = Ours(model, copies, compiled=True)
    return {name: (provider, rows) for name, provider in found.items()}


def attention_records(
    model: LanguageModel, config: ModelConfig, options: argparse.Namespace, announce: Callable[[str], None]
) -> Iterator[list[Record]]:
    """Records of each number of rows and length, and of samples."""
    theirs = exported(model, config)
    for batch in options.batches:
        for length in options.lengths:
            rows = prompts(model, [length] * batch)
            providers = racing(model, theirs, rows, options)
            if batch > 1:
                providers[UNEQUAL] = Ours(model), prompts(model, unequal(length, batch))
            yield compared(race(providers, options, announce), report.PREFILL, report.STEP, batch, length)
    if options.samples_after:
        length, count = options.samples_after, options.samples
        rows = prompts(model, [length])
        providers = racing(model, theirs, rows, options, count)
        laps = race(providers, options, announce)
        yield compared(laps, report.SAMPLES_PREFILL, report.SAMPLES, count, length)


def compared(laps: Mapping[str, Laps], reading: str, stepping: str, batch: int, length: int) -> list[Record]:
    """Records of a race, with the share of tokens that are ours."""
    found = []
    for name, own in laps.items():
        same = None if name in (OURS, UNEQUAL) else (own.tokens == laps[OURS].tokens).double().mean().item()
        facts = {"batch": batch, "length": length, "same_tokens": same}
        found.append(record(reading, name, own.prefills, tokens=batch * length, **facts))
        found.append(record(stepping, name, own.steps, tokens=batch, **facts))
    return found


def read_records(model: LanguageModel, options: argparse.Namespace) -> list[Record]:
    """Seconds that `torch.sum` takes over the bytes of one row's keys and values, of each length."""
    clock, found = CLOCKS[options.clock], []
    for length in options.lengths:
        numbers = model.state_bytes(length) // (4 * len(model.mixers()))
        held = [in_huge_pages(torch.empty(numbers)).fill_(1) for _ in model.mixers()]
        laps = []
        for _ in range(options.rounds):
            times = []
            for _ in range(options.tokens):
                began = clock()
                for part in held:
                    part.sum()
                times.append(clock() - began)
            laps.append(statistics.median(times))
        facts = {"batch": 1, "length": length, "tokens": 1, "same_tokens": None}
        found.append(record(report.STEP, report.READ, laps, **facts))
    return found


def recurrent_records(mixer: str, options: argparse.Namespace, announce: Callable[[str], None]) -> list[Record]:
    """Records of a mixer's steps after each length."""
    model, _ = small_model(f"mixer={mixer}")
    providers = {str(length): (Ours(model), prompts(model, [length])) for length in options.recurrent_lengths}
    once = argparse.Namespace(**{**vars(options), "prefills": 1})
    laps = race(providers, once, announce)
    return [
        record(report.RECURRENT, mixer, own.steps, batch=1, length=int(length), tokens=1, same_tokens=None)
        for length, own in laps.items()
    ]


def measure(options: argparse.Namespace) -> list[Record]:
    """All records.

    Raises:
        LongmixError: the checkpoint cannot be loaded, or no type of Llama's family holds it.
    """
    model, config = models(options.checkpoint)
    cells = len(options.batches) * len(options.lengths) + (options.samples_after > 0) + len(options.recurrent) + 1
    records: list[Record] = []
    with progress(cells) as (announce, finish), torch.no_grad():
        for found in attention_records(model, config, options, announce):
            records += found
            finish(f"{found[1]['pass']}: {found[1]['batch']} rows after {found[0]['length']:,} tokens")
        records += read_records(model, options)
        finish("torch.sum of the cache")
        for mixer in options.recurrent:
            records += recurrent_records(mixer, options, announce)
            finish(mixer)
    report.add_speedups(records)
    return records


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.decode", description=DESCRIPTION)
    add, count = parser.add_argument, positive(int)
    add("--checkpoint", help="folder of a run or checkpoint of Llama's family; default: a small model, fresh")
    add("--lengths", type=count, nargs="+", default=report.LENGTHS, metavar="T", help="tokens of prompts")
    add("--batches", type=count, nargs="+", default=report.BATCHES, metavar="B", help="rows")
    add("--samples", type=count, default=report.COPIES, help="continuations of one prompt")
    add("--samples-after", type=int, default=report.COPIES_AFTER, metavar="T", help="tokens of their prompt; 0: none")
    add("--recurrent", nargs="*", default=RECURRENT, metavar="MIXER", help="mixers to time at growing lengths")
    add("--recurrent-lengths", type=count, nargs="+", default=report.RECURRENT_LENGTHS, metavar="T")
    add("--rounds", type=count, default=5, help="of each provider, in turns")
    add("--tokens", type=count, default=16, help="timed steps of a round")
    add("--prefills", type=count, default=3, help=f"readings of each prompt; no further one after {ENOUGH} seconds")
    add("--threads", type=count, default=1)
    add("--compile", action="store_true", help="time compiled steps of longmix too; compiling takes minutes")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of all threads, for a busy machine")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    for name in ("lengths", "batches", "recurrent_lengths"):
        setattr(options, name, sorted(set(getattr(options, name))))
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    environment = results.environment(torch.device("cpu"), "fp32")
    try:
        records = measure(options)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    report.leave(environment, options, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
