"""Peak memory and time of a training step with each kind of activation checkpointing, measured and as planned.

    python -m benchmarks.activation_memory --mixers flash mlstm_tfla rwkv7 --length 65536

Each row is a process of its own that takes one step on a CPU, with the code that trains. Its peak is the most that was
held at once, from the profiler's list of all allocations. Leaves JSON, a Markdown table and a picture.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.results import Record
from longmix.model.backbone import Checkpointing
from longmix.planning import check
from longmix.planning.arguments import read
from longmix.planning.plan import Planner
from longmix.reporting.plots import drawing, new_figure, set_title
from longmix.reporting.style import nth_style

DESCRIPTION = "Peak memory and time of a training step with each kind of activation checkpointing."
KINDS = get_args(Checkpointing)
MIB = 2**20


def words(options: argparse.Namespace, mixer: str, kind: str) -> list[str]:
    """The words of one row, as of a plan."""
    return [
        "gpu=cpu",
        "trainer.accelerator=cpu",
        "batch_size=1",
        f"mixer={mixer}",
        f"seq_len={options.length}",
        f"model.num_layers={options.layers}",
        f"model.d_model={options.width}",
        f"model.mlp_hidden={options.width * 11 // 4}",
        "model.num_heads=1",
        f"model.activation_checkpointing={kind}",
    ]


def measured(given: list[str], found: Any) -> None:
    """Take the step and put its peak in bytes and its seconds into a queue."""
    torch.set_num_threads(1)
    began = time.monotonic()
    peak = check.peak_on_cpu(read(given), steps=1)
    found.put((peak, time.monotonic() - began))


def in_a_process(given: list[str]) -> tuple[int, float]:
    """`measured` in a new process.

    Raises:
        RuntimeError: it ended without a result.
    """
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measured, args=(given, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.05)
    if queue.empty() and process.exitcode:
        raise RuntimeError(f"a process ended with exit code {process.exitcode}: {' '.join(given)}")
    peak, seconds = queue.get(timeout=60)
    process.join()
    return peak, seconds


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """A record for each mixer and kind."""
    with progress(len(options.mixers) * len(KINDS)) as (announce, finish):
        for mixer in options.mixers:
            for kind in KINDS:
                announce(f"{mixer}, {kind}")
                given = words(options, mixer, kind)
                plan = Planner(read(given)).plan()
                peak, seconds = in_a_process(given)
                yield {
                    "mixer": mixer,
                    "activation_checkpointing": kind,
                    "length": options.length,
                    "peak_bytes": peak,
                    "planned_bytes": plan.memory.total,
                    "computed_flops": plan.flops[1],
                    "model_flops": plan.flops[0],
                    "seconds": seconds,
                }
                finish(f"{mixer}, {kind}: {peak / MIB:,.0f} MiB, {seconds:.0f} s")


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each mixer and kind, each also relative to no checkpointing."""
    heads = ["mixer", "kept", "peak, MiB", "of none", "planned, MiB", "arithmetic of none", "step, s"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for record in records:
        whole = next(each for each in records if each["mixer"] == record["mixer"])
        lines.append(
            [
                record["mixer"],
                record["activation_checkpointing"],
                f"{record['peak_bytes'] / MIB:,.0f}",
                f"{record['peak_bytes'] / whole['peak_bytes']:.0%}",
                f"{record['planned_bytes'] / MIB:,.0f}",
                f"{record['computed_flops'] / whole['computed_flops']:.0%}",
                f"{record['seconds']:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Bars of the peak, a group for each mixer."""
    figure, (axes,) = new_figure(1)
    mixers = list(dict.fromkeys(record["mixer"] for record in records))
    for number, kind in enumerate(KINDS):
        own = [record for record in records if record["activation_checkpointing"] == kind]
        places = [mixers.index(record["mixer"]) + (number - 1) * 0.27 for record in own]
        heights = [record["peak_bytes"] / MIB for record in own]
        axes.bar(places, heights, width=0.25, label=kind, color=nth_style(number).light)
    axes.set_xticks(range(len(mixers)), mixers)
    axes.set_ylabel("peak of a step, MiB")
    set_title(axes, f"Activation checkpointing at {records[0]['length']:,} tokens")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.activation_memory", description=DESCRIPTION)
    parser.add_argument("--mixers", nargs="+", default=["flash", "mlstm_tfla", "rwkv7"])
    parser.add_argument("--length", type=positive(int), default=65_536, help="tokens of the one row of a step")
    parser.add_argument("--layers", type=positive(int), default=4)
    parser.add_argument("--width", type=positive(int), default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    return results.carry_out("activation_memory", options, lambda: measure(options), table, drawn)


if __name__ == "__main__":
    sys.exit(main())
