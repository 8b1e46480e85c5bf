"""`evaluate.py task=loss`: loss, perplexity and bits per byte, overall and by position."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from longmix.batch import Batch
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.errors import ConfigError
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.prefixes import prefix_ends, prefixes_alone, rows_whole
from longmix.evaluation.statistics import LossStatistics
from longmix.evaluation.subject import Subject
from longmix.reporting.plots import draw_curves, drawing, new_figure


def loss_by_position(subject: Subject, prefixes: int | None = None) -> dict[str, Any]:
    """Loss, perplexity and bits per byte at every context length asked for, overall and by position.

    Args:
        subject: what to evaluate.
        prefixes: take so many targets of each window, evenly spread, and run the tokens before each on their own
            (`longmix.evaluation.prefixes`): honest also where later tokens change earlier outputs. None takes all
            targets in one pass.

    Returns:
        `{"split", "step", "lengths": {seq_len: {loss, perplexity, bits_per_byte, tokens, bytes, by_position}}}`, of a
        synthetic task `recall` in the place of `bits_per_byte` and `bytes`; with prefixes also their number, and for
        each length `whole_rows`, the same targets' summary in one pass.

    Raises:
        ConfigError: fewer than 1 prefix.
    """
    if prefixes is not None and prefixes < 1:
        raise ConfigError(f"task.loss.prefixes={prefixes} must be at least 1, or null for all targets in one pass.")
    numbers = isinstance(subject.data.tokenizer, NumberTokenizer)
    with _hits_measured(subject, numbers):
        results = {length: _at_length(subject, length, prefixes) for length in subject.checked_seq_lens()}
    if numbers:  # they stand for no bytes
        results = {length: _without_bytes(result) for length, result in results.items()}
    report: dict[str, Any] = {**subject.heading(), "lengths": results}
    report |= {} if prefixes is None else {"prefixes": prefixes}
    console = Console()
    console.print(_overall_table(results, subject.split))
    console.print(_position_table(results))
    figure = drawn_by_position(results, "loss", f"{subject.split} loss by position", "nats per token")
    name = "loss" if prefixes is None else "loss_prefixes"
    settings = {"prefixes": prefixes, "seq_len": list(results), "max_tokens": subject.words["max_tokens"]}
    subject.save(name, report, figure, settings)
    return report


loss_by_position.takes_leaky = lambda settings: settings.get("prefixes") is not None  # type: ignore[attr-defined]


def _at_length(subject: Subject, length: int, prefixes: int | None) -> dict[str, Any]:
    if prefixes is None:
        statistics = _statistics(subject, length, subject.batches(length))
        return {**statistics.summary(), "by_position": statistics.by_position()}
    ends = prefix_ends(length, prefixes)
    whole = _statistics(subject, length, rows_whole(subject.batches(length), ends))
    alone = _statistics(subject, length, prefixes_alone(subject.batches(length), ends))
    return {**alone.summary(), "by_position": alone.by_position(), "whole_rows": whole.summary()}


@contextmanager
def _hits_measured(subject: Subject, wanted: bool) -> Iterator[None]:
    """Have the model record which targets it meets, if recall is wanted."""
    subject.model.measures_hits = wanted
    try:
        yield
    finally:
        subject.model.measures_hits = False


def _without_bytes(result: dict[str, Any]) -> dict[str, Any]:
    """A result, and the results within it, without figures that count bytes."""
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
    figures = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte", "recall": "recall"}
    figures = {key: name for key, name in figures.items() if all(key in result for result in results.values())}
    columns = ["seq_len", *figures.values(), "tokens"]
    for column in [*columns, *(["loss in whole rows"] if any("whole_rows" in r for r in results.values()) else [])]:
        table.add_column(column, justify="right")
    for length, result in results.items():
        whole = [f"{result['whole_rows']['loss']:.4f}"] if "whole_rows" in result else []
        table.add_row(f"{length:,}", *(f"{result[key]:.4f}" for key in figures), f"{result['tokens']:,}", *whole)
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
