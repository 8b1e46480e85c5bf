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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import linear_providers as peers
from benchmarks import results, timing
from benchmarks.command import DTYPES, Parser, positive
from benchmarks.comparison import PASSES, TRAINING, Comparison, Provider, carry_out
from benchmarks.linear_providers import FAMILIES, LEGEND, OURS, LinearShape, providers
from longmix_kernels.linear.checks import TRITON_MAX_DIM

LENGTHS = tuple(512 << power for power in range(8))
SWEEP_LENGTHS = (8192,)
CUDA_TOKENS, CPU_BATCH = 65536, 2
SIZES = {"cuda": {"heads": 16, "key_dim": 128, "value_dim": 256}, "cpu": {"heads": 4, "key_dim": 64, "value_dim": 128}}
"""By device."""

COLUMNS = {
    "pass": "pass",
    "length": "T",
    "provider": "provider",
    "median_ms": "ms",
    "least_ms": "min",
    "low_ms": "25 %",
    "high_ms": "75 %",
    "repetitions": "n",
    "us_per_token": "us/token",
    "tflops": "TFLOP/s",
    "moved_gb": "moved GB",
    "of_roofline": "of roofline",
    "peak_gb": "peak GB",
    "over_mlstm": "x mlstm",
    "over_gla": "x gla",
    "over_sdpa": "x SDPA",
    "note": "note",
}
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
        place, needs, where["batch"] = "CPU", {"device": "cpu", "dtype": "fp32"}, CPU_BATCH
    else:
        place, needs, where["tokens"] = "H200", {"device_name": "NVIDIA H200", "dtype": "bf16"}, CUDA_TOKENS

    def faster(name: str, length: int, rival: str, chunks: Sequence[int], least: float, more: str = "") -> results.Bar:
        rivals = tuple(f"{rival}-{chunk}" for chunk in chunks) or (rival,)
        text = f"{place}: {name}, {heads}, T = {length}, against {rival}{more}"
        return results.Bar(text, name, rivals, rivals, where | {"length": length}, least, needs)

    def flat(name: str) -> results.FlatBar:
        text = f"{place}: {name}, {heads}, time per token from T = {FLAT_LENGTHS[0]} to {FLAT_LENGTHS[-1]}"
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


