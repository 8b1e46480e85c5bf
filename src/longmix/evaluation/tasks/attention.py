"""`evaluate.py task=attention`: the effective attention of every layer and head, of one checkpoint or several."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from longmix.analysis.attention_statistics import AttentionStatistics, signed_shares
from longmix.analysis.effective_attention import layer_inputs, mixing
from longmix.batch import Batch
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.evaluation.provenance import model_facts
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.attention_pictures import LayerMaps, draw_comparison, draw_model, shrunk
from longmix.evaluation.tasks.base import Answer, Task
from longmix.model.backbone import LanguageModel
from longmix.printable import printable
from longmix.progress import tracked
from longmix.reading import shortened
from longmix.restore import Restored, restored_for

USUAL_LENGTH, MOST_TOKENS = 1024, 8192
"""Tokens of a window that are taken if none are asked for, and the most that may be: a matrix has their square."""

MOST_WINDOWS = 100_000

COLUMNS = {
    "entropy": ("entropy", ".2f"),
    "mean_distance": ("distance", ".1f"),
    "receptive_field": ("90 %", ".0f"),
    "effective_rank": ("rank", ".1f"),
    "negative_mass": ("negative", ".1%"),
    "first_token_mass": ("first", ".1%"),
}
"""The statistics in the table, each with heading and format."""


class Attention(Task):
    """Effective attention over windows of the split: statistics of each head, and heat maps of the first window.

    Args:
        length: tokens of a window; None takes those of training, but at most 1024.
        windows: how many windows, evenly spread over the split.
        others: further checkpoints with the same tokenizer, or their runs, to show beside it on the same windows.

    Raises:
        ConfigError: an impossible number.
    """

    name = "attention"

    def __init__(self, length: int | None = None, windows: int = 4, others: list[str] | None = None) -> None:
        if length is not None and not 2 <= length <= MOST_TOKENS:
            raise ConfigError(f"task.length={length} must be from 2 to {MOST_TOKENS}; matrices have its square.")
        if not 1 <= windows <= MOST_WINDOWS:
            raise ConfigError(f"task.windows={windows} must be from 1 to {MOST_WINDOWS}.")
        self.length, self.windows, self.others = length, windows, others or []

    def ask(self, subject: Subject) -> Answer:
        """Analyse the model, and the others on the same windows.

        Returns:
            `{"split", "length", "windows", "models": {name: {"step", "layers": [{"mixer", "reason", "heads":
            [statistics]}]}}}`; see `AttentionStatistics.summary` for the statistics. `reason` is None, or why a layer
            has no heads: nobody knows how it mixes its values.

        Raises:
            ConfigError: no layer's values are known, another tokenizer, windows of one token.
            CheckpointError: there is no such other checkpoint.
            DataError: the split has fewer tokens than `length`.
        """
        length = min(subject.trained_seq_len, USUAL_LENGTH) if self.length is None else self.length
        if length < 2:
            raise ConfigError(f"the model was trained on windows of {length} token; give task.length from 2 on.")
        subject.check_length(length, "task.length")
        models = {_name(subject.restored, {}): subject.restored}
        for path in self.others:
            other = _restored(subject, path)
            models[_name(other, models)] = other
        batches = list(subject.data.evaluation_loader(subject.split, length, 1, self.windows * length))
        layers = {name: _analysed(name, restored, batches) for name, restored in models.items()}
        reports = {name: _reported(restored, layers[name]) for name, restored in models.items()}
        report = {"split": subject.split, "length": length, "windows": len(batches), "models": reports}
        return Answer(report, {"length": length, "windows": self.windows}, shown=Shown(layers, list(models.values())))

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: means over the heads of each layer."""
        layers = next(iter(answer.report["models"].values()))["layers"]
        return {
            f"{name}/layer_{index}": fmean(head[name] for head in layer["heads"])
            for index, layer in enumerate(layers)
            for name, value in (layer["heads"] or [{}])[0].items()
            if isinstance(value, int | float)
        }

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """Statistics of every head, model by model; layers without any, by name."""
        for name, layers in answer.shown.layers.items():
            yield _table(name, layers)
            for index, layer in enumerate(layers):
                if layer.reason is not None:
                    yield f"{escape(printable(name))}: layer {index} is left out: {escape(layer.reason)}"

    def figure(self, answer: Answer) -> Figure:
        """Heat maps of the subject's heads."""
        (name, layers), length = next(iter(answer.shown.layers.items())), answer.report["length"]
        split = answer.report["split"]
        title = f"effective attention of {name}\nsigned shares of each row, {length} tokens of {split}"
        unseen = [f"{index} {layer.mixer}" for index, layer in enumerate(layers) if layer.reason is not None]
        if unseen:
            title += f"\nlayers left out: {shortened(', '.join(unseen), 60)}"
        return draw_model(layers, length, title)

    def save(self, subject: Subject, answer: Answer) -> None:
        """Write the subject's own results, and with other models also a comparison of all."""
        report, shown, settings = answer.report, answer.shown, answer.settings or {}
        first = next(iter(report["models"]))
        own = {**report, "models": {first: report["models"][first]}}
        subject.save(self.name, own, self.figure(answer), settings)
        if len(shown.models) > 1:
            length = report["length"]
            title = f"effective attention, mean over heads\nthe same {length} tokens of {report['split']}"
            others = [model_facts(restored, None)["weights"] for restored in shown.models[1:]]
            figure = draw_comparison(dict(shown.layers), length, title)
            subject.save("attention_comparison", report, figure, {**settings, "others": others})


