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
from longmix.evaluation.statistics import LossStatistics, equal_buckets
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.evaluation.words import check_words, words_of
from longmix.reporting.plots import draw_curves, drawing, new_figure


class Loss(Task):
    """Loss, perplexity and bits per byte at every context length asked for, overall and by position.

    In teacher forcing a row is run once, and a mixer that looks ahead (`Mixer.leaky`) lets every token but the last
    know of those it is to predict. A prefix has nothing after its last token, so that token's loss is honest, as in
    decoding. It costs a pass for each target, so only targets at evenly spread positions are taken.

    Args:
        prefixes: take so many targets of each window, evenly spread, and run the tokens before each on their own. None
            takes all targets in one pass.
        buckets: also give the loss in buckets of so many positions, such as 2048. None gives doubling ones only.
        words: also give the perplexity by words, with one of `longmix.evaluation.words.WAYS` to count those of the
            split, or their number. None leaves it out.

    Raises:
        ConfigError: fewer than 1 prefix, bucket or word; an unknown way to count; words of prefixes.
    """

    name = "loss"

    def __init__(self, prefixes: int | None = None, buckets: int | None = None, words: str | int | None = None) -> None:
        if prefixes is not None and prefixes < 1:
            raise ConfigError(f"task.prefixes={prefixes} must be at least 1, or null for all targets in one pass.")
        if buckets is not None and buckets < 1:
            raise ConfigError(f"task.buckets={buckets} must be at least 1, or null for doubling buckets only.")
        if words is not None:
            check_words(words)
        if words is not None and prefixes is not None:
            raise ConfigError(f"task.words={words} takes the loss of all tokens, and task.prefixes={prefixes} of few.")
        self.prefixes, self.buckets, self.words = prefixes, buckets, words
        self.takes_stride = prefixes is None
        if prefixes is not None:
            self.name, self.takes_leaky = "loss_prefixes", True

    def ask(self, subject: Subject) -> Answer:
        """Sum the losses of the split.

        Returns:
            `{"split", "step", "lengths": {seq_len: {loss, perplexity, bits_per_byte, tokens, bytes, by_position}}}`, of
            a synthetic task `recall` in the place of `bits_per_byte` and `bytes`; with prefixes also their number, and
            for each length `whole_rows`, the same targets' summary in one pass; with a stride `stride`; with buckets
            `by_bucket`; with words `words` and `word_perplexity`.
        """
        numbers = isinstance(subject.data.tokenizer, NumberTokenizer)
        words = None if self.words is None else words_of(subject, self.words)
        with _hits_measured(subject, numbers):
            results = {length: self._at_length(subject, length, words) for length in subject.checked_seq_lens()}
        if numbers or not subject.data.token_bytes.any():  # they stand for no bytes, or nobody knows for how many
            results = {length: _without_bytes(result) for length, result in results.items()}
        report: dict[str, Any] = {**subject.heading(), **subject.stride_used(), "lengths": results}
        return Answer(report if self.prefixes is None else report | {"prefixes": self.prefixes})

    def used(self, subject: Subject, answer: Answer) -> dict[str, Any]:
        """The settings that decided the results; those of later versions only if they are set."""
        later = {name for name in ("buckets", "words") if getattr(self, name) is None}
        return {name: value for name, value in super().used(subject, answer).items() if name not in later}

    def _at_length(self, subject: Subject, length: int, words: int | None) -> dict[str, Any]:
        if self.prefixes is None:
            statistics = _statistics(subject, length, subject.batches(length))
            by_words = {} if words is None else {"words": words, "word_perplexity": statistics.word_perplexity(words)}
            return {**statistics.summary(), **by_words, **self._by_position(statistics, length)}
        ends = prefix_ends(length, self.prefixes)
        whole = _statistics(subject, length, rows_whole(subject.batches(length), ends))
        alone = _statistics(subject, length, prefixes_alone(subject.batches(length), ends))
        return {**alone.summary(), **self._by_position(alone, length), "whole_rows": whole.summary()}

    def _by_position(self, statistics: LossStatistics, length: int) -> dict[str, list[dict[str, Any]]]:
        found = {"by_position": statistics.by_position()}
        if self.buckets is not None:
            found["by_bucket"] = statistics.by_position(equal_buckets(length, self.buckets))
        return found

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Results of each length, and losses by position."""
        yield _overall_table(answer.report["lengths"], answer.report["split"], answer.report.get("stride"))
        yield _position_table(answer.report["lengths"], "by_position")
        if self.buckets is not None:
            yield _position_table(answer.report["lengths"], "by_bucket")

    def figure(self, answer: Answer) -> Figure:
        """Loss by position; in equal buckets too if there are some."""
        title = f"{answer.report['split']} loss by position"
        return drawn_by_position(answer.report["lengths"], "loss", title, "nats per token", self.buckets)


@contextmanager
def _hits_measured(subject: Subject, wanted: bool) -> Iterator[None]:
    """Have the model record which targets it meets, if recall is wanted."""
    before = subject.model.measures_hits
    subject.model.measures_hits = wanted
    try:
        yield
    finally:
        subject.model.measures_hits = before


def _without_bytes(result: dict[str, Any]) -> dict[str, Any]:
    """A result, and the results within it, without numbers that count bytes."""
    kept = {key: value for key, value in result.items() if key not in ("bits_per_byte", "bytes")}
    return {key: _without_bytes(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _statistics(subject: Subject, length: int, batches: Iterable[Batch]) -> LossStatistics:
    restored = subject.restored
    statistics = subject.loss_statistics(length)
    return evaluate_loss(subject.model, batches, statistics, device=restored.device, precision=restored.autocast)


@drawing()
def drawn_by_position(
    results: dict[int, dict[str, Any]], figure_of: str, title: str, y_label: str, buckets: int | None = None
) -> Figure:
    """One curve for each context length of what the rows of its `by_position` call `figure_of`; of `by_bucket` too."""
    figure, axes = new_figure(1 if buckets is None else 2)
    x_label = "tokens of context, up to"
    places = {"by_position": title, "by_bucket": f"{title}, in buckets of {buckets:,}" if buckets else ""}
    for own, (place, name) in zip(axes, places.items(), strict=False):
        curves = {
            f"seq_len {length}": ([row["end"] for row in rows], [row[figure_of] for row in rows])
            for length, rows in ((length, result[place]) for length, result in results.items())
        }
        draw_curves(own, curves, title=name, x_label=x_label, y_label=y_label, log_x=place == "by_position")
    return figure


def _overall_table(results: dict[int, dict[str, Any]], split: str, stride: int | None) -> Table:
    table = Table(title=f"{split} split" if stride is None else f"{split} split, a window each {stride:,} tokens")
    measures = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
    measures |= {"word_perplexity": "perplexity by words", "recall": "recall"}
    measures = {key: name for key, name in measures.items() if all(key in result for result in results.values())}
    columns = ["seq_len", *measures.values(), "tokens"]
    for column in [*columns, *(["loss in whole rows"] if any("whole_rows" in r for r in results.values()) else [])]:
        table.add_column(column, justify="right")
    for length, result in results.items():
        whole = [f"{result['whole_rows']['loss']:.4f}"] if "whole_rows" in result else []
        table.add_row(f"{length:,}", *(f"{result[key]:.4f}" for key in measures), f"{result['tokens']:,}", *whole)
    return table


def _position_table(results: dict[int, dict[str, Any]], place: str) -> Table:
    table = Table(title="loss by position: nats per token with so many tokens of context")
    table.add_column("position", justify="right")
    for length in results:
        table.add_column(f"seq_len {length:,}", justify="right")
    cells = {
        length: {(row["start"], row["end"]): f"{row['loss']:.4f}" for row in result[place]}
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
