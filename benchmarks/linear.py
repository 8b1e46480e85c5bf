"""Our scalar-gated linear attention against mlstm-kernels, fla and torch's attention: `python -m benchmarks.linear`.

Everything is measured in one run on the same inputs, in turns. FLOPs are those of the recurrence and bytes those of the
chunked design (see `benchmarks.linear_work`), except for softmax attention, whose FLOPs are its own. On CUDA there are
65536 tokens, shared out among the sequences of a batch; on the CPU there are two sequences.

`--chunk-sizes` compares chunk sizes instead, at one length. `--heads 8 --key-dim 256 --value-dim 512` are the other
heads of the same width that have been published.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import linear_providers as peers
from benchmarks import recurrences, results
from benchmarks.command import Parser
from benchmarks.comparison import TRAINING
from benchmarks.linear_providers import FAMILIES, LEGEND, OURS, LinearShape, providers
from benchmarks.recurrences import CPU_BATCH
from longmix_kernels.linear.checks import TRITON_MAX_DIM

LENGTHS = tuple(512 << power for power in range(8))
SWEEP_LENGTHS = (8192,)
CUDA_TOKENS = 65536
SIZES = {"cuda": {"heads": 16, "key_dim": 128, "value_dim": 256}, "cpu": {"heads": 4, "key_dim": 64, "value_dim": 128}}
"""By device."""

COLUMNS = recurrences.COLUMNS | {"over_mlstm": "x mlstm", "over_gla": "x gla", "over_sdpa": "x SDPA", "note": "note"}
FOOTNOTE = """\
ms: median. us/token: over all sequences. TFLOP/s: on the 4 Dk Dv of the recurrence per token and head, three times that
with the backward pass; on visible pairs for sdpa. moved GB: inputs, outputs and chunk states, each once a step, with
the chunks of a GPU where none are given; of roofline: the least time for these bytes and FLOPs on an H200, of the time
taken. peak GB: what torch's allocator hands out for a call. x: times faster than the fastest of mlstm-kernels (on CUDA:
of the same kind), than fla and than the fastest of torch's backends."""

SPEEDUPS = {"over_mlstm": "mlstm-kernels", "over_gla": "fla's simple_gla", "over_sdpa": "the fastest SDPA"}

FLAT_LENGTHS = tuple(2048 << power for power in range(6))


def bars(device: str) -> list[results.Bar | results.FlatBar]:
    """What has to be reached on a device, forward and backward together."""
    sizes = SIZES[device]
    heads = f"{sizes['heads']} heads of {sizes['key_dim']}/{sizes['value_dim']}, forward + backward"
    where = {"pass": TRAINING, "heads": sizes["heads"], "key_dim": sizes["key_dim"], "dim": sizes["value_dim"]}
    if device == "cpu":
        machine, needs, where["batch"] = "CPU", {"device": "cpu", "dtype": "fp32"}, CPU_BATCH
    else:
        machine, needs, where["tokens"] = "H200", {"device_name": "NVIDIA H200", "dtype": "bf16"}, CUDA_TOKENS

    def faster(name: str, length: int, rival: str, chunks: Sequence[int], least: float, more: str = "") -> results.Bar:
        rivals = tuple(f"{rival}-{chunk}" for chunk in chunks) or (rival,)
        text = f"{machine}: {name}, {heads}, T = {length}, against {rival}{more}"
        return results.Bar(text, name, rivals, rivals, where | {"length": length}, least, needs)

    def flat(name: str) -> results.FlatBar:
        text = f"{machine}: {name}, {heads}, time per token from T = {FLAT_LENGTHS[0]} to {FLAT_LENGTHS[-1]}"
        return results.FlatBar(text, name, where, FLAT_LENGTHS, 0.15, needs)

    if device == "cpu":
        speed = [
            faster(name, length, peers.NATIVE, peers.NATIVE_CHUNKS, least)
            for name in ("exp", "sig")
            for length, least in ((4096, 2.0), (16384, 4.0))
        ]
        return [*speed, *map(flat, OURS)]
    return [
        faster("sig", 8192, peers.XL_SIG, peers.XL_CHUNKS, 1 / 0.6, " (at most 0.6 of its time)"),
        faster("sig", 8192, peers.GLA, (), 1 / 0.85, " (at most 0.85 of its time)"),
    ]