class Shown(NamedTuple):
    """The input of tables and pictures: the models, and the layers of each by its name."""

    layers: dict[str, list[LayerMaps]]
    models: list[Restored]


def analyse(model: LanguageModel, batches: Iterable[Batch]) -> list[LayerMaps]:
    """Statistics of every layer over some windows of one length, and its shares in the very first row.

    A layer of which it is not known how it mixes its values has a reason instead.
    """
    statistics = [AttentionStatistics() for _ in model.mixers()]
    shares: dict[int, torch.Tensor] = {}
    reasons: dict[int, str] = {}
    with torch.no_grad():
        for batch in batches:
            given = layer_inputs(model, batch)
            for index, (mixer, (x, options)) in enumerate(zip(model.mixers(), given, strict=True)):
                try:
                    matrix = mixing(mixer, x, **options).matrix()
                except ValueError as error:
                    reasons[index] = str(error)
                    continue
                statistics[index].update(matrix, batch["document_ids"])
                if index not in shares:
                    shares[index] = shrunk(signed_shares(matrix[0])).cpu()
    return [
        LayerMaps(type(mixer).__name__, torch.empty(0), [], reasons[index])
        if index in reasons
        else LayerMaps(type(mixer).__name__, shares[index], statistics[index].summary())
        for index, mixer in enumerate(model.mixers())
    ]


def _analysed(name: str, restored: Restored, batches: list[Batch]) -> list[LayerMaps]:
    moved = (to_device(batch, restored.device) for batch in tracked(batches, name, len(batches)))
    layers = analyse(restored.model, moved)
    if all(layer.reason is not None for layer in layers):
        raise ConfigError(f"task=attention cannot see into {name}: {layers[0].reason}.")
    return layers


def _restored(subject: Subject, path: str) -> Restored:
    other = restored_for(replace(subject.config, checkpoint=path, states=None))
    if other.tokenizer.state() != subject.restored.tokenizer.state():
        raise ConfigError(
            f"task.others names {path}, which has another tokenizer than {subject.restored.checkpoint}: "
            "they cannot read the same windows."
        )
    leaky = [type(mixer).__name__ for mixer in other.model.mixers() if mixer.leaky]
    if leaky:
        raise ConfigError(f"task.others names {path}, in which later tokens decide what {leaky[0]} computes.")
    return other


def _name(restored: Restored, taken: dict[str, Restored]) -> str:
    """The name of a run, with its step where two checkpoints share a name."""
    checkpoint: Path = restored.checkpoint
    name = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name
    if name in taken:
        name = f"{name} step {restored.step}"
    return name if name not in taken else f"{name} ({len(taken) + 1})"


def _reported(restored: Restored, layers: list[LayerMaps]) -> dict[str, Any]:
    return {
        "step": restored.step,
        "layers": [{"mixer": layer.mixer, "reason": layer.reason, "heads": layer.heads} for layer in layers],
    }


def _table(name: str, layers: list[LayerMaps]) -> Table:
    table = Table(
        title=f"effective attention of {escape(printable(name))}: entropy in nats, mean distance in tokens, "
        "distance within which 90 % of "
        "the mass lies, effective rank, negative mass, mass on the first token of the document"
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("head", justify="right")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    for index, layer in enumerate(layers):
        for head, found in enumerate(layer.heads):
            cells = [format(found[key], spec) for key, (_, spec) in COLUMNS.items()]
            table.add_row(f"{index} {layer.mixer}" if head == 0 else "", str(head), *cells)
        table.add_section()
    return table