def shapes(options: argparse.Namespace) -> Iterator[LinearShape]:
    """The shapes to compare, short ones first: they predict how long the others take."""
    for length in options.lengths:
        batch = options.batch or (max(1, CUDA_TOKENS // length) if options.device == "cuda" else CPU_BATCH)
        sizes = options.heads, options.key_dim, options.value_dim
        yield LinearShape(batch, length, *sizes, DTYPES[options.dtype], torch.device(options.device))


def chunk_size(text: str) -> int:
    """Read a chunk size, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if not 16 <= number <= 1024 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are powers of two from 16 to 1024")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.linear", description="Compare implementations of linear attention.")
    add, of_device = parser.add_argument, " and ".join(f"{{{name}}} on {name}" for name in SIZES)

    def default(name: str) -> str:
        return "default: " + of_device.format(**{device: sizes[name] for device, sizes in SIZES.items()})

    add("--lengths", type=positive(int, 1 << 20), nargs="+", metavar="T")
    add("--heads", type=positive(int), help=default("heads"))
    add("--key-dim", type=positive(int, TRITON_MAX_DIM), metavar="D", help=default("key_dim"))
    add("--value-dim", type=positive(int, TRITON_MAX_DIM), metavar="D", help=default("value_dim"))
    add("--batch", type=positive(int), help=f"default: {CUDA_TOKENS} / T on cuda and {CPU_BATCH} on cpu")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--providers", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="NAME", help=", ".join(FAMILIES))
    what = f"compare chunk sizes, of ours and of mlstm-kernels; at T = {SWEEP_LENGTHS[0]} unless --lengths says so"
    add("--chunk-sizes", type=chunk_size, nargs="+", default=(), metavar="C", help=what)
    parser.add_shared()
    options = parser.parse_args(arguments)
    parser.check_shared(options)
    options.chunk_sizes = sorted(set(options.chunk_sizes))
    options.lengths = sorted(set(options.lengths or (SWEEP_LENGTHS if options.chunk_sizes else LENGTHS)))
    for name, size in SIZES[options.device].items():
        setattr(options, name, getattr(options, name) or size)
    return options


def complete(records: Sequence[results.Record], families: Mapping[str, str], key_dim: int) -> list[results.Record]:
    """Return the records, one more for the fastest chunk size where that is asked, and what follows from times.

    Args:
        records: as measured.
        families: by the name of a provider.
        key_dim: of the run.
    """
    found = [dict(record, family=families[record["provider"]], key_dim=key_dim) for record in records]
    for family in peers.BEST_OF:
        for direction, length in dict.fromkeys((r["pass"], r["length"]) for r in found):
            here = [r for r in found if (r["pass"], r["length"], r["family"]) == (direction, length, family)]
            measured = [r for r in here if r["median_ms"] is not None]
            if best := min(measured, key=lambda r: r["median_ms"], default=None):
                found.append(best | {"provider": family, "note": f"the time of {best['provider']}"})
    for record in found:
        took, peak = record["median_ms"], record["peak_mib"]
        record["us_per_token"] = None if took is None else took * 1e3 / record["tokens"]
        record["peak_gb"] = None if peak is None else peak * 2**20 / 1e9
    exponential = [r for r in found if r["family"] in ("exp", peers.NATIVE, peers.XL_EXP)]
    others = [r for r in found if r["family"] not in ("exp", peers.XL_EXP)]
    for kind, rival in ((exponential, peers.XL_EXP), (others, peers.XL_SIG)):
        against = {name for name, family in families.items() if family in (peers.NATIVE, rival)}
        results.add_speedup(kind, "over_mlstm", against)
    results.add_speedup(found, "over_gla", (peers.GLA,))
    results.add_speedup(found, "over_sdpa", peers.SDPA)
    order = {name: place for place, name in enumerate(families)}

    def place(record: results.Record) -> tuple[int, ...]:
        ranks = PASSES.index(record["pass"]), record["length"], FAMILIES.index(record["family"])
        return *ranks, order.get(record["provider"], -1)

    return sorted(found, key=place)


def save(
    run: Comparison,
    environment: results.Record,
    options: argparse.Namespace,
    families: Mapping[str, str],
    missing: Mapping[str, str],
) -> Path:
    """Write the JSON of a run, as far as it has come, and return its path."""
    records = complete(run.records, families, options.key_dim)
    content: dict[str, Any] = {
        "benchmark": "linear",
        "environment": environment,
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "missing": missing,
        "results": records,
        "bars": [bar.verdict(records, environment) for bar in bars(options.device)],
    }
    path = options.out / f"{results.file_stem('linear', environment)}.json"
    results.write_json(path, content)
    return path


def report(path: Path, content: results.Record) -> str:
    """Write table and picture beside the JSON of a run, and return the table."""
    settings, environment, records = content["settings"], content["environment"], content["results"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["peers"].items() if version)
    sizes = f"{settings['heads']} heads of {settings['key_dim']}/{settings['value_dim']}"
    head = f"{sizes} on {results.headline(environment)}{f'; {packages}' if packages else ''}"
    filled = {key for record in records for key, x in record.items() if x not in (None, "")}
    sections = [
        f"linear attention, {head}",
        results.text_table(records, {key: title for key, title in COLUMNS.items() if key in filled}),
        FOOTNOTE,
        LEGEND,
        "\n".join(f"left out: {name} {why}" for name, why in content["missing"].items()),
        "\n".join(["bars", *results.verdict_lines(content["bars"])]),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    draw(path.with_suffix(".png"), records, head, bool(settings["chunk_sizes"]))
    return text


def draw(path: Path, records: Sequence[results.Record], title: str, sweep: bool) -> None:
    """Draw time per token and speed-up against the length, or against the chunk size of those that have one."""
    lines, ours, x = records, set(OURS), {}
    chunked = [r | {"provider": f"{r['family']}, T = {r['length']}"} for r in records if r["provider"] != r["family"]]
    if sweep and chunked:
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
    device = torch.device(options.device)
    every = providers(options.chunk_sizes)
    asked = {family: every[family] for family in FAMILIES if family in options.providers}
    missing = {family: why for family, chunks in asked.items() if (why := chunks[0].missing(device))}
    environment = results.environment(device, options.dtype)
    environment["peers"] = {name: results.version(name) for name in ("mlstm-kernels", "fla-core")}
    here: list[Provider] = [x for family, chunks in asked.items() if family not in missing for x in chunks]
    rates = results.peak_flops(environment), results.peak_bytes(environment)
    run = Comparison(here, timing.clock_for(device), options.seconds, options.limit, *rates)
    families = {provider.name: family for family, chunks in asked.items() for provider in chunks}
    write = functools.partial(save, run, environment, options, families, missing)
    steps = len(options.lengths) * len(options.passes)
    return carry_out(run, shapes(options), steps, options.passes, missing, write, report)


if __name__ == "__main__":
    sys.exit(main())
