"""A trained transformer with other mixers: what the transfer leaves, what each stage brings, and what that saves.

    python -m benchmarks.conversion runs/NAME gla mlstm_tfla 'gated_deltanet*3+flash'
    python -m benchmarks.conversion runs/smollm2 'gla num_heads=9' --ways distilled --prompt 'The union'

A model is a mixer, or a pattern of several, and its settings. Each is trained in three stages of so many tokens each:

    distilled   from the teacher's weights, on the outputs of its layers, then on its distributions, then on the text
    text        from the teacher's weights, on the text alone
    scratch     from random weights, on the text alone, at the teacher's sizes

The validation is before the first step, of what the transfer left, and after each stage. Of the trained models and of
the teacher the hits and the gain of a needle are measured (how much likelier its value is than without it, in nats a
token), and with a prompt there is the text that they write. The same command goes on where it was broken off. Leaves
JSON, a Markdown table and a picture.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

import longmix
from benchmarks import arms
from benchmarks.arms import Arm, cell, words_of
from benchmarks.command import Parser, positive
from benchmarks.results import Record
from longmix.composing import composed
from longmix.errors import LongmixError
from longmix.reading import read_json
from longmix.reporting.plots import Curve, draw_borders, draw_curves, drawing, new_figure

DESCRIPTION = "A trained transformer with other mixers, stage by stage."
WAYS = ("distilled", "text", "scratch")
TEACHER = "teacher"


class Student(NamedTuple):
    """One run: what its arm's name says."""

    model: str
    way: str

    @property
    def name(self) -> str:
        """The arm's name, which `of` reads."""
        return f"{self.model}, {self.way}"

    @classmethod
    def of(cls, record: Record) -> "Student":
        """That of a record."""
        return cls(*record["arm"].rsplit(", ", 1))


def stages_of(way: str, options: argparse.Namespace) -> str:
    """The word of the three stages; those of no tokens are left out."""
    objectives = ("layers", "logits", "tokens") if way == "distilled" else ("tokens",) * 3
    scales = [1.0] * 3 if way == "scratch" else options.scales
    stages = zip(objectives, options.tokens, scales, strict=True)
    return ",".join(
        f"{{objective:{objective},max_tokens:{tokens}{'' if scale == 1 else f',learning_rate_scale:{scale:g}'}}}"
        for objective, tokens, scale in stages
        if tokens
    )


