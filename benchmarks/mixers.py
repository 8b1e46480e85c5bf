"""All mixers on one page, at equal size and equal tokens: recall of associations, and speeches.

    python -m benchmarks.mixers                        # all; the same command goes on where it was broken off
    python -m benchmarks.mixers flash kda rwkv7 --tasks recall --seeds 0 1
    python -m benchmarks.mixers --check                # which width each model gets; trains nothing

    recall      experiment=mqar, two layers of 64 channels: the share of values that are recalled in rows of 64 tokens
    speeches    the default model and corpus in rows of 1,024: bits/byte

On speeches every mixer is as its file in configs/mixer says, but for `SPEECHES`. Rows of recall are short, so windows
and blocks are at most 8 tokens there, with few neighbours, and a memory is one head with as many keys as the model has
channels; it convolves 4 tokens where it can. The feed-forward takes up what the mixer leaves (`match.parameters`).
Leaves JSON, a Markdown table and a picture.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import longmix
from benchmarks import arms, results
from benchmarks.arms import Arm, cell, mean, spread
from benchmarks.command import Parser, positive
from benchmarks.results import Record
from longmix.composing import composed
from longmix.config import Plain, locate
from longmix.reporting.plots import AROUND, drawing, new_figure, set_title
from longmix.reporting.style import SOFT, nth_style

DESCRIPTION = "All mixers at equal size and equal tokens: recall of associations, and speeches."
MIXERS = sorted(path.stem for path in (results.ROOT / "configs" / "mixer").glob("*.yaml"))
TASKS = ("recall", "speeches")
SEEN = 8
"""Tokens of a window or block of recall, whose rows have 64."""

NEIGHBOURS = ("past_blocks", "local", "stride", "blocks", "buckets", "clusters")
"""Settings of which recall takes the value for small models: how many blocks, or parts of the keys, a query sees."""

MEMORY: Mapping[str, object] = {"num_heads": 1, "key_factor": 1.0, "convolution": 4}
"""Settings of recall of mixers that convolve; Mamba-2's heads share their keys already."""


SPEECHES: Mapping[str, str] = {"nsa": "compress_hidden=8"}
"""A setting of speeches, where a mixer as its file says has more weights than the whole model may have."""


def settings_of_recall(mixer: str) -> Plain:
    """What a mixer has in recall besides its file, so that it neither sees the whole row nor forgets at once."""
    node: Plain = composed("train", [f"mixer={mixer}"]).content["mixer"]
    kind: Any = locate(node["_target_"], "mixer")
    seen = {name: max(least, min(node[name], SEEN)) for name, least in kind.sizes.items() if node.get(name)}
    few = {name: value for name, value in kind.small.items() if node.get(name) and name in NEIGHBOURS}
    names = ("convolution",) if mixer == "mamba2" else MEMORY if "convolution" in node else ()
    return {**seen, **few, **{name: MEMORY[name] for name in names if name in node}}


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """Every mixer's arms, those of a mixer behind each other."""
    return [
        Arm(f"{task}: {mixer}", (*words_of(task, mixer, options), *options.word, f"seed={seed}"))
        for seed in options.seeds
        for mixer in options.mixers
        for task in options.tasks
    ]