shapes = functools.partial(recurrences.shapes, make=LinearShape, cuda_tokens=CUDA_TOKENS)
"""The shapes to compare, of the options."""


def chunk_size(text: str) -> int:
    """Read a chunk size, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if not 16 <= number <= 1024 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are powers of two from 16 to 1024")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.linear", description="Compare implementations of linear attention.")
    recurrences.add_sizes(parser, SIZES, TRITON_MAX_DIM, CUDA_TOKENS, FAMILIES)
    what = f"compare chunk sizes, of ours and of mlstm-kernels; at T = {SWEEP_LENGTHS[0]} unless --lengths says so"
    parser.add_argument("--chunk-sizes", type=chunk_size, nargs="+", default=(), metavar="C", help=what)
    options = recurrences.read(parser, arguments, SIZES)
    options.chunk_sizes = sorted(set(options.chunk_sizes))
    options.lengths = sorted(set(options.lengths or (SWEEP_LENGTHS if options.chunk_sizes else LENGTHS)))
    return options


def complete(records: Sequence[results.Record], families: Mapping[str, str], key_dim: int) -> list[results.Record]:
    """Return the records and speed-ups; arguments as those of `recurrences.completed`."""
    found = recurrences.completed(records, families, key_dim, peers.BEST_OF)
    exponential = [r for r in found if r["family"] in ("exp", peers.NATIVE, peers.XL_EXP)]
    others = [r for r in found if r["family"] not in ("exp", peers.XL_EXP)]
    for kind, rival in ((exponential, peers.XL_EXP), (others, peers.XL_SIG)):
        against = {name for name, family in families.items() if family in (peers.NATIVE, rival)}
        results.add_speedup(kind, "over_mlstm", against)
    results.add_speedup(found, "over_gla", (peers.GLA,))
    results.add_speedup(found, "over_sdpa", peers.SDPA)
    return recurrences.in_order(found, families, FAMILIES)


def draw(path: Path, records: Sequence[results.Record], title: str, settings: Mapping[str, Any]) -> None:
    """Draw time per token and speed-up against the length, or against the chunk size of those that have one."""
    lines, ours, x = records, set(OURS), {}
    chunked = [r | {"provider": f"{r['family']}, T = {r['length']}"} for r in records if r["provider"] != r["family"]]
    if settings["chunk_sizes"] and chunked:
        lines, x = chunked, {"x": "chunk_size", "x_label": "tokens of a chunk"}
        ours = {record["provider"] for record in lines if record["family"] in OURS}
    elif summed := {record["provider"] for record in records} & set(peers.BEST_OF):
        lines = [r for r in records if r["provider"] == r["family"] or r["family"] not in summed]
    filled = {key for record in lines for key in SPEEDUPS if record[key] is not None}
    speedup = next((key for key in SPEEDUPS if key in filled), "over_mlstm")
    label = f"times faster than {SPEEDUPS[speedup]}"
    time = {"time": "us_per_token", "time_label": "µs per token"}
    results.draw(path, lines, title=title, ours=ours, speedup=speedup, speedup_label=label, **time, **x)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if nothing could be measured."""
    options = parse(arguments)
    table = recurrences.Publication("linear", "linear attention", COLUMNS, (FOOTNOTE, LEGEND), complete, draw, bars)
    packages = "mlstm-kernels", "fla-core"
    return table.carry_out(providers(options.chunk_sizes), FAMILIES, shapes(options), options, packages)


if __name__ == "__main__":
    sys.exit(main())
