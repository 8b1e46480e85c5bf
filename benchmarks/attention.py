"""Our attention against torch's backends, FlexAttention and FlashAttention 3 and 4: `python -m benchmarks.attention`.

Everything is measured in one run on the same inputs, in turns. Times of sorted patterns (hash, routing, drop) include
making the ordering, from given labels or, in routing, from the queries. Hash buckets are uniform and random, with a
fixed seed, independent per head. FLOPs are those that a pattern's visible pairs need, whatever the tiles compute on
top. On CUDA 65536 tokens and 2048 columns (heads x dim) are shared out among batch and heads; on the CPU there are 4
heads and one sequence.

`--waste` counts instead what tiles compute beyond what hash-sparse attention needs, and times nothing.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention_work as work
from benchmarks import results, timing
from benchmarks.attention_providers import FEATURES, LEGEND, NAMES, OURS, SDPA, WINDOW, Shape, providers
from benchmarks.command import DTYPES, Parser, positive
from benchmarks.comparison import PASSES, TRAINING, Comparison, carry_out
from longmix.files import replace_text

LENGTHS = tuple(1024 << power for power in range(7))
CUDA_TOKENS, CUDA_COLUMNS, CPU_HEADS = 65536, 2048, 4

COLUMNS = {
    "pass": "pass",
    "dim": "dim",
    "length": "T",
    "provider": "provider",
    "median_ms": "ms",
    "least_ms": "min",
    "low_ms": "25 %",
    "high_ms": "75 %",
    "repetitions": "n",
    "order_ms": "order ms",
    "tflops": "TFLOP/s",
    "of_peak": "of peak",
    "over_sdpa": "x SDPA",
    "over_dense": "x dense",
    "peak_mib": "peak MiB",
    "waste_128": "waste 128",
    "waste_64": "waste 64",
    "note": "note",
}
FOOTNOTE = """\
ms: median, with the ordering; order ms: the ordering alone. TFLOP/s: on visible pairs. x SDPA: against the fastest of
torch's backends here; x dense: against our own dense attention. peak MiB: what torch's allocator hands out for a call.
waste: scores that square tiles of this side compute for each one needed, counted from the bounds."""

WASTE_COLUMNS = {"length": "T", "buckets": "buckets", "ideal": "ideal x"} | {
    f"{key}_{tile}": f"{title} {tile}"
    for tile in work.TILES
    for key, title in (("waste", "waste"), ("simulated", "simulated"), ("visited", "dense/visited"))
}

_H200 = {"device_name": "NVIDIA H200", "dtype": "bf16"}
_CPU = {"device": "cpu", "dtype": "fp32"}


def bars(device: str, dims: Sequence[int]) -> list[results.Bar | results.FlatBar]:
    """What has to be reached on a device, forward and backward together at T = 16384."""
    Bar, flash, where = results.Bar, ("sdpa-flash",), {"pass": TRAINING, "length": 16384}
    hashes = [(name, where | {"dim": dim}) for dim in dims for name in ("hash-shared", "hash-separate")]
    claim = f"{'CPU' if device == 'cpu' else 'H200'}: {{}}, d{{}}, T = 16384, forward + backward, against {{}}"
    sparse = "{} (16 buckets, sorting included)"
    if device == "cpu":
        routing = f"routing (w = {WINDOW}, choosing and sorting included)"
        scattered = f"scatterbrain (m = {FEATURES}, features included)"
        others = [(name, where | {"dim": dim}) for name in ("routing", "scatterbrain") for dim in dims]
        named = {"routing": routing, "scatterbrain": scattered} | {name: sparse.format(name) for name, _ in hashes}
        flat = "CPU: scatterbrain, d{}, forward + backward, time per token from 2k to 64k"
        return [
            *(
                Bar(claim.format(named[name], here["dim"], "SDPA"), name, SDPA, flash, here, 4.0, _CPU)
                for name, here in hashes + others
            ),
            *(
                results.FlatBar(
                    flat.format(dim), "scatterbrain", {"pass": TRAINING, "dim": dim}, LENGTHS[1:], 0.15, _CPU
                )
                for dim in dims
            ),
        ]
    full = {"tokens": CUDA_TOKENS, "columns": CUDA_COLUMNS}
    dense = claim.format("dense", 128, "the fastest SDPA backend")
    return [
        Bar(dense, "dense", SDPA, (*flash, "sdpa-cudnn"), where | full | {"dim": 128}, 0.8, _H200),
        *(
            Bar(
                claim.format(sparse.format(name), here["dim"], "dense FA2"), name, flash, flash, here | full, 8.0, _H200
            )
            for name, here in hashes
        ),
    ]


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    """The shapes to compare, short ones first: they predict how long the others take."""
    cuda = options.device == "cuda"
    for dim in options.dims:
        for length in options.lengths:
            batch = options.batch or (max(1, CUDA_TOKENS // length) if cuda else 1)
            heads = options.heads or (max(1, CUDA_COLUMNS // dim) if cuda else CPU_HEADS)
            yield Shape(batch, length, heads, dim, DTYPES[options.dtype], torch.device(options.device))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.attention", description="Compare attention implementations.")
    add = parser.add_argument
    add("--waste", action="store_true", help="count what tiles compute in vain, and time nothing")
    add("--lengths", type=positive(int, 1 << 20), nargs="+", default=LENGTHS, metavar="T")
    add("--dims", type=positive(int, 256), nargs="+", default=(64, 128), metavar="D")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--providers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--batch", type=positive(int), help=f"default: {CUDA_TOKENS} / T on CUDA, 1 on the CPU")
    add("--heads", type=positive(int), help=f"default: {CUDA_COLUMNS} / D on CUDA, {CPU_HEADS} on the CPU")
    add("--flex", action="store_true", help="FlexAttention on the CPU too; each length compiles for tens of seconds")
    parser.add_shared()
    options = parser.parse_args(arguments)
    parser.check_shared(options)
    options.lengths, options.dims = sorted(set(options.lengths)), sorted(set(options.dims))
    return options


def save(run: Comparison, environment: results.Record, options: argparse.Namespace, missing: dict[str, str]) -> Path:
    """Write the JSON of a run, as far as it has come, and return its path."""
    results.add_speedup(run.records, "over_sdpa", SDPA)
    results.add_speedup(run.records, "over_dense", ("dense",))
    content: dict[str, Any] = {
        "benchmark": "attention",
        "environment": environment,
        "settings": {name: value for name, value in vars(options).items() if name not in ("out", "waste")},
        "missing": missing,
        "results": run.records,
        "bars": [bar.verdict(run.records, environment) for bar in bars(options.device, options.dims)],
    }
    path = options.out / f"{results.file_stem('attention', environment)}.json"
    results.write_json(path, content)
    return path


def report(path: Path, content: results.Record) -> str:
    """Write table and picture beside the JSON of a run, and return the table."""
    head = results.headline(content["environment"])
    records = sorted(content["results"], key=_order_key)
    sections = [
        f"attention on {head}",
        results.text_table(records, COLUMNS),
        FOOTNOTE,
        LEGEND,
        "\n".join(f"left out: {name} {why}" for name, why in content["missing"].items()),
        "\n".join(["bars", *results.verdict_lines(content["bars"])]),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    replace_text(path.with_suffix(".txt"), text)
    label = "times faster than the fastest SDPA"
    results.draw(path.with_suffix(".png"), records, title=head, ours=OURS, speedup="over_sdpa", speedup_label=label)
    return text


def _order_key(record: results.Record) -> tuple[int, ...]:
    ranks = PASSES.index(record["pass"]), record["length"], NAMES.index(record["provider"])
    return record["dim"], *ranks


def count_waste(options: argparse.Namespace) -> int:
    """Print and save the table of tile waste."""
    rows = [work.waste_row(length, buckets) for length, buckets in work.WASTE_SIMULATED]
    text = (
        "tile waste of hash-sparse attention: scores computed for each one needed; shared uniform buckets, causal\n\n"
        f"{results.text_table(rows, WASTE_COLUMNS)}\n"
    )
    path = options.out / "attention_waste.json"
    results.write_json(path, {"benchmark": "attention_waste", "heads": work.WASTE_HEADS, "results": rows})
    replace_text(path.with_suffix(".txt"), text)
    print(f"{text}\nwritten: {path}, .txt")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if nothing could be measured."""
    options = parse(arguments)
    if options.waste:
        return count_waste(options)
    device = torch.device(options.device)
    every = providers(options.flex)
    asked = [every[name] for name in NAMES if name in options.providers]
    missing = {provider.name: why for provider in asked if (why := provider.missing(device))}
    environment = results.environment(device, options.dtype)
    run = Comparison(
        [provider for provider in asked if provider.name not in missing],
        timing.clock_for(device),
        options.seconds,
        options.limit,
        results.peak_flops(environment),
    )
    steps = len(options.dims) * len(options.lengths) * len(options.passes)
    write = functools.partial(save, run, environment, options, missing)
    return carry_out(run, shapes(options), steps, options.passes, missing, write, report)


if __name__ == "__main__":
    sys.exit(main())
