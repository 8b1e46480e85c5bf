"""What `benchmarks.decode` has to reach, and its table and picture."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.decode_providers import COMPILED, OURS, THEIRS, UNEQUAL
from benchmarks.results import Bar, FlatBar, Record
from longmix.files import replace_text
from longmix.reporting.plots import WIDTH, draw_curves, drawing, new_figure, save_figure

LENGTHS, BATCHES = (512, 4096, 16384), (1, 8)
COPIES, COPIES_AFTER = 8, 4096
RECURRENT_LENGTHS = (1024, 4096, 16384, 65536)
STEP, PREFILL = "step", "prefill"
SAMPLES, SAMPLES_PREFILL = "step of samples", "prefill of samples"
RECURRENT = "recurrent step"
READ = "torch.sum of cache"
MOST_READS = 1.5
"""How many times that of `READ` a step's time may grow with each token of the cache."""

COLUMNS = {
    "pass": "what",
    "provider": "provider",
    "batch": "rows",
    "length": "prompt",
    "median_ms": "median ms",
    "least_ms": "least ms",
    "over_transformers": "x transformers",
    "same_tokens": "same tokens",
}
FOOTNOTE = """\
ms: of a step of all rows, or of reading all prompts. x transformers: times faster than the better of its caches. same
tokens: the share of tokens that are ours."""


def add_speedups(records: Sequence[Record]) -> None:
    """Write into each record how many times faster it is than transformers; None where that was not measured."""
    for record in records:
        same = [r for r in records if all(r[key] == record[key] for key in ("pass", "batch", "length"))]
        rivals = [
            r["median_ms"] for r in same if r["provider"] in THEIRS and record["provider"] in (OURS, COMPILED, *THEIRS)
        ]
        record["over_transformers"] = min(rivals) / record["median_ms"] if rivals else None


def bars(mixers: Sequence[str], compiled: bool = False) -> list[Bar | FlatBar]:
    """What has to be reached by the small model; by compiled steps as well, where there are some."""
    needs = {"device": "cpu", "dtype": "fp32"}
    found: list[Bar | FlatBar] = []

    def add(text: str, provider: str, rivals: tuple[str, ...], least: float, **where: object) -> None:
        found.append(Bar(text, provider, rivals, rivals, where, least, needs))

    for batch in BATCHES:
        for length in LENGTHS:
            where: dict[str, object] = {"batch": batch, "length": length}
            rows = f"{batch} row{'s' * (batch > 1)} after {length:,} tokens"
            add(f"a step, {rows}", OURS, THEIRS, 1.2, **where | {"pass": STEP})
            if compiled:
                add(f"a compiled step, {rows}", COMPILED, THEIRS, 1.2, **where | {"pass": STEP})
            add(f"reading, {rows}", OURS, THEIRS, 1.0, **where | {"pass": PREFILL})
            if batch > 1:
                add(f"a step, {rows}, of different lengths", UNEQUAL, (OURS,), 1.0, **where | {"pass": STEP})
    samples: dict[str, object] = {"pass": SAMPLES, "batch": COPIES, "length": COPIES_AFTER}
    add(f"a step of {COPIES} samples after {COPIES_AFTER:,} tokens", OURS, THEIRS, 4.0, **samples)
    if compiled:
        add(f"a compiled step of {COPIES} samples after {COPIES_AFTER:,} tokens", COMPILED, THEIRS, 4.0, **samples)
    for mixer in mixers:
        text = f"{mixer}, a step from {RECURRENT_LENGTHS[0]:,} to {RECURRENT_LENGTHS[-1]:,} tokens"
        found.append(FlatBar(text, mixer, {"pass": RECURRENT}, RECURRENT_LENGTHS, 0.1, needs))
    return found


def growth(records: Sequence[Record], provider: str) -> tuple[float, float] | None:
    """a and b of t = a + b S by least squares, milliseconds, over one row's steps; None with fewer than two lengths."""
    points = [
        (record["length"], record["median_ms"])
        for record in records
        if (record["pass"], record["batch"], record["provider"]) == (STEP, 1, provider)
    ]
    if len({length for length, _ in points}) < 2:
        return None
    lengths, times = zip(*points, strict=True)
    middle, mean = sum(lengths) / len(points), sum(times) / len(points)
    slope = sum((x - middle) * (t - mean) for x, t in points) / sum((x - middle) ** 2 for x in lengths)
    return mean - slope * middle, slope


