"""`evaluate.py task=probe`: what each layer knows of a passage, by efficient probing of its frozen states."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from longmix.analysis.probing import EfficientProbe, Labelled, LastToken, MeanPool, Pool, accuracy_of
from longmix.batch import Batch
from longmix.errors import ConfigError
from longmix.evaluation.memory import check_memory, free_bytes
from longmix.evaluation.passages import LABELS, Passages, passages_of
from longmix.evaluation.prefill import read_rows
from longmix.evaluation.subject import TOKENS_AT_ONCE, Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.model.backbone import LanguageModel
from longmix.progress import tracked
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix.wording import did_you_mean, nearest

ALL = "all"
USUAL_LENGTH = 128
"""Tokens of a passage that are taken if none are asked for."""

LARGEST_COUNT = 2**31
"""The largest number of anything."""

SHARE_OF_MEMORY = 4
"""States of as many layers at once are kept as fit into one over so much of the free memory."""

POOLS = ("probe", "mean", "last")


class Probe(Task):
    """Accuracy of probes of each layer, see `longmix.analysis.probing` and `longmix.evaluation.passages`.

    Args:
        label: what is asked about a passage.
        layer: "all", a layer or several; -1 is the embedding.
        length: tokens of a passage; None takes those of training, but at most 128.
        passages: at most, evenly spread over the split.
        classes: at most, of documents and years.
        queries, d_out: see `EfficientProbe`.
        epochs: of the fit.
        seed: of the probes' weights and order.

    Raises:
        ConfigError: an unknown label or an impossible number.
    """

    name = "probe"

    def __init__(
        self,
        label: str = "next",
        layer: str | int | list[int] = ALL,
        length: int | None = None,
        passages: int = 1024,
        classes: int = 8,
        queries: int = 8,
        d_out: int = 1,
        epochs: int = 20,
        seed: int = 0,
    ) -> None:
        if label not in LABELS:
            meant = did_you_mean(nearest(label, tuple(LABELS)))
            raise ConfigError(f"task.label={label} is unknown.{meant} Labels are: {', '.join(LABELS)}.")
        if isinstance(layer, str) and layer != ALL:
            raise ConfigError(f"task.layer={layer} is no layer; use all, a number, or a list of numbers.")
        for name, number, least in (
            ("length", length, 2),
            ("passages", passages, 8),
            ("classes", classes, 2),
            ("queries", queries, 1),
            ("d_out", d_out, 1),
            ("epochs", epochs, 1),
            ("seed", seed, 0),
        ):
            if number is not None and not least <= number <= LARGEST_COUNT:
                raise ConfigError(f"task.{name}={number} must be from {least} to {LARGEST_COUNT}.")
        self.label, self.layer, self.length, self.passages, self.classes = label, layer, length, passages, classes
        self.queries, self.d_out, self.epochs, self.seed = queries, d_out, epochs, seed

    def ask(self, subject: Subject) -> Answer:
        """Fit probes to each layer's states and judge them on held-out passages.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "label", "classes": [name], "length", "fitted",
            "held_out", "floor", "error", "layers": [{"layer", "name", "probe", "mean", "last"}]}`: accuracies; `floor`
            is that of the commonest class, `error` the largest standard error of an accuracy.

        Raises:
            ConfigError: queries that do not share the channels, no such layer, data that do not say the label.
            DataError: too few passages or classes.
        """
        model = subject.model
        self._check(model)
        length = min(subject.trained_seq_len, USUAL_LENGTH) if self.length is None else self.length
        subject.check_length(length, "task.length")
        check_memory(model, min(length, TOKENS_AT_ONCE), subject.restored, f"task.length={length}")
        found = passages_of(subject, self.label, length, self.passages, self.classes)
        names = ["embedding", *(type(mixer).__name__ for mixer in model.mixers())]
        layers = self._layers(len(names) - 1)
        rows: list[dict[str, Any]] = []
        for group in _groups(subject, layers, found.tokens.size):
            states = _states(subject, found, group)
            rows += [
                {"layer": layer, "name": names[layer + 1], **self._accuracies(states.pop(layer), found)}
                for layer in tracked(group, "probes", len(group))
            ]
        held_out = int(found.held_out.sum())
        report = {**subject.heading(), "label": self.label, "classes": list(found.classes), "length": length}
        report |= {"fitted": len(found.labels) - held_out, "held_out": held_out, "floor": found.floor}
        report |= {"error": 0.5 / math.sqrt(held_out), "layers": rows}
        own = {name: getattr(self, name) for name in ("label", "layer", "passages", "classes", "queries", "d_out")}
        return Answer(report, {**own, "length": length, "epochs": self.epochs, "seed": self.seed})

    def _check(self, model: LanguageModel) -> None:
        width = model.shape.d_model
        if width % self.d_out:
            raise ConfigError(f"task.d_out={self.d_out} must divide the model's width, {width}.")
        if (width // self.d_out) % self.queries:
            raise ConfigError(f"task.queries={self.queries} must divide the values' channels, {width // self.d_out}.")

    def _layers(self, count: int) -> list[int]:
        if self.layer == ALL:
            return list(range(-1, count))
        asked = [self.layer] if isinstance(self.layer, int) else sorted(set(map(int, self.layer)))
        for layer in asked:
            if not -1 <= layer < count:
                raise ConfigError(f"task.layer={layer} is none of the {count} layers, 0 to {count - 1}; -1 is before.")
        return asked

    def _accuracies(self, states: Tensor, found: Passages) -> dict[str, float]:
        """The accuracy of each pooling."""
        labels = torch.from_numpy(found.labels).to(states.device)
        held_out = torch.from_numpy(found.held_out).to(states.device)
        fit, judged = (Labelled(states[rows], labels[rows]) for rows in (~held_out, held_out))
        pools: tuple[Callable[[int], Pool], ...] = (
            functools.partial(EfficientProbe, queries=self.queries, d_out=self.d_out),
            MeanPool,
            LastToken,
        )
        classes = len(found.classes)
        return {
            name: accuracy_of(pool, fit, judged, classes, self.epochs, self.seed)
            for name, pool in zip(POOLS, pools, strict=True)
        }

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the probe's accuracy at each layer."""
        return {f"probe/layer_{row['layer']}": row["probe"] for row in answer.report["layers"]}

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """Accuracy of each pooling at each layer."""
        report = answer.report
        table = Table(
            title=f"share of {report['held_out']:,} held-out passages of {report['length']:,} tokens whose class of "
            f"{self.label} a probe tells; {len(report['classes'])} classes, always the commonest: {report['floor']:.1%}"
        )
        for heading in ("layer", "queries", "mean", "last token"):
            table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
        for row in report["layers"]:
            name = row["name"] if row["layer"] < 0 else f"{row['layer']} {row['name']}"
            table.add_row(name, *(f"{row[pool]:.1%}" for pool in POOLS))
        yield table
        yield f"an accuracy's standard error is at most {report['error']:.1%}"

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Accuracy by layer."""
        rows, report = answer.report["layers"], answer.report
        figure, (axes,) = new_figure(1, width=520)
        places = [row["layer"] for row in rows]
        curves = {name: (places, [100 * row[name] for row in rows]) for name in POOLS}
        curves["commonest"] = (places, [100 * report["floor"]] * len(places))
        words: Any = {"title": f"what layers know: {self.label}", "x_label": "layer; -1 is the embedding"}
        draw_curves(axes, curves, y_label="accuracy, %", **words)
        axes.set_xticks(places if len(places) <= 14 else places[:: -(-len(places) // 14)])
        return figure


def _groups(subject: Subject, layers: list[int], tokens: int) -> list[list[int]]:
    """Layers whose states are kept at once, so that all passages of them fit into the memory that is free."""
    free = free_bytes(subject.restored.device)
    each = 4 * tokens * subject.model.shape.d_model
    most = len(layers) if free is None else max(1, free // SHARE_OF_MEMORY // each)
    return [layers[start : start + most] for start in range(0, len(layers), most)]


@torch.no_grad()
def _states(subject: Subject, found: Passages, layers: list[int]) -> dict[int, Tensor]:
    """The states [N, T, D] of some layers after every token of the passages, float32."""
    model, device = subject.model, subject.restored.device
    tokens = torch.from_numpy(found.tokens)
    states = {layer: torch.empty(*tokens.shape, model.shape.d_model, device=device) for layer in layers}
    place = [0, 0]

    def keep(layer: int, x: Tensor) -> None:
        row, start = place
        states[layer][row : row + len(x), start : start + x.shape[1]] = x

    def embedded(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(-1, inputs[0])

    with ExitStack() as undone:
        if -1 in states:
            undone.callback(model.blocks[0].register_forward_pre_hook(embedded).remove)
        for layer in layers:
            if layer >= 0:
                hook = functools.partial(_after_block, keep, layer)
                undone.callback(model.blocks[layer].register_forward_hook(hook).remove)
        # Counts a piece only after the last layer has seen it.
        undone.callback(model.norm.register_forward_hook(lambda *_: _advance(place, _[2].shape[1])).remove)
        rows = subject.rows(tokens.shape[1])
        for start in tracked(range(0, len(tokens), rows), "passages", -(-len(tokens) // rows)):
            place[:] = start, 0
            piece = tokens[start : start + rows].to(device)
            read_rows(subject, Batch(tokens=piece, targets=piece, document_ids=None))
    return states


def _after_block(keep: Callable[[int, Tensor], None], layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
    keep(layer, output.y)


def _advance(place: list[int], tokens: int) -> None:
    place[1] += tokens