def words_of(task: str, mixer: str, options: argparse.Namespace) -> list[str]:
    """The words of an arm without its seed."""
    if task == "recall":
        own = [f"mixer.{name}={value}" for name, value in settings_of_recall(mixer).items()]
        words = ["experiment=mqar", f"max_steps={options.steps}", f"loop.checkpoint_every={options.steps}"]
        return [*words, f"match.parameters={options.recall_parameters}", "match.multiple=1", f"mixer={mixer}", *own]
    rows = max(1, options.step_tokens // options.length)
    words = [f"seq_len={options.length}", f"batch_size={rows}", f"max_tokens={options.tokens}"]
    own = [f"mixer.{SPEECHES[mixer]}"] if mixer in SPEECHES else []
    return [*words, f"match.parameters={options.parameters}", "match.multiple=1", f"mixer={mixer}", *own]


def examined(loaded: longmix.Loaded, place: Path, tokens: int) -> Record:
    """Recall or bits/byte at the trained length, and what a row's state takes there."""
    length = loaded.config["seq_len"]
    task = "accuracy" if "task" in loaded.config["data"] else "loss"
    words = {"batch_size": 1 if task == "loss" else 64, "max_tokens": tokens, "output": str(place)}
    report = loaded.evaluate(task, seq_len=length, **words)
    (found,) = report["lengths"].values()
    return {**found, "state_bytes": loaded.model.state_bytes(length)}


def of_arm(records: Sequence[Record], task: str, mixer: str) -> list[Record]:
    """Records of a mixer in a task, of all seeds."""
    return [record for record in records if record["arm"] == f"{task}: {mixer}"]


def ordered(records: Sequence[Record]) -> list[str]:
    """The mixers, the best on speeches first, else the best in recall."""
    names = dict.fromkeys(record["arm"].partition(": ")[2] for record in records)

    def rank(mixer: str) -> tuple[float, float]:
        bits = mean(of_arm(records, "speeches", mixer), "bits_per_byte")
        recall = mean(of_arm(records, "recall", mixer), "accuracy")
        return (float("inf") if bits is None else bits, 0.0 if recall is None else -recall)

    return sorted(names, key=rank)


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each mixer, means over the seeds."""
    common = ("seeds differ by", "parameters", "seconds")
    lines = [["mixer", "bits/byte", *common, "tokens/s", "state, bytes", "recall", *common, "state, bytes"]]
    for mixer in ordered(records):
        line = [f"`{mixer}`"]
        for task, measure in (("speeches", "bits_per_byte"), ("recall", "accuracy")):
            found = of_arm(records, task, mixer)
            differ = spread(found, measure) if len(found) > 1 else None
            line += [cell(mean(found, measure), ".4f"), cell(differ, ".4f"), cell(mean(found, "parameters"), ",.0f")]
            line += [cell(mean(found, "seconds"), ",.0f")]
            line += [cell(mean(found, "tokens_per_second"), ",.0f")] if task == "speeches" else []
            line += [cell(mean(found, "state_bytes"), ",.0f")]
        lines.append(line)
    return arms.markdown(lines, 1)


PANELS: Sequence[tuple[str, str, str, bool]] = (
    ("speeches", "bits_per_byte", "bits/byte on speeches", False),
    ("recall", "accuracy", "share of values recalled (MQAR)", False),
    ("speeches", "tokens_per_second", "tokens per second in training", False),
    ("speeches", "state_bytes", "bytes of a row's state", True),
)
"""Task, measure, its name, and whether its axis is logarithmic."""


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """A line for each mixer, and beside each other what it is worth and what it costs."""
    mixers = ordered(records)
    panels = [panel for panel in PANELS if any(record["arm"].startswith(panel[0]) for record in records)]
    title = "All mixers at equal size and equal tokens"
    figure, places = new_figure(len(panels), len(panels), width=330, height=15 * len(mixers) + AROUND, title=title)
    for axes, (task, measure, name, is_log) in zip(places, panels, strict=True):
        numbers = {mixer: [record[measure] for record in of_arm(records, task, mixer)] for mixer in mixers}
        _draw(axes, numbers)
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_major_formatter("{x:.0e}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        set_title(axes, name)
    return figure


def _draw(axes: Axes, numbers: Mapping[str, Sequence[float]]) -> None:
    """A thin line for each mixer, and a dot on it for each seed."""
    for height, found in enumerate(numbers.values()):
        axes.axhline(height, color=SOFT, linewidth=0.3, zorder=0)
        axes.plot(found, [height] * len(found), "o", markersize=4, color=nth_style(0).light, clip_on=False)
    axes.set_yticks(range(len(numbers)), numbers)
    axes.set_ylim(len(numbers) - 0.5, -0.5)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.mixers", description=DESCRIPTION)
    add = parser.add_argument
    add("mixers", nargs="*", metavar="MIXER", help="of configs/mixer; default: all")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--steps", type=positive(int), default=800, help="of recall, of 4,096 tokens each")
    add("--tokens", type=positive(float), default=400_000, help="of speeches")
    add("--length", type=positive(int), default=1024, help="tokens of a row of speeches")
    add("--step-tokens", type=positive(int), default=2048, help="about so many tokens of a step on speeches")
    add("--recall-parameters", type=positive(int), default=160_000, help="of every model of recall")
    add("--parameters", type=positive(int), default=1_270_000, help="of every model of speeches")
    add("--evaluated", type=positive(int), default=65_536, help="about so many tokens")
    arms.add_options(parser, "mixers")
    options = parser.parse_args(arguments)
    if unknown := set(options.mixers) - set(MIXERS):
        parser.error(f"there is no mixer {', '.join(sorted(unknown))}; there are {', '.join(MIXERS)}")
    options.mixers, options.tokens = options.mixers or MIXERS, int(options.tokens)
    if not options.check:
        parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write and print; 1 if an arm failed."""
    options = parse(arguments)
    asked = {"evaluated": options.evaluated}
    return arms.main(
        arms_of(options),
        options,
        lambda loaded, place: examined(loaded, place, options.evaluated),
        asked,
        table,
        drawn,
    )


if __name__ == "__main__":
    sys.exit(main())