def growth_verdict(records: Sequence[Record]) -> Record:
    """Whether a step grows with the cache hardly faster than one reading of it."""
    ours, read = growth(records, OURS), growth(records, READ)
    ratio = read[1] / ours[1] if ours and read else None
    lacking = [] if ratio is not None else ["two lengths"]
    reached = ratio is not None and ratio >= 1 / MOST_READS
    return {
        "bar": f"growth of a step with the cache, at most {MOST_READS} times that of reading it",
        "least": 1 / MOST_READS,
        "ratio": ratio,
        "against": READ,
        "lacks": lacking,
        "verdict": "unmeasured" if lacking else "met" if reached else "not met",
    }


def tokens_verdict(records: Sequence[Record]) -> Record:
    """Whether all providers chose the same tokens."""
    shares = [(record["same_tokens"], record["provider"]) for record in records if record["same_tokens"] is not None]
    least, name = min(shares, default=(None, None))
    return {
        "bar": "the same tokens",
        "least": 1.0,
        "ratio": least,
        "against": name,
        "lacks": [] if shares else ["tokens of transformers"],
        "verdict": "unmeasured" if not shares else "met" if least == 1.0 else "not met",
    }


def verdicts(records: Sequence[Record], environment: Record, options: argparse.Namespace) -> list[Record]:
    """Of all bars; of a checkpoint only whether its tokens are the same."""
    if options.checkpoint is not None:
        return [tokens_verdict(records)]
    of_bars = [bar.verdict(records, environment) for bar in bars(options.recurrent, options.compile)]
    return [tokens_verdict(records), *of_bars, growth_verdict(records)]


def growth_lines(records: Sequence[Record]) -> str:
    """The fits t = a + b S, a line for each provider."""
    names = dict.fromkeys(record["provider"] for record in records if record["pass"] == STEP)
    found = {name: growth(records, name) for name in names}
    return "\n".join(
        f"{name}: {fit[0]:.3f} ms + {1e3 * fit[1]:.4f} µs for each token of the cache"
        for name, fit in found.items()
        if fit
    )


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Milliseconds of a step over the prompt, a panel for each number of rows, and one for recurrent mixers."""
    groups = sorted({(record["pass"], record["batch"]) for record in records if record["pass"] in (STEP, RECURRENT)})
    groups.sort(key=lambda group: (group[0] == RECURRENT, group[1]))
    figure, panels = new_figure(len(groups), width=WIDTH + 80)
    for axes, (what, batch) in zip(panels, groups, strict=True):
        here = [record for record in records if (record["pass"], record["batch"]) == (what, batch)]
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for record in here:
            x, y = curves.setdefault(record["provider"], ([], []))
            x.append(record["length"])
            y.append(record["median_ms"])
        title = "recurrent mixers, 1 row" if what == RECURRENT else f"softmax attention, {batch} row{'s' * (batch > 1)}"
        draw_curves(
            axes, curves, title=title, x_label="tokens of the prompt", y_label="ms of a step", log_x=True, log_y=True
        )
    return figure


def leave(environment: Record, options: argparse.Namespace, records: Sequence[Record]) -> None:
    """Write JSON, table and picture, and print the table."""
    found = verdicts(records, environment, options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    path = options.out / f"{results.file_stem('decode', environment)}.json"
    content = {"benchmark": "decode", "environment": environment, "settings": settings}
    results.write_json(path, content | {"results": list(records), "bars": found})
    clock = "processor time" if options.clock == "cpu" else "time by the clock"
    sections = [
        f"{results.headline(environment)}, {clock}",
        results.text_table(records, COLUMNS),
        FOOTNOTE,
        growth_lines(records),
        "\n".join(["bars", *results.verdict_lines(found)]),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    replace_text(path.with_suffix(".txt"), text)
    save_figure(drawn(records), path.with_suffix(".png"))
    print(f"{text}\nwritten: {path}, .txt, .png")
