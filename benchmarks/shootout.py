"""Mixers beside each other, each at its best learning rate, at equal size and equal tokens.

    python -m benchmarks.shootout                              # hours; the same command goes on where it was broken off
    python -m benchmarks.shootout flash 'gated_deltanet*3+flash flash.rotary_base=null' --factors 0.5 1 2 4
    python -m benchmarks.shootout --check                      # which width each model gets; trains nothing

A model is a mixer, or a pattern of several, and its settings. Each is trained on speeches with every learning rate, the
default ones times a factor, with the first seed. If the best of several factors, that with the fewest bits/byte, is the
smallest or largest of them, the next one on that side is tried too. With the best one the other seeds follow at the
same length, then each of `--longer` with the first seed. Of each trained model the loss by position is measured at the
trained length and at multiples of it, the gain of a needle (how much likelier its value is than without it, in nats a
token) and the bytes of a row's state; of its training the seconds and the peak of memory. Leaves JSON, a Markdown table
and a picture.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

import longmix
from benchmarks import arms
from benchmarks.arms import Arm, cell, mean, spread, words_of
from benchmarks.command import Parser, positive
from benchmarks.results import Record
from longmix.composing import composed
from longmix.errors import LongmixError
from longmix.reporting.plots import Curve, draw_curves, drawing, new_figure

DESCRIPTION = "Mixers beside each other, each at its best learning rate."
MODELS = ("flash", "sliding_window", "routing", "scatterbrain", "mlstm_tfla", "rwkv7", "gated_deltanet", "fox")
RATES = ("learning_rate", "adamw_learning_rate")
NEEDLES = 16


class Point(NamedTuple):
    """One run of a model: what its arm's name says."""

    model: str
    factor: float
    length: int
    seed: int

    @property
    def name(self) -> str:
        """The arm's name, which `of` reads."""
        return f"{self.model} x{self.factor:g} {self.length} seed={self.seed}"

    @classmethod
    def of(cls, record: Record) -> "Point":
        """The point of a record."""
        model, factor, length, seed = record["arm"].rsplit(" ", 3)
        return cls(model, float(factor[1:]), int(length), int(seed.removeprefix("seed=")))


def arm_of(point: Point, options: argparse.Namespace) -> Arm:
    """The run of a point."""
    words = [*words_of(point.model), *options.word]
    optimizer = composed("train", words).content["optimizer"]
    rates = [f"optimizer.{name}={optimizer[name] * point.factor:.6g}" for name in RATES if optimizer.get(name)]
    sizes = [f"seq_len={point.length}", f"batch_size={max(1, options.step_tokens // point.length)}"]
    sizes += [f"max_tokens={options.tokens}", f"match.parameters={options.parameters}", "match.multiple=1"]
    return Arm(point.name, (*sizes, *words, *rates, f"seed={point.seed}"))


def first_points(options: argparse.Namespace) -> list[Point]:
    """Every model with every factor."""
    return [Point(model, f, options.length, options.seeds[0]) for model in options.models for f in options.factors]


def best_of(records: Sequence[Record], model: str, options: argparse.Namespace) -> float | None:
    """The factor with which the first seed has the fewest bits/byte; None without a record."""
    same = (model, options.length, options.seeds[0])
    found = {
        point.factor: record["bits_per_byte"]
        for record in records
        for point in [Point.of(record)]
        if (point.model, point.length, point.seed) == same
    }
    return min(found, key=lambda factor: found[factor]) if found else None


def following(records: Sequence[Record], options: argparse.Namespace) -> Iterator[Point]:
    """What the records ask for: a factor beyond the best one, else the other seeds and lengths with the best one."""
    for model in options.models:
        best = best_of(records, model, options)
        if best is None:
            continue
        tried = {point.factor for point in map(Point.of, records) if point.model == model}
        if len(tried) > 1 and best in (min(tried), max(tried)) and len(tried) < options.most_factors:
            step = max(options.factors) / sorted(options.factors)[-2]
            yield Point(model, best / step if best == min(tried) else best * step, options.length, options.seeds[0])
            continue
        yield from (Point(model, best, options.length, seed) for seed in options.seeds)
        yield from (Point(model, best, length, options.seeds[0]) for length in options.longer)


