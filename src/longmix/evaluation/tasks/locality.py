"""`evaluate.py task=locality`: the loss when tokens see their own block and the first tokens (`prefill=star`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from longmix.batch import Batch, documents_of
from longmix.caches.exact import Exact
from longmix.caches.star import Star, StarReading
from longmix.errors import ConfigError
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.generation.prompts import check_star, reading_caches
from longmix.model.backbone import ModelOutput
from longmix.reporting.plots import draw_curves, drawing, new_figure


class Locality(Task):
    """The loss of windows with blocks of several sizes, with an anchor and without, beside that of whole windows.

    Args:
        blocks: tokens of a block, or several numbers of them.
        anchor: first tokens of a document that every block sees, at most a block; None for the first block.

    Raises:
        ConfigError: no block, or one below 1; an anchor that is longer than the smallest block, or of no tokens.
    """

    name = "locality"

    def __init__(self, blocks: int | Sequence[int] = (256, 512, 1024), anchor: int | None = None) -> None:
        self.blocks, self.anchor = blocks, anchor
        self._sizes = [blocks] if isinstance(blocks, int) else list(blocks)
        if not self._sizes or min(self._sizes) < 1:
            raise ConfigError(f"task.blocks={blocks} must be a number of tokens, at least 1, or a list of them.")
        if anchor is not None and not 1 <= anchor <= min(self._sizes):
            raise ConfigError(f"task.anchor={anchor} must be from 1 to the smallest block, {min(self._sizes)}.")

    def ask(self, subject: Subject) -> Answer:
        """Run each window whole and in blocks.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "lengths": {seq_len: {"loss", "with_anchor": {block:
            loss}, "without_anchor": {block: loss}, "tokens", "by_position": {name: [...]}}}}`, losses in nats per
            token.

        Raises:
            ConfigError: no layer of the model reads so.
            DataError: the split has fewer tokens than a length.
        """
        check_star(Exact(), subject.model.decoding_state(1))
        found = {length: self._at_length(subject, length) for length in subject.checked_seq_lens()}
        return Answer({**subject.heading(), "lengths": found})

    def _at_length(self, subject: Subject, length: int) -> dict[str, Any]:
        whole = _statistics(subject, length, None)
        summary = whole.summary()
        result: dict[str, Any] = {"loss": summary["loss"], "with_anchor": {}, "without_anchor": {}}
        by_position = {"whole window": whole.by_position()}
        for size in self._sizes:
            for kind, anchor in (("with_anchor", self.anchor), ("without_anchor", 0)):
                statistics = _statistics(subject, length, Star(block=size, anchor=anchor))
                result[kind][size] = statistics.summary()["loss"]
                by_position[_name(kind, size)] = statistics.by_position()
        return {**result, "tokens": summary["tokens"], "by_position": by_position}

    def tables(self, answer: Answer) -> Iterator[Table]:
        """The losses of each length by block, and by position."""
        for length, found in answer.report["lengths"].items():
            table = Table(title=f"loss of {answer.report['split']} windows of {length:,} tokens, read in blocks")
            for heading in ("block", "with anchor", "without anchor"):
                table.add_column(heading, justify="right")
            table.add_row("whole window", *[f"{found['loss']:.4f}"] * 2)
            for size, loss in found["with_anchor"].items():
                table.add_row(f"{size:,}", f"{loss:.4f}", f"{found['without_anchor'][size]:.4f}")
            yield table
            by_position = Table(title="loss by position: nats per token with so many tokens of context")
            by_position.add_column("position", justify="right")
            for name in found["by_position"]:
                by_position.add_column(name, justify="right")
            for rows in zip(*found["by_position"].values(), strict=True):
                by_position.add_row(f"{rows[0]['start']}-{rows[0]['end'] - 1}", *(f"{row['loss']:.4f}" for row in rows))
            yield by_position

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """The loss by position, of every way to read."""
        curves = {}
        for length, found in answer.report["lengths"].items():
            for name, rows in found["by_position"].items():
                curves[f"{name}, seq_len {length}"] = ([row["end"] for row in rows], [row["loss"] for row in rows])
        figure, (axes,) = new_figure(1)
        title, x_label = f"{answer.report['split']} loss in blocks", "tokens of context, up to"
        draw_curves(axes, curves, title=title, x_label=x_label, y_label="nats per token", log_x=True)
        return figure


def _name(kind: str, size: int) -> str:
    return f"{size:,}" if kind == "with_anchor" else f"{size:,} without anchor"


def _statistics(subject: Subject, length: int, star: Star | None) -> LossStatistics:
    model = subject.model

    def run(batch: Batch) -> ModelOutput:
        state = model.decoding_state(len(batch["tokens"]))
        for cache in reading_caches(state):
            cache.reading = None if star is None else StarReading(star, length)
        output: ModelOutput = model(batch["tokens"], batch["targets"], state=state, **documents_of(batch))
        return output

    restored = subject.restored
    batches, statistics = subject.batches(length), subject.loss_statistics(length)
    return evaluate_loss(
        model, batches, statistics, device=restored.device, precision=restored.autocast, run=run if star else None
    )
