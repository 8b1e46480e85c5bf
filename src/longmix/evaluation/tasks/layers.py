"""`evaluate.py task=layers`: the residual stream layer by layer, at the end of windows and by blocks of positions."""

import math
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from longmix.analysis.layers import (
    OF_LAYER,
    LayerReading,
    measures_of_layer,
    measures_of_neighbours,
    read_layers,
)
from longmix.batch import IGNORE_INDEX, Batch, first_tokens
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.evaluation.memory import check_memory
from longmix.evaluation.prefill import read_rows
from longmix.evaluation.subject import TOKENS_AT_ONCE, Subject
from longmix.evaluation.tasks.attention_pictures import evenly
from longmix.evaluation.tasks.base import Answer, Task
from longmix.progress import tracked
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix.reporting.style import nth_style

LARGEST_COUNT = 2**40
"""The largest number of tokens and windows."""

LEAST_TOKENS = 2
"""Fewer hidden states have no spread."""

COLUMNS = {
    "spectral_entropy": ("entropy", ".3f"),
    "effective_rank": (">1 %", ".1f"),
    "eigenvalue_rank": ("rank", ".2f"),
    "trace_covariance": ("spread", ".3g"),
    "cosine": ("cosine", ".3f"),
    "distance": ("distance", ".3g"),
    "angle": ("angle", ".3f"),
}
"""The measures in the table, each with heading and format."""

MOST_LINES = 6
"""The most layers whose blocks are drawn; of more, so many evenly spread ones."""

Values = list[dict[str, list[float]]]
"""By layer, and by measure: the value of each window."""