def arm_of(student: Student, sizes: Mapping[str, object], options: argparse.Namespace) -> Arm:
    """The run of a student; `sizes` are the teacher's, for a model from scratch."""
    rows = max(1, options.step_tokens // options.length)
    words = [f"seq_len={options.length}", f"batch_size={rows}", "max_tokens=null", *words_of(student.model)]
    words += [f"stages=[{stages_of(student.way, options)}]", "loop.checkpoint_every=200", *options.word]
    if student.way == "scratch":
        words += [f"model.{name}={value}" for name, value in sizes.items()]
    else:
        words += [f"checkpoint={options.teacher}", "convert=true", *options.word_of_converted]
    return Arm(student.name, tuple(words))


def sizes_of(teacher: longmix.Loaded) -> dict[str, object]:
    """The numbers and flags of a teacher's model, such as its width and its layers."""
    node = teacher.config["model"]
    return {name: value for name, value in node.items() if isinstance(value, (int, float))}


def data_of(options: argparse.Namespace) -> dict[str, str]:
    """The students' data as words of an evaluation; those of a teacher may be others, or unknown."""
    words = [word.partition("=") for word in options.word if word.startswith(("data=", "data."))]
    given = {name: value for name, _, value in words if name != "data.validation_tokens"}
    return {"data": "sotu", **given}


def taught(loaded: longmix.Loaded, options: argparse.Namespace) -> Record:
    """The teacher's loss on the windows of the students' validations, and what is measured of them too.

    Raises:
        LongmixError: it cannot be evaluated so.
    """
    place = options.runs / TEACHER
    tokens = composed("train", options.word).content["data"]["validation_tokens"]
    words = {"seq_len": options.length, "batch_size": 1, "output": str(place), "max_tokens": tokens, **data_of(options)}
    (first,) = loaded.evaluate("loss", **words)["lengths"].values()
    return {"arm": TEACHER, "bits_per_byte": first["bits_per_byte"], **measured(loaded, place, options)}


def measured(loaded: longmix.Loaded, place: Path, options: argparse.Namespace) -> Record:
    """Needles of a model, and what it writes."""
    words = {"seq_len": options.length, "batch_size": 1, "output": str(place), **data_of(options)}
    words["task.needle.needles"] = options.needles
    cells = loaded.evaluate("needle", **words)["cells"] if options.needles else []
    found = {f"needle_{name}": arms.mean(cells, name) for name in ("token_accuracy", "gain")}
    if options.prompt is None:
        return found
    return found | {"text": loaded.generate(options.prompt, max_tokens=options.written, temperature=0)[0]}


def examined(loaded: longmix.Loaded, place: Path, options: argparse.Namespace) -> Record:
    """What the run's summary says of its stages, and what is measured of the trained model."""
    folder = place.parent
    summary = read_json(folder / "summary.json")
    points = [summary["validation_transferred"]] if "validation_transferred" in summary else []
    points += [stage["validation"] for stage in summary["stages"]]
    tokens = [0] * (len(points) - len(summary["stages"]))
    for stage in summary["stages"]:
        tokens.append((tokens[-1] if tokens else 0) + stage["steps"] * stage["tokens_per_step"])
    stages = {"tokens_seen": tokens, "bits_per_byte": [point["bits_per_byte"] for point in points]}
    return stages | {"stage_seconds": seconds_of_stages(folder / "metrics.csv"), **measured(loaded, place, options)}


def seconds_of_stages(path: Path) -> list[float]:
    """Seconds in the steps of each stage, by the speeds in a run's log."""
    found: dict[str, float] = {}
    before = 0.0
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["train/tokens"]:
                seen = float(row["train/tokens"])
                spent = (seen - before) / float(row["throughput/tokens_per_second"])
                found[row["train/stage"]] = found.get(row["train/stage"], 0.0) + spent
                before = seen
    return [found[stage] for stage in sorted(found, key=float)]


def table(records: Sequence[Record], teacher: Record, options: argparse.Namespace) -> str:
    """Markdown: a row for each run, with bits/byte after the transfer and after each stage."""
    after = [f"after {tokens:,} tokens" for tokens in _borders(options)]
    heads = ["model", "weights from", "transfer", *after, "seconds of the stages"]
    lines = [[*heads, "needle tokens found", "needle gain, nats", "tokens/s"]]
    lines.append([TEACHER, "", cell(teacher["bits_per_byte"], ".4f"), *[""] * (len(after) + 1), *_needles(teacher), ""])
    for record in records:
        student = Student.of(record)
        bits = [cell(value, ".4f") for value in record["bits_per_byte"]]
        bits = ["", *bits] if student.way == "scratch" else bits
        seconds = ", ".join(f"{value:,.0f}" for value in record["stage_seconds"])
        speed = cell(record["tokens_per_second"], ",.0f")
        lines.append([f"`{student.model}`", student.way, *bits, seconds, *_needles(record), speed])
    written = [f"{record['arm']}: {record['text']!r}" for record in (teacher, *records) if "text" in record]
    return "\n\n".join([arms.markdown(lines, 2), *written])


def _needles(record: Record) -> list[str]:
    return [cell(record["needle_token_accuracy"], ".2f"), cell(record["needle_gain"], ".2f")]


def _borders(options: argparse.Namespace) -> list[int]:
    """Tokens seen by the end of each stage that there is."""
    ends = [sum(options.tokens[: count + 1]) for count in range(3)]
    return list(dict.fromkeys(end for end in ends if end))


def _short_names(models: Collection[str]) -> dict[str, str]:
    """Each model's pattern alone, or the model with its settings where another has the same pattern."""
    patterns = Counter(model.split()[0] for model in models)
    return {model: model.split()[0] if patterns[model.split()[0]] == 1 else model for model in models}


@drawing()
def drawn(records: Sequence[Record], teacher: Record, options: argparse.Namespace) -> Figure:
    """Bits/byte over the tokens seen, a panel for each way, with the teacher's as a line."""
    ways = [way for way in WAYS if any(Student.of(record).way == way for record in records)]
    figure, panels = new_figure(len(ways), title="A transformer with other mixers")
    names = _short_names(dict.fromkeys(Student.of(record).model for record in records))
    for axes, way in zip(panels, ways, strict=True):
        found = {Student.of(record): record for record in records}
        curves: dict[str, Curve] = {  # a colour means one model in all panels
            name: (found[Student(model, way)]["tokens_seen"], found[Student(model, way)]["bits_per_byte"])
            for model, name in names.items()
            if Student(model, way) in found
        }
        draw_curves(axes, curves, title=way, x_label="tokens", y_label="bits/byte")
        axes.axhline(teacher["bits_per_byte"], color="0.5", linestyle=":", linewidth=1)
        draw_borders(axes, _borders(options)[:-1])
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.conversion", description=DESCRIPTION)
    add = parser.add_argument
    add("teacher", metavar="RUN", help="a run, or an imported model")
    add("models", nargs="+", metavar="MODEL", help="a mixer or a pattern, and its settings")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add(
        "--tokens", nargs=3, type=int, default=[200_000, 200_000, 200_000], metavar="N", help="of each stage; 0 is none"
    )
    add(
        "--scales",
        nargs=3,
        type=positive(float),
        default=[1.0] * 3,
        metavar="X",
        help="on the learning rates of runs with the teacher's weights",
    )
    add("--length", type=positive(int), default=1024, help="tokens of a row")
    add("--step-tokens", type=positive(int), default=4096, help="of a step; at least one row")
    add("--needles", type=int, default=16, help="at each depth; 0 for none")
    add("--prompt", help="let the models go on from it")
    add("--written", type=positive(int), default=64, help="tokens that they write")
    add("--word-of-converted", action="append", default=[], metavar="WORD", help="of runs with the teacher's weights")
    arms.add_options(parser, "conversion")
    options = parser.parse_args(arguments)
    if min(options.tokens) < 0 or not sum(options.tokens):
        parser.error("--tokens must be three numbers from 0, not all of them 0")
    if not options.check:
        parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write and print; 1 if a run failed."""
    options = parse(arguments)
    try:
        loaded = longmix.load(options.teacher, device="cpu")
        teacher = {} if options.check else taught(loaded, options)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    ways = ["scratch"] if options.check else options.ways  # whose words say the sizes, which others have of the teacher
    students = [Student(model, way) for model in options.models for way in ways]
    asked = {name: getattr(options, name) for name in ("needles", "prompt", "written")}
    return arms.main(
        [arm_of(student, sizes_of(loaded), options) for student in students],
        options,
        lambda trained, place: examined(trained, place, options),
        asked,
        lambda records: table(records, teacher, options),
        lambda records: drawn(records, teacher, options),
    )


if __name__ == "__main__":
    sys.exit(main())
