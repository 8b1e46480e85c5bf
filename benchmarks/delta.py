"""Our delta rule against flash-linear-attention, with the inputs of several mixers: `python -m benchmarks.delta`.

Everything is measured in one run on the same inputs, in turns. FLOPs are those of the recurrence and bytes those of the
chunked design (see `benchmarks.delta_work`). On CUDA there are 32768 tokens, shared out among the sequences of a batch:
at T = 4096 that is the published case of 8 sequences of 64 heads of 64; on the CPU there are two sequences.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import delta_providers as peers
from benchmarks import recurrences, results
from benchmarks.command import Parser
from benchmarks.comparison import TRAINING
from benchmarks.delta_providers import FAMILIES, LEGEND, OURS, DeltaShape, providers
from benchmarks.recurrences import CPU_BATCH
from longmix_kernels.delta.checks import TRITON_MAX_DIM

LENGTHS = tuple(1024 << power for power in range(7))
CUDA_TOKENS = 32768
SIZES = {"cuda": {"heads": 64, "key_dim": 64, "value_dim": 64}, "cpu": {"heads": 4, "key_dim": 64, "value_dim": 64}}
"""By device."""

COLUMNS = recurrences.COLUMNS | {"over_naive": "x naive", "over_fla": "x fla", "note": "note"}
FOOTNOTE = """\
ms: median. us/token: over all sequences. TFLOP/s: on the 8 Dk Dv of the recurrence per token and head, 4 Dk Dv where
nothing is removed, three times that with the backward pass. moved GB: inputs, outputs, states and what takes a state
through a chunk, each once a step; of roofline: the least time for these bytes and FLOPs on an H200, of the time taken.
peak GB: what torch's allocator hands out for a call. x: times faster than fla's dplr_chunkwise at its better chunk
size, and than fla's kernel of the same inputs."""

SPEEDUPS = {"over_fla": "fla's kernel", "over_naive": "fla's dplr_chunkwise"}

FLAT_LENGTHS = tuple(2048 << power for power in range(6))
RATIO_LENGTHS = {"cpu": 2048, "cuda": 4096}


def bars(device: str) -> list[results.Bar | results.FlatBar]:
    """What has to be reached on a device, forward and backward together."""
    sizes, length = SIZES[device], RATIO_LENGTHS[device]
    heads = f"{sizes['heads']} heads of {sizes['key_dim']}/{sizes['value_dim']}, forward + backward"
    where = {"pass": TRAINING, "heads": sizes["heads"], "key_dim": sizes["key_dim"], "dim": sizes["value_dim"]}
    if device == "cuda":
        where["batch"] = CUDA_TOKENS // length
        text = (
            f"H200: rwkv7, batch {where['batch']}, {heads}, T = {length}, against fla-rwkv7 (at most 0.4 of its time)"
        )
        rival, needs = ("fla-rwkv7",), {"device_name": "NVIDIA H200", "dtype": "bf16"}
        return [results.Bar(text, "rwkv7", rival, rival, where | {"length": length}, 1 / 0.4, needs)]
    where["batch"], needs = CPU_BATCH, {"device": "cpu", "dtype": "fp32"}
    rivals = tuple(f"{peers.NAIVE}-{chunk}" for chunk in peers.NAIVE_CHUNKS)
    text = f"CPU: rwkv7, {heads}, T = {length}, against {peers.NAIVE}"
    span = f"time per token from T = {FLAT_LENGTHS[0]} to {FLAT_LENGTHS[-1]}"
    return [
        results.Bar(text, "rwkv7", rivals, rivals, where | {"length": length}, 5.0, needs),
        *(results.FlatBar(f"CPU: {name}, {heads}, {span}", name, where, FLAT_LENGTHS, 0.15, needs) for name in OURS),
    ]


shapes = functools.partial(recurrences.shapes, make=DeltaShape, cuda_tokens=CUDA_TOKENS)
"""The shapes to compare, of the options."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.delta", description="Compare implementations of the delta rule.")
    recurrences.add_sizes(parser, SIZES, TRITON_MAX_DIM, CUDA_TOKENS, FAMILIES)
    options = recurrences.read(parser, arguments, SIZES)
    options.lengths = sorted(set(options.lengths or LENGTHS))
    return options


def complete(records: Sequence[results.Record], families: Mapping[str, str], key_dim: int) -> list[results.Record]:
    """Return the records and speed-ups; arguments as those of `recurrences.completed`."""
    found = recurrences.completed(records, families, key_dim, peers.BEST_OF)
    for record in found:
        record["over_naive"] = record["over_fla"] = None
    alike = [r for r in found if r["family"] in ("rwkv7", peers.NAIVE)]
    results.add_speedup(alike, "over_naive", {name for name, family in families.items() if family == peers.NAIVE})
    for name in OURS:
        same_inputs = [r for r in found if r["family"].removeprefix("fla-") == name]
        results.add_speedup(same_inputs, "over_fla", (f"fla-{name}",))
    return recurrences.in_order(found, families, FAMILIES)


def draw(path: Path, records: Sequence[results.Record], title: str, settings: Mapping[str, Any]) -> None:
    """Draw time per token and speed-up against the length."""
    lines = [r for r in records if r["provider"] == r["family"]]
    speedup = next((key for key in SPEEDUPS if any(r[key] is not None for r in lines)), "over_fla")
    label = f"times faster than {SPEEDUPS[speedup]}"
    time = {"time": "us_per_token", "time_label": "µs per token"}
    results.draw(path, lines or records, title=title, ours=set(OURS), speedup=speedup, speedup_label=label, **time)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if nothing could be measured."""
    options = parse(arguments)
    table = recurrences.Publication("delta", "delta rule", COLUMNS, (FOOTNOTE, LEGEND), complete, draw, bars)
    return table.carry_out(providers(), FAMILIES, shapes(options), options, ("fla-core",))


if __name__ == "__main__":
    sys.exit(main())