class Layers(Task):
    """Measures of the hidden states of every layer, see `longmix.analysis.layers`.

    Args:
        length: tokens of a window; None takes those of training.
        windows: how many windows, evenly spread over the split.
        tokens: at the end of each window, which are measured.
        blocks: measure blocks of positions too.
        block: positions of a block.

    Raises:
        ConfigError: an impossible number.
    """

    name = "layers"

    def __init__(
        self, length: int | None = None, windows: int = 16, tokens: int = 256, blocks: bool = True, block: int = 512
    ) -> None:
        for name, number, least in (("length", length, 2), ("windows", windows, 1), ("tokens", tokens, LEAST_TOKENS)):
            if number is not None and not least <= number <= LARGEST_COUNT:
                raise ConfigError(f"task.{name}={number} must be from {least} to {LARGEST_COUNT}.")
        if not LEAST_TOKENS <= block <= TOKENS_AT_ONCE:
            raise ConfigError(f"task.block={block} must be from {LEAST_TOKENS} to {TOKENS_AT_ONCE} positions.")
        self.length, self.windows, self.tokens, self.blocks, self.block = length, windows, tokens, blocks, block

    def ask(self, subject: Subject) -> Answer:
        """Read the windows.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "length", "windows", "tokens", "layers": [{"name",
            measure: {"mean", "error"}}], "blocks": [{"start", "end", "windows", "layers": [{measure: mean}]}]}`. The
            first layer is the embedding, which none is before; `error` is the standard error over windows, None
            of a single one. Blocks are of positions in the window.

        Raises:
            ConfigError: windows of one token, or more memory than there is.
            DataError: the split has fewer tokens than `length`.
        """
        length = subject.trained_seq_len if self.length is None else self.length
        if length < LEAST_TOKENS:
            raise ConfigError(f"the model was trained on windows of {length} token; give task.length from 2 on.")
        subject.check_length(length, "task.length")
        check_memory(subject.model, min(length, TOKENS_AT_ONCE), subject.restored, f"task.length={length}")
        names = ["embedding", *(type(mixer).__name__ for mixer in subject.model.mixers())]
        values: Values = [{} for _ in names]
        blocks: dict[int, Values] = {}
        count = 0
        loader = subject.data.evaluation_loader(subject.split, length, 1, self.windows * length)
        for batch in tracked(loader, f"windows of {length} tokens", len(loader)):
            row = _filled(batch)
            if row["tokens"].shape[1] < LEAST_TOKENS:
                continue
            with read_layers(subject.model, self.tokens, self.block if self.blocks else None) as readings:
                read_rows(subject, to_device(row, subject.restored.device))
            _note(values, blocks, readings)
            count += 1
        report = {**subject.heading(), "length": length, "windows": count, "tokens": min(self.tokens, length)}
        report["layers"] = [
            {"name": name, **{measure: _mean(found) for measure, found in of_layer.items()}}
            for name, of_layer in zip(names, values, strict=True)
        ]
        report["blocks"] = [
            {
                "start": number * self.block,
                "end": min((number + 1) * self.block, length),
                "windows": len(of_block[0][OF_LAYER[0]]),
                "layers": [{measure: fmean(found) for measure, found in layer.items()} for layer in of_block],
            }
            for number, of_block in sorted(blocks.items())
        ]
        settings: dict[str, Any] = {"length": length, "windows": self.windows, "tokens": self.tokens}
        return Answer(report, settings | {"blocks": self.block if self.blocks else None})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the mean of each measure of each layer, from 0, after the embedding."""
        return {
            f"{measure}/layer_{index}": found["mean"]
            for index, layer in enumerate(answer.report["layers"][1:])
            for measure, found in layer.items()
            if measure != "name"
        }

    def tables(self, answer: Answer) -> Iterator[Table]:
        """The mean of each measure of each layer."""
        report = answer.report
        table = Table(
            title=f"hidden states of the last {report['tokens']:,} tokens of {report['windows']:,} windows of "
            f"{report['length']:,}: entropy of the singular values in nats, how many exceed 1 % of the largest, Roy "
            "and Vetterli's effective rank of their squares, sum of the channels' variances; and against the layer "
            "before: cosine, distance and angle of the means; standard errors are in the file"
        )
        table.add_column("layer", no_wrap=True)
        for heading, _ in COLUMNS.values():
            table.add_column(heading, justify="right")
        for index, layer in enumerate(report["layers"]):
            name = layer["name"] if index == 0 else f"{index - 1} {layer['name']}"
            table.add_row(name, *(_cell(layer.get(measure), spec) for measure, (_, spec) in COLUMNS.items()))
        yield table

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Measures by layer, and by position where there are several blocks."""
        report = answer.report
        layers, blocks = report["layers"], report["blocks"]
        figure, panels = new_figure(6 if len(blocks) > 1 else 4)
        shown = {
            "spectral_entropy": ("entropy of the spectrum", "nats"),
            "eigenvalue_rank": ("effective rank (Roy and Vetterli)", ""),
            "trace_covariance": ("spread: sum of variances", ""),
            "angle": ("angle to the layer before", "radians"),
        }
        for axes, (measure, (title, unit)) in zip(panels, shown.items(), strict=False):
            there = [(index - 1, layer[measure]) for index, layer in enumerate(layers) if measure in layer]
            places, means = [index for index, _ in there], [found["mean"] for _, found in there]
            errors = [found["error"] or 0.0 for _, found in there]
            words: Any = {"title": title, "x_label": "layer; -1 is the embedding", "y_label": unit}
            draw_curves(axes, {measure: (places, means)}, **words)
            axes.errorbar(places, means, yerr=errors, fmt="none", ecolor=nth_style(0).light, elinewidth=1)
            axes.set_xticks(places if len(places) <= 12 else places[:: -(-len(places) // 12)])
        if len(blocks) > 1:
            for axes, measure, title in (
                (panels[4], "eigenvalue_rank", "effective rank by position"),
                (panels[5], "trace_covariance", "spread by position"),
            ):
                curves = {
                    "embedding" if index == 0 else f"layer {index - 1}": (
                        [block["end"] for block in blocks],
                        [block["layers"][index][measure] for block in blocks],
                    )
                    for index in evenly(len(layers), MOST_LINES)
                }
                draw_curves(axes, curves, title=title, x_label=f"blocks of {self.block:,} positions", log_y=True)
        return figure


def _filled(batch: Batch) -> Batch:
    """The row up to its last target: windows at the end of a split are padded."""
    there = (batch["targets"][0] != IGNORE_INDEX).nonzero()
    return first_tokens(batch, int(there[-1]) + 1 if len(there) else 0)


def _note(values: Values, blocks: dict[int, Values], readings: list[LayerReading]) -> None:
    """Add the measures of one window to those of each layer, and of each block."""
    before: torch.Tensor | None = None
    for layer, (of_layer, reading) in enumerate(zip(values, readings, strict=True)):
        assert reading.last is not None
        found = measures_of_layer(reading.last)
        mean = reading.last.double().mean(0)
        if before is not None:
            found |= measures_of_neighbours(before, mean)
        before = mean
        for measure, value in found.items():
            of_layer.setdefault(measure, []).append(value)
        for number, of_block in enumerate(reading.blocks):
            there = blocks.setdefault(number, [{} for _ in readings])[layer]
            for measure, value in of_block.items():
                there.setdefault(measure, []).append(value)


def _mean(values: list[float]) -> dict[str, float | None]:
    """Mean and its standard error over windows."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "error": error}


def _cell(found: dict[str, float | None] | None, spec: str) -> str:
    if found is None:
        return ""
    return format(found["mean"], spec)
