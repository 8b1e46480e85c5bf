"""What whole generations cost, mixer beside mixer: the part of `task=decode_cost` that sums over steps and samples."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from matplotlib.axes import Axes
from rich.table import Table

from longmix.analysis.cost_model import Cost
from longmix.analysis.generation_cost import GenerationCost, break_even, coverage, generation_cost, samples_for
from longmix.model.backbone import LanguageModel
from longmix.reporting.plots import decimal_axis_below, draw_curves

GIGA = 1e9
"""eFLOP in a GeFLOP."""


@dataclass(frozen=True)
class Generations:
    """Which generations are counted.

    Attributes:
        contexts: tokens of prompts, ascending.
        generated: tokens of each sample, ascending.
        samples: how many go on from each prompt, ascending.
        batch: prompts whose samples are decoded together.
        shared_prompt: see `generation_cost`.
        intensity: FLOP per byte.
    """

    contexts: Sequence[int]
    generated: Sequence[int]
    samples: Sequence[int]
    batch: int
    shared_prompt: bool
    intensity: float

    def costs(self, models: Mapping[str, LanguageModel]) -> "Costs":
        """The costs of these generations with each of some models, counted when they are first asked for."""
        return Costs(self, models)


class Costs:
    """Costs of generations by the name of the model.

    Args:
        asked: the generations.
        models: by name, the first the one that is evaluated.
    """

    def __init__(self, asked: Generations, models: Mapping[str, LanguageModel]) -> None:
        self.asked, self.models = asked, models
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str, context: int, new: int, samples: int) -> GenerationCost:
        asked = self.asked
        model, shared = self.models[name], asked.shared_prompt
        return generation_cost(model, context, new, samples, batch=asked.batch, shared_prompt=shared)

    def total(self, name: str, context: int, new: int, samples: int) -> float:
        """eFLOP of all samples."""
        return self.cost(name, context, new, samples).total(self.asked.intensity)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each model, context, and numbers of tokens and of samples."""
        asked = self.asked
        return [
            {"mixer": name, "context": context, "generated": new, "samples": samples}
            | numbers(self.cost(name, context, new, samples), asked.intensity)
            for name, context, new, samples in product(self.models, asked.contexts, asked.generated, asked.samples)
        ]

    def break_even(self) -> list[dict[str, Any]]:
        """Which model is cheaper than which from which context on, for every pair of which one wins in the end."""
        found = []
        for pair, new, samples in product(combinations(self.models, 2), self.asked.generated, self.asked.samples):
            for one, other in (pair, pair[::-1]):
                context = self._break_even(one, other, new, samples)
                if context is not None:
                    row = {"cheaper": one, "dearer": other, "generated": new, "samples": samples}
                    found.append({**row, "context": context})
        return found

    def _break_even(self, cheaper: str, dearer: str, new: int, samples: int) -> int | None:
        def is_cheaper(context: int) -> bool:
            return self.total(cheaper, context, new, samples) < self.total(dearer, context, new, samples)

        return break_even(self.asked.contexts, is_cheaper)

    def covered(self, correct: Mapping[str, Sequence[int]], attempts: int) -> list[dict[str, Any]]:
        """The coverage of each model with scores."""
        return [
            {"mixer": name, "samples": samples, "coverage": coverage(right, attempts, samples)}
            for name, right in correct.items()
            for samples in self.asked.samples
        ]

    def at_equal_coverage(self, correct: Mapping[str, Sequence[int]], attempts: int) -> list[dict[str, Any]]:
        """What each model with scores costs when it covers as much as the first of them does with some samples.

        `samples` and `total` are None where all its attempts cover less.
        """
        rows: list[dict[str, Any]] = []
        asked, first = self.asked, next(iter(correct.values()), None)
        if first is None:
            return rows
        for context, new, samples in product(asked.contexts, asked.generated, asked.samples):
            least = coverage(first, attempts, samples)
            for name, right in correct.items():
                needed = samples_for(right, attempts, least)
                total = None if needed is None else self.total(name, context, new, needed)
                row = {"context": context, "generated": new, "coverage": least, "mixer": name}
                rows.append({**row, "samples": needed, "total": total})
        return rows


def numbers(cost: Cost, intensity: float) -> dict[str, float]:
    """The counts of a cost, and its eFLOP."""
    counts = ("parameter_flops", "mixing_flops", "weight_bytes", "state_bytes", "held_bytes")
    sums = {"parameters": cost.parameters(intensity), "mixing": cost.mixing(intensity), "total": cost.total(intensity)}
    return {name: getattr(cost, name) for name in counts} | sums


def generation_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """The costs for each number of samples, the contexts at which one becomes cheaper, and costs at equal coverage."""
    for samples in sorted({row["samples"] for row in report["generations"]}):
        yield _cost_table([row for row in report["generations"] if row["samples"] == samples], samples)
    if report["break_even"]:
        yield _break_even_table(report["break_even"])
    if report["equal_coverage"]:
        yield _coverage_table(report["equal_coverage"])


