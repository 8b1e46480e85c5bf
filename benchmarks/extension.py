"""Loss by position of a trained model in rows longer than in training: as it is, interpolated, YaRN, a larger base.

    python -m benchmarks.extension runs/short --lengths 512 4096 --data sotu --also 'after training=runs/long'

The model is evaluated with each kind of positions, without training, as by `longmix evaluate checkpoint=RUN
mixer.NAME=VALUE`, on the same tokens. Checkpoints of `--also` are evaluated as they are. Leaves JSON, a Markdown table
and a picture.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

import longmix
from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.results import Record
from longmix.config import Choice, ModelConfig
from longmix.errors import LongmixError
from longmix.mixers.parts.rotary import Rotary
from longmix.reporting.plots import draw_curves, draw_trained, drawing, new_figure

AS_IT_IS, INTERPOLATED, YARN, LARGER_BASE = "as it is", "interpolation", "YaRN", "larger base"
DESCRIPTION = "Loss by position of a trained model in rows longer than in training, with several kinds of positions."
KINDS = (AS_IT_IS, INTERPOLATED, YARN, LARGER_BASE)


def settings_for(kind: str, rotary: Rotary, factor: float, trained: int) -> Record:
    """The mixer's settings for a kind of positions.

    The larger base is the one at which the slowest pair turns as far in the longer row as it did in the trained one,
    base * factor^(d / (d - 2)) (NTK-aware scaling).
    """
    if kind == INTERPOLATED:
        return {"rotary_scaling": "linear", "rotary_factor": factor}
    if kind == YARN:
        return {"rotary_scaling": "yarn", "rotary_factor": factor, "rotary_original_length": trained}
    if kind == LARGER_BASE:
        return {"rotary_base": rotary.base * factor ** (rotary.channels / max(rotary.channels - 2, 1))}
    return {}


def changes(loaded: longmix.Loaded, kind: str, factor: float, trained: int) -> Record:
    """These settings for the model's mixer, or for every member of its pattern that rotates."""
    if kind == AS_IT_IS:
        return {}
    mixer = ModelConfig.of(loaded.config).mixer
    rotations = {part.kind: getattr(part, "rotary", None) for part in loaded.model.mixers()}
    found = {
        choice.key: settings_for(kind, rotary, factor, trained)
        for choice in mixer.choices
        if (rotary := rotations.get(choice.key)) is not None
    }
    if not found:
        raise LongmixError("the model has no rotary positions; there is nothing to change.")
    return found["mixer"] if isinstance(mixer, Choice) else {key.partition(".")[2]: own for key, own in found.items()}


def measured(loaded: longmix.Loaded, options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """A record for each length."""
    for length in options.lengths:
        began = time.monotonic()
        words = {"data": options.data, "split": options.split, "max_tokens": options.tokens, "batch_size": 1}
        given = {name: value for name, value in words.items() if value is not None}
        with contextlib.redirect_stdout(sys.stderr):
            report = loaded.evaluate("loss", seq_len=length, output=str(folder), **given)
        yield {"length": length, **report["lengths"][length], "seconds": time.monotonic() - began}


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """All records: of each kind of positions, then of each further checkpoint."""
    also = dict(options.also)
    with progress((len(options.kinds) + len(also)) * len(options.lengths)) as (announce, finish):
        base = longmix.load(options.checkpoint, device="cpu")
        trained = options.trained or base.config["seq_len"]
        factor = max(options.lengths) / trained
        for name in (*options.kinds, *also):
            announce(name)
            mixer = {} if name in also else changes(base, name, factor, trained)
            loaded = longmix.load(also.get(name, options.checkpoint), device="cpu", mixer=mixer)
            for found in measured(loaded, options, folder):
                facts = {"name": name, "checkpoint": str(loaded.checkpoint), "mixer": mixer, "trained_length": trained}
                yield facts | found
                finish(f"{name} at {found['length']:,}: {found['loss']:.4f} nats/token, {found['seconds']:.0f} s")


def part(record: Record, start: int, end: int) -> float | None:
    """The mean loss at positions from `start` up to `end`; None where there are none."""
    rows = [row for row in record["by_position"] if start <= row["start"] and row["end"] <= end]
    count = sum(row["tokens"] for row in rows)
    return sum(row["loss"] * row["tokens"] for row in rows) / count if count else None


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each kind, with the loss at each length, and its part beyond the trained one."""
    lengths = sorted({record["length"] for record in records})
    trained = records[0]["trained_length"]
    longer = [length for length in lengths if length > trained]
    heads = [
        "positions",
        *(f"perplexity at {length:,}" for length in lengths),
        *(f"loss at {length:,}" for length in lengths),
        *(f"loss past {trained:,} of {length:,}" for length in longer),
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in dict.fromkeys(record["name"] for record in records):
        own = {record["length"]: record for record in records if record["name"] == name}
        cells = [f"{own[length]['perplexity']:.2f}" for length in lengths]
        cells += [f"{own[length]['loss']:.4f}" for length in lengths]
        cells += ["-" if (loss := part(own[n], trained, n)) is None else f"{loss:.4f}" for n in longer]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Loss by position at the largest length, a curve for each kind."""
    length, trained = max(record["length"] for record in records), records[0]["trained_length"]
    curves = {
        record["name"]: ([row["end"] for row in record["by_position"]], [row["loss"] for row in record["by_position"]])
        for record in records
        if record["length"] == length
    }
    figure, (axes,) = new_figure(1)
    title = f"Loss in rows of {length:,} tokens"
    draw_curves(axes, curves, title=title, x_label="tokens of context, up to", y_label="nats per token", log_x=True)
    draw_trained(axes, trained)
    return figure


def named(text: str) -> tuple[str, str]:
    """`NAME=CHECKPOINT`, for argparse."""
    name, equals, checkpoint = text.partition("=")
    if not (name and equals and checkpoint) or name in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=CHECKPOINT, and NAME none of {', '.join(KINDS)}")
    return name, checkpoint


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.extension", description=DESCRIPTION)
    parser.add_argument("checkpoint", help="folder of a run or checkpoint")
    parser.add_argument("--lengths", type=positive(int), nargs="+", required=True, help="tokens of rows")
    parser.add_argument("--trained", type=positive(int), help="tokens of a row in training; default: the checkpoint's")
    parser.add_argument("--data", help="a choice of data=; default: the checkpoint's own")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--tokens", type=positive(int), default=32_768, help="about so many of each length")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--also", type=named, action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--name", default="extension", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    return results.carry_out(options.name, options, lambda: measure(options, options.out / "evaluations"), table, drawn)


if __name__ == "__main__":
    sys.exit(main())