def examined(loaded: longmix.Loaded, place: Path, options: argparse.Namespace) -> Record:
    """Loss by position at the trained length and beyond, the gain of a needle, and what a row's state takes."""
    length = loaded.config["seq_len"]
    words: dict[str, Any] = {"batch_size": 1, "output": str(place)}
    lengths = [length, *(length * times for times in options.beyond)]
    losses = {"seq_len": lengths, "max_tokens": options.evaluated, "task.loss.buckets": length}
    first, *beyond = loaded.evaluate("loss", **words, **losses)["lengths"].items()
    needles = loaded.evaluate("needle", **words, **{"seq_len": length, "task.needle.needles": NEEDLES})["cells"]
    longer = {str(at): {name: found[name] for name in ("bits_per_byte", "by_bucket")} for at, found in beyond}
    measured = {"beyond": longer, "needle_gain": mean(needles, "gain"), "state_bytes": loaded.model.state_bytes(length)}
    return first[1] | measured


def chosen(records: Sequence[Record], options: argparse.Namespace) -> dict[tuple[str, int], list[Record]]:
    """The records with each model's best factor, by model and length; the best model at the first length first."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        point = Point.of(record)
        if point.factor == best_of(records, point.model, options):
            found.setdefault((point.model, point.length), []).append(record)
    first = {model: mean(own, "bits_per_byte") or 0.0 for (model, n), own in found.items() if n == options.length}
    return dict(sorted(found.items(), key=lambda item: (item[0][1], first[item[0][0]])))


def table(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Markdown: a row for each model and length, means over the seeds; then bits/byte of each factor."""
    heads = ["model", "length", "best factor", "bits/byte", "seeds differ by", *(f"at {n}x" for n in options.beyond)]
    lines = [[*heads, "needle gain, nats", "parameters", "tokens/s", "seconds", "peak GiB", "state, bytes"]]
    for (model, length), own in chosen(records, options).items():
        peak = mean(own, "peak_memory_bytes")
        differ = spread(own, "bits_per_byte") if len(own) > 1 else None
        line = [f"`{model}`", f"{length:,}", f"{Point.of(own[0]).factor:g}", cell(mean(own, "bits_per_byte"), ".4f")]
        line += [cell(differ, ".4f")]
        line += [cell(mean(own, "beyond", str(n * length), "bits_per_byte"), ".4f") for n in options.beyond]
        line += [cell(mean(own, "needle_gain"), ".2f"), cell(mean(own, "parameters"), ",.0f")]
        line += [cell(mean(own, "tokens_per_second"), ",.0f"), cell(mean(own, "seconds"), ",.0f")]
        line += [cell(None if peak is None else peak / 2**30, ".2f"), cell(mean(own, "state_bytes"), ",.0f")]
        lines.append(line)
    return f"{arms.markdown(lines, 1)}\n\n{_table_of_factors(records, options)}"


