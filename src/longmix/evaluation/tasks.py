"""The tasks of `evaluate.py`: each takes a `Subject`, prints a table, and leaves a JSON file and a picture."""

from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.run import Subject
from longmix.evaluation.statistics import LossStatistics
from longmix.files import replace_json, storage_errors
from longmix.reporting.plots import draw_curves, new_figure, save_figure

TOKENS_AT_ONCE = 16_384


def loss_by_position(subject: Subject) -> dict[str, Any]:
    """Loss, perplexity and bits per byte at every context length asked for, overall and by position.

    Returns:
        `{"split", "step", "lengths": {seq_len: {loss, perplexity, bits_per_byte, tokens, bytes, by_position}}}`
    """
    split = subject.words["split"]
    results = {length: _at_length(subject, split, length) for length in subject.seq_lens()}
    report = {"split": split, "step": subject.step, "trained_seq_len": subject.restored.config["seq_len"]}
    report |= {"precision": subject.restored.precision, "lengths": results}
    console = Console()
    console.print(_overall_table(results, split))
    console.print(_position_table(results))
    name = f"loss_{split}_step{subject.step}"
    with storage_errors(subject.output):
        subject.output.mkdir(parents=True, exist_ok=True)
        figure, (axes,) = new_figure(1)
        curves = {
            f"seq_len {length}": (
                [row["end"] for row in result["by_position"]],
                [row["loss"] for row in result["by_position"]],
            )
            for length, result in results.items()
        }
        draw_curves(
            axes,
            curves,
            title=f"{split} loss by position",
            x_label="tokens of context, up to",
            y_label="nats per token",
            log_x=True,
            marker="o",
        )
        picture = save_figure(figure, subject.output / f"{name}.png")
    replace_json(subject.output / f"{name}.json", report)
    written = f"wrote {subject.output / name}.json and {picture.name}"
    console.print(written, highlight=False, markup=False, soft_wrap=True)
    return report


def _at_length(subject: Subject, split: str, length: int) -> dict[str, Any]:
    rows = subject.words["batch_size"] or max(1, TOKENS_AT_ONCE // length)
    loader = subject.data.evaluation_loader(split, length, rows, subject.words["max_tokens"])
    terminal = Console(stderr=True)
    batches = track(
        loader,
        f"seq_len {length}",
        total=len(loader),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )
    statistics = LossStatistics(torch.as_tensor(subject.data.token_bytes), length, subject.restored.device)
    evaluate_loss(
        subject.model, batches, statistics, device=subject.restored.device, precision=subject.restored.autocast
    )
    return {**statistics.summary(), "by_position": statistics.by_position()}


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
