"""`evaluate.py task=loss`: loss, perplexity and bits per byte, overall and by position; of rows or of prefixes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from longmix.batch import IGNORE_INDEX, Batch, first_tokens
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.errors import ConfigError
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.reporting.plots import draw_curves, drawing, new_figure


class Loss(Task):
    """Loss, perplexity and bits per byte at every context length asked for, overall and by position.

    In teacher forcing a row is run once, and a mixer that looks ahead (`Mixer.leaky`) lets every token but the last
    know of those it is to predict. A prefix has nothing after its last token, so that token's loss is honest, as in
    decoding. It costs a pass for each target, so only targets at evenly spread positions are taken.

    Args:
        prefixes: take so many targets of each window, evenly spread, and run the tokens before each on their own. None
            takes all targets in one pass.

    Raises:
        ConfigError: fewer than 1 prefix.
    """

    name = "loss"

    def __init__(self, prefixes: int | None = None) -> None:
        if prefixes is not None and prefixes < 1:
            raise ConfigError(f"task.prefixes={prefixes} must be at least 1, or null for all targets in one pass.")
        self.prefixes = prefixes
        if prefixes is not None:
            self.name, self.takes_leaky = "loss_prefixes", True

    def ask(self, subject: Subject) -> Answer:
        """Sum the losses of the split.

        Returns:
            `{"split", "step", "lengths": {seq_len: {loss, perplexity, bits_per_byte, tokens, bytes, by_position}}}`, of
            a synthetic task `recall` in the place of `bits_per_byte` and `bytes`; with prefixes also their number, and
            for each length `whole_rows`, the same targets' summary in one pass.
        """
        numbers = isinstance(subject.data.tokenizer, NumberTokenizer)
        with _hits_measured(subject, numbers):
            results = {length: self._at_length(subject, length) for length in subject.checked_seq_lens()}
        if numbers or not subject.data.token_bytes.any():  # they stand for no bytes, or nobody knows for how many
            results = {length: _without_bytes(result) for length, result in results.items()}
        report: dict[str, Any] = {**subject.heading(), "lengths": results}
        return Answer(report if self.prefixes is None else report | {"prefixes": self.prefixes})

    def _at_length(self, subject: Subject, length: int) -> dict[str, Any]:
        if self.prefixes is None:
            statistics = _statistics(subject, length, subject.batches(length))
            return {**statistics.summary(), "by_position": statistics.by_position()}
        ends = prefix_ends(length, self.prefixes)
        whole = _statistics(subject, length, rows_whole(subject.batches(length), ends))
        alone = _statistics(subject, length, prefixes_alone(subject.batches(length), ends))
        return {**alone.summary(), "by_position": alone.by_position(), "whole_rows": whole.summary()}

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Results of each length, and losses by position."""
        yield _overall_table(answer.report["lengths"], answer.report["split"])
        yield _position_table(answer.report["lengths"])

    def figure(self, answer: Answer) -> Figure:
        """Loss by position."""
        title = f"{answer.report['split']} loss by position"
        return drawn_by_position(answer.report["lengths"], "loss", title, "nats per token")


@contextmanager
def _hits_measured(subject: Subject, wanted: bool) -> Iterator[None]:
    """Have the model record which targets it meets, if recall is wanted."""
    subject.model.measures_hits = wanted
    try:
        yield
    finally:
        subject.model.measures_hits = False


def _without_bytes(result: dict[str, Any]) -> dict[str, Any]:
    """A result, and the results within it, without numbers that count bytes."""
    kept = {key: value for key, value in result.items() if key not in ("bits_per_byte", "bytes")}
    return {key: _without_bytes(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _statistics(subject: Subject, length: int, batches: Iterable[Batch]) -> LossStatistics:
    restored = subject.restored
    statistics = subject.loss_statistics(length)
    return evaluate_loss(subject.model, batches, statistics, device=restored.device, precision=restored.autocast)


@drawing()
def drawn_by_position(results: dict[int, dict[str, Any]], figure_of: str, title: str, y_label: str) -> Figure:
    """One curve for each context length of what the rows of its `by_position` call `figure_of`."""
    figure, (axes,) = new_figure(1)
    curves = {
        f"seq_len {length}": ([row["end"] for row in rows], [row[figure_of] for row in rows])
        for length, rows in ((length, result["by_position"]) for length, result in results.items())
    }
    x_label = "tokens of context, up to"
    draw_curves(axes, curves, title=title, x_label=x_label, y_label=y_label, log_x=True)
    return figure


def _overall_table(results: dict[int, dict[str, Any]], split: str) -> Table:
    table = Table(title=f"{split} split")
    measures = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte", "recall": "recall"}
    measures = {key: name for key, name in measures.items() if all(key in result for result in results.values())}
    columns = ["seq_len", *measures.values(), "tokens"]
    for column in [*columns, *(["loss in whole rows"] if any("whole_rows" in r for r in results.values()) else [])]:
        table.add_column(column, justify="right")
    for length, result in results.items():
        whole = [f"{result['whole_rows']['loss']:.4f}"] if "whole_rows" in result else []
        table.add_row(f"{length:,}", *(f"{result[key]:.4f}" for key in measures), f"{result['tokens']:,}", *whole)
    return table


def _position_table(results: dict[int, dict[str, Any]]) -> Table:
    table = Table(title="loss by position: nats per token with so many tokens of context")
    table.add_column("position", justify="right")
    for length in results:
        table.add_column(f"seq_len {length:,}", justify="right")
    cells = {
        length: {(row["start"], row["end"]): f"{row['loss']:.4f}" for row in result["by_position"]}
        for length, result in results.items()
    }
    for start, end in sorted({bucket for column in cells.values() for bucket in column}):
        table.add_row(f"{start}-{end - 1}", *(column.get((start, end), "") for column in cells.values()))
    return table


def prefix_ends(length: int, prefixes: int) -> list[int]:
    """Lengths of at most `prefixes` prefixes of a row, evenly spread; the last is the whole row."""
    return sorted({-(-length * number // prefixes) for number in range(1, prefixes + 1)})


def prefixes_alone(batches: Iterable[Batch], ends: Sequence[int]) -> Iterator[Batch]:
    """Every prefix of every batch, with its last target only."""
    for batch in batches:
        for end in ends:
            yield _only(first_tokens(batch, end), [end])


def rows_whole(batches: Iterable[Batch], ends: Sequence[int]) -> Iterator[Batch]:
    """Every batch with the last targets of its prefixes only: the same targets in teacher forcing."""
    for batch in batches:
        yield _only(batch, ends)


def _only(batch: Batch, ends: Sequence[int]) -> Batch:
    targets = torch.full_like(batch["targets"], IGNORE_INDEX)
    positions = torch.tensor(ends, device=targets.device) - 1
    targets[:, positions] = batch["targets"][:, positions]
    return {**batch, "targets": targets}