def _cost_table(rows: list[dict[str, Any]], samples: int) -> Table:
    generated = sorted({row["generated"] for row in rows})
    several = "a generation" if samples == 1 else f"{samples:,} generations from one prompt"
    table = Table(title=f"{several}: GeFLOP by generated tokens, and MB held at the end of the longest")
    for heading in ("context", "mixer", *(f"{new:,}" for new in generated), "MB held"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right", no_wrap=heading == "context")
    keys = dict.fromkeys((row["context"], row["mixer"]) for row in rows)
    for context, name in sorted(keys, key=lambda key: key[0]):
        own = [row for row in rows if (row["context"], row["mixer"]) == (context, name)]
        cells = [f"{row['total'] / GIGA:,.2f}" for row in own]
        table.add_row(f"{context:,}", name, *cells, f"{own[-1]['held_bytes'] / 1e6:,.2f}")
    return table


def _break_even_table(rows: list[dict[str, Any]]) -> Table:
    generated, samples = sorted({row["generated"] for row in rows}), max(row["samples"] for row in rows)
    of = "a generation costs" if samples == 1 else f"{samples:,} generations cost"
    table = Table(title=f"the first context from which on {of} less, by generated tokens")
    for heading in ("with", "than with", *(f"{new:,}" for new in generated)):
        table.add_column(heading, justify="left" if "with" in heading else "right")
    for one, other in dict.fromkeys((row["cheaper"], row["dearer"]) for row in rows if row["samples"] == samples):
        own = {row["generated"]: row["context"] for row in rows if _is_of(row, one, other, samples)}
        table.add_row(one, other, *(f"{own[new]:,}" if new in own else "-" for new in generated))
    return table


def _is_of(row: Mapping[str, Any], cheaper: str, dearer: str, samples: int) -> bool:
    return (row["cheaper"], row["dearer"], row["samples"]) == (cheaper, dearer, samples)


def _coverage_table(rows: list[dict[str, Any]]) -> Table:
    context, new = rows[-1]["context"], rows[-1]["generated"]
    table = Table(title=f"right answers among samples of {new:,} tokens after {context:,}, and what they cost")
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    for heading in ("coverage", *(heading for name in names for heading in (f"{name}: samples", "GeFLOP"))):
        table.add_column(heading, justify="right")
    shown = [row for row in rows if (row["context"], row["generated"]) == (context, new)]
    for start in range(0, len(shown), len(names)):
        group = shown[start : start + len(names)]
        cells = [text for row in group for text in _samples_and_cost(row)]
        table.add_row(f"{group[0]['coverage']:.3f}", *cells)
    return table


def _samples_and_cost(row: Mapping[str, Any]) -> tuple[str, str]:
    return ("-", "-") if row["samples"] is None else (f"{row['samples']:,}", f"{row['total'] / GIGA:,.2f}")


def panels_of(report: Mapping[str, Any]) -> int:
    """How many panels `draw_generations` needs."""
    return (2 if report["generations"] else 0) + bool(report["coverage"])


def draw_generations(axes: Sequence[Axes], report: Mapping[str, Any]) -> None:
    """eFLOP of a generation by context and by its length, for the most samples; and coverage by cost."""
    rows = report["generations"]
    if not rows:
        return
    context, new, samples = (max(row[key] for row in rows) for key in ("context", "generated", "samples"))
    of = "a generation" if samples == 1 else f"{samples:,} samples"
    by_context = _curves([row for row in rows if (row["generated"], row["samples"]) == (new, samples)], "context")
    by_length = _curves([row for row in rows if (row["context"], row["samples"]) == (context, samples)], "generated")
    words: dict[str, Any] = {"y_label": "GeFLOP", "log_x": True, "log_y": True}
    draw_curves(axes[0], by_context, title=f"{of} of {new:,} tokens", x_label="tokens of context", **words)
    draw_curves(axes[1], by_length, title=f"{of} after {context:,} tokens", x_label="generated tokens", **words)
    if report["coverage"]:
        _draw_coverage(axes[2], report, context, new)


def _curves(rows: list[dict[str, Any]], along: str) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        x, y = curves.setdefault(row["mixer"], ([], []))
        x.append(row[along])
        y.append(row["total"] / GIGA)
    return curves


def _draw_coverage(axes: Axes, report: Mapping[str, Any], context: int, new: int) -> None:
    total = {
        (row["mixer"], row["samples"]): row["total"]
        for row in report["generations"]
        if (row["context"], row["generated"]) == (context, new)
    }
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in report["coverage"]:
        x, y = curves.setdefault(row["mixer"], ([], []))
        x.append(total[row["mixer"], row["samples"]] / GIGA)
        y.append(row["coverage"])
    title = f"right answers, {new:,} tokens\nafter {context:,}"
    draw_curves(axes, curves, title=title, x_label="GeFLOP", y_label="coverage")
    decimal_axis_below(axes, [cost for x, _ in curves.values() for cost in x])
    axes.set_ylim(0, 1.05)