def _table_of_factors(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Markdown: bits/byte of the first seed at the first length, a column for each factor."""
    curves = _curves_of_factors(records, options)
    factors = sorted({factor for factors, _ in curves.values() for factor in factors})
    lines = [["model", *(f"{factor:g}x" for factor in factors)]]
    for model, (tried, bits) in curves.items():
        known = dict(zip(tried, bits, strict=True))
        lines.append([f"`{model}`", *(cell(known.get(factor), ".4f") for factor in factors)])
    return arms.markdown(lines, 1)


def _curves_of_factors(records: Sequence[Record], options: argparse.Namespace) -> dict[str, Curve]:
    """Bits/byte over the factor of each model, of the first seed at the first length."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        point = Point.of(record)
        if (point.length, point.seed) == (options.length, options.seeds[0]):
            found.setdefault(point.model, []).append((point.factor, record["bits_per_byte"]))
    order = dict.fromkeys(model for model, _ in chosen(records, options))  # a colour means one model in all panels
    lines = {model: sorted(found[model]) for model in order}
    return {model: ([x for x, _ in points], [y for _, y in points]) for model, points in lines.items()}


@drawing()
def drawn(records: Sequence[Record], options: argparse.Namespace) -> Figure:
    """Bits/byte over the factor of the learning rate, and the loss by position at each length and beyond."""
    best = chosen(records, options)
    lengths = sorted({length for _, length in best})
    count = 1 + (1 + bool(options.beyond)) * len(lengths)
    figure, (first, *rest) = new_figure(count, title="Each mixer at its best learning rate")
    words: dict[str, Any] = {"log_x": True, "x_label": "learning rate, times the default", "y_label": "bits/byte"}
    draw_curves(first, _curves_of_factors(records, options), title=f"{options.length:,} tokens", **words)
    words |= {"x_label": "tokens of context, up to", "y_label": "nats per token"}
    for axes, length in zip(rest, lengths, strict=False):
        here = {model: own[0]["by_position"] for (model, other), own in best.items() if other == length}
        draw_curves(axes, _by_end(here), title=f"loss by position, {length:,} tokens", **words)
    for axes, length in zip(rest[len(lengths) :], lengths, strict=False):
        farthest = str(length * max(options.beyond))
        here = {model: own[0]["beyond"][farthest]["by_bucket"] for (model, n), own in best.items() if n == length}
        title = f"trained on {length:,} tokens, read on to {int(farthest):,}"
        draw_curves(axes, _by_end(here), title=title, **words | {"log_x": False})
    return figure


def _by_end(rows: Mapping[str, Sequence[Record]]) -> dict[str, Curve]:
    """Loss over the last position of each bucket."""
    return {model: ([row["end"] for row in own], [row["loss"] for row in own]) for model, own in rows.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.shootout", description=DESCRIPTION)
    add = parser.add_argument
    names = ", ".join(MODELS)
    add("models", nargs="*", metavar="MODEL", help=f"a mixer or a pattern, and its settings; default: {names}")
    add("--factors", nargs="+", type=positive(float), default=[0.5, 1.0, 2.0], help="of the default learning rates")
    add("--most-factors", type=positive(int), default=5, help="where the best one lies at the edge of those tried")
    add("--tokens", type=positive(float), default=3e6, help="of every run")
    add("--length", type=positive(int), default=2048, help="tokens of a row")
    add("--longer", nargs="*", type=positive(int), default=[8192], help="further lengths, with the best factor")
    add("--beyond", nargs="*", type=positive(int), default=[2, 4], help="multiples of the trained length to read on to")
    add("--step-tokens", type=positive(int), default=2048, help="of a step; at least one row")
    add("--parameters", type=positive(int), default=1_270_000, help="of every model")
    add("--evaluated", type=positive(int), default=131_072, help="about so many tokens")
    arms.add_options(parser, "shootout")
    parser.set_defaults(seeds=[0, 1])
    options = parser.parse_args(arguments)
    options.models, options.tokens = options.models or list(MODELS), int(options.tokens)
    for model in options.models:
        try:
            composed("train", [*words_of(model), *options.word])
        except LongmixError as error:
            parser.error(f"{model}: {error}")
    if not options.check:
        parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write and print; 1 if an arm failed."""
    options = parse(arguments)
    return arms.main(
        [arm_of(point, options) for point in first_points(options)],
        options,
        lambda loaded, place: examined(loaded, place, options),
        {"evaluated": options.evaluated, "needles": NEEDLES, "beyond": options.beyond},
        lambda records: table(records, options),
        lambda records: drawn(records, options),
        lambda records: [arm_of(point, options) for point in following(records, options)],
    )


if __name__ == "__main__":
    sys.exit(main())
