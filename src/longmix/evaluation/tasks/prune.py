"""`evaluate.py task=prune`: a model without the branches and heads that it can do without."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from longmix.analysis.pruning import Part, Pruned, greedy, masks, parts_of, savings, without
from longmix.batch import Batch
from longmix.errors import ConfigError
from longmix.evaluation.loss import evaluate_loss, to_device
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.files import replace_json, storage_errors
from longmix.progress import steps_bar
from longmix.reporting.plots import draw_cells, draw_curves, drawing, new_figure

LARGEST_COUNT = 2**40
"""The largest number of tokens, windows and channels."""

MASKS = "masks.json"
"""The file with the factors of all parts, of the newest result."""


class Prune(Task):
    """Leave out parts greedily, see `longmix.analysis.pruning`.

    Args:
        margin: nats that a removal may add to the best loss so far.
        length: tokens of a window; None takes those of training.
        windows: that decide, evenly spread over the split.
        channels: of a group, to try groups of the channel mixer's channels too; None tries none.

    Raises:
        ConfigError: an impossible number.
    """

    name = "prune"

    def __init__(
        self, margin: float = 0.0, length: int | None = None, windows: int = 32, channels: int | None = None
    ) -> None:
        if not 0 <= margin < float("inf"):
            raise ConfigError(f"task.margin={margin} must be at least 0 nats.")
        for name, number in (("length", length), ("windows", windows), ("channels", channels)):
            if number is not None and not 1 <= number <= LARGEST_COUNT:
                raise ConfigError(f"task.{name}={number} must be from 1 to {LARGEST_COUNT}.")
        self.margin, self.length, self.windows, self.channels = margin, length, windows, channels

    def ask(self, subject: Subject) -> Answer:
        """Try the parts, and measure the model with and without what was left out.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "length", "windows", "loss": {"before", "after"} of the
            windows that decided, "final": the same of all windows, "parameters", "flops": of the whole model,
            "removed": [{"part", "loss", "parameters", "flops"}], what is saved by then, "trials": [{"part", "loss",
            "removed"}], "masks"}`, see `longmix.analysis.pruning.masks`.

        Raises:
            ConfigError: more memory than there is.
            DataError: the split has fewer tokens than `length`.
        """
        length = subject.trained_seq_len if self.length is None else self.length
        subject.check_length(length, "task.length")
        subject.check_memory(length, "task.length")
        model, device = subject.model, subject.restored.device
        rows = min(subject.rows(length), self.windows)
        loader = subject.data.evaluation_loader(subject.split, length, rows, self.windows * length)
        batches = [to_device(batch, device) for batch in loader]

        def loss(removed: frozenset[Part]) -> float:
            with without(model, removed, self.channels):
                return _loss(subject, batches, length)

        heads, groups = parts_of(model, self.channels)
        most = 2 * len(heads) + sum(heads) + sum(groups or [])
        with steps_bar("parts", most) as advance:
            found = greedy(heads, loss, self.margin, groups, advance)
        final = {"before": _loss(subject, subject.batches(length), length)}
        with without(model, found.removed, self.channels):
            final["after"] = _loss(subject, subject.batches(length), length)
        report: dict[str, Any] = {**subject.heading(), "length": length, "windows": sum(map(_rows, batches))}
        report |= {"loss": {"before": loss(frozenset()), "after": found.loss}, "final": final}
        report |= {"parameters": model.parameter_counts()["total"], "flops": model.flops(length)}
        report["removed"] = list(_steps(subject, found, length, self.channels))
        report["trials"] = [{"part": str(t.part), "loss": t.loss, "removed": t.removed} for t in found.trials]
        report["masks"] = masks(model, found.removed, self.channels)
        settings = {"margin": self.margin, "length": length, "windows": self.windows, "channels": self.channels}
        return Answer(report, settings | {"max_tokens": subject.config.max_tokens})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the share of the parameters that is left out, and the losses."""
        report = answer.report
        saved = report["removed"][-1]["parameters"] if report["removed"] else 0
        losses = {f"loss/{when}": value for when, value in report["final"].items()}
        return {"removed": saved / report["parameters"], **losses}

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """What was left out one after the other, what that saves, and the final losses."""
        report = answer.report
        table = Table(
            title=f"left out one after the other: loss of {report['windows']:,} windows of {report['length']:,} "
            "tokens, and the shares of parameters and arithmetic that are saved"
        )
        for heading in ("part", "loss", "parameters", "FLOPs"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        table.add_row("nothing", f"{report['loss']['before']:.4f}", "0.0%", "0.0%")
        for row in report["removed"]:
            shares = (row[key] / report[key] for key in ("parameters", "flops"))
            table.add_row(row["part"], f"{row['loss']:.4f}", *(f"{share:.1%}" for share in shares))
        yield table
        final, tried = report["final"], len(report["trials"])
        yield (
            f"left out {len(report['removed'])} of {tried} parts that were tried; loss of all windows "
            f"{final['before']:.4f} before, {final['after']:.4f} after"
        )

    def save(self, subject: Subject, answer: Answer) -> None:
        """Write the report and the picture, and the masks alone to `masks.json`, which the newest result replaces."""
        super().save(subject, answer)
        with storage_errors(subject.output):
            replace_json(subject.output / MASKS, answer.report["masks"])

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Loss against what is saved, and which parts stay."""
        report = answer.report
        figure, (losses, parts) = new_figure(2, 2)
        rows = [{"loss": report["loss"]["before"], "parameters": 0, "flops": 0}, *report["removed"]]
        curves = {
            name: ([100 * row[key] / report[key] for row in rows], [row["loss"] for row in rows])
            for name, key in (("parameters", "parameters"), ("FLOPs", "flops"))
        }
        words: Any = {"title": "loss as parts are left out", "x_label": "% saved", "y_label": "nats per token"}
        draw_curves(losses, curves, **words)
        stay = report["masks"]
        most = max((len(heads) for heads in stay["heads"] if heads is not None), default=0)
        columns = ["mlp", "mixer", *(f"head {number}" for number in range(most))]
        grid = [
            [stay["mlp"][layer], mixer, *(mixer * head for head in heads or []), *[0.5] * (most - len(heads or []))]
            for layer, (mixer, heads) in enumerate(zip(stay["mixer"], stay["heads"], strict=True))
        ]
        draw_cells(
            parts,
            np.array(grid, dtype=float),
            columns=columns,
            rows=[f"layer {layer}" for layer in range(len(grid))],
            limits=(0.0, 3.0),
            colours="Greys",
            words=[["" if value == 0.5 else "stays" if value else "out" for value in row] for row in grid],
            title="parts",
            x_label="",
            y_label="",
        )
        return figure


def _loss(subject: Subject, batches: Any, length: int) -> float:
    restored = subject.restored
    statistics = subject.loss_statistics(length)
    evaluate_loss(subject.model, batches, statistics, device=restored.device, precision=restored.autocast)
    return statistics.summary()["loss"]


def _steps(subject: Subject, found: Pruned, length: int, group: int | None) -> Iterator[dict[str, Any]]:
    """What had been saved after each removal."""
    losses = {trial.part: trial.loss for trial in found.trials}
    for count, part in enumerate(found.removed, 1):
        saved = savings(subject.model, found.removed[:count], length, group)
        yield {"part": str(part), "loss": losses[part], "parameters": saved.parameters, "flops": saved.flops}


def _rows(batch: Batch) -> int:
    return len(batch["tokens"])
