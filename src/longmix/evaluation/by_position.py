"""`evaluate.py task=loss`: loss, perplexity and bits per byte, overall and by position."""

from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.evaluation.subject import Subject
from longmix.reporting.plots import draw_curves, new_figure


def loss_by_position(subject: Subject) -> dict[str, Any]:
    """Loss, perplexity and bits per byte at every context length asked for, overall and by position.

    Returns:
        `{"split", "step", "lengths": {seq_len: {loss, perplexity, bits_per_byte, tokens, bytes, by_position}}}`
    """
    results = {length: _at_length(subject, length) for length in subject.seq_lens()}
    report = {"split": subject.split, "step": subject.step, "trained_seq_len": subject.trained_seq_len}
    report |= {"precision": subject.restored.precision, "lengths": results}
    console = Console()
    console.print(_overall_table(results, subject.split))
    console.print(_position_table(results))
    figure = drawn_by_position(results, "loss", f"{subject.split} loss by position", "nats per token")
    subject.save(f"loss_{subject.split}_step{subject.step}", report, figure)
    return report


def _at_length(subject: Subject, length: int) -> dict[str, Any]:
    restored = subject.restored
    statistics = LossStatistics(torch.as_tensor(subject.data.token_bytes), length, restored.device)
    batches = subject.batches(length)
    evaluate_loss(subject.model, batches, statistics, device=restored.device, precision=restored.autocast)
    return {**statistics.summary(), "by_position": statistics.by_position()}


def drawn_by_position(results: dict[int, dict[str, Any]], figure_of: str, title: str, y_label: str) -> Figure:
    """One curve for each context length of what the rows of its `by_position` call `figure_of`."""
    figure, (axes,) = new_figure(1)
    curves = {
        f"seq_len {length}": ([row["end"] for row in rows], [row[figure_of] for row in rows])
        for length, rows in ((length, result["by_position"]) for length, result in results.items())
    }
    x_label = "tokens of context, up to"
    draw_curves(axes, curves, title=title, x_label=x_label, y_label=y_label, log_x=True, marker="o")
    return figure


def _overall_table(results: dict[int, dict[str, Any]], split: str) -> Table:
    table = Table(title=f"{split} split")
    for column in ("seq_len", "loss", "perplexity", "bits/byte", "tokens"):
        table.add_column(column, justify="right")
    for length, result in results.items():
        figures = (result["loss"], result["perplexity"], result["bits_per_byte"])
        table.add_row(f"{length:,}", *(f"{figure:.4f}" for figure in figures), f"{result['tokens']:,}")
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
