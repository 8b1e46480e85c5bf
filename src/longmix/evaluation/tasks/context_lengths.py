"""`evaluate.py task=context_lengths`: the gain from more context, and the reach beyond the trained length."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError, DataError
from longmix.evaluation.prefill import context_lengths_of, last_hidden, pieces_of_hidden, text_of
from longmix.evaluation.statistics import position_buckets
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.progress import tracked
from longmix.reporting.plots import draw_curves, draw_trained, drawing, new_figure
from longmix.wording import counted


class ContextLengths(Task):
    """Loss of the same tokens after contexts of several lengths, and loss by position in long documents.

    The documents of the split that are longer than the longest context are cut into windows of that length. Of each
    window the last `scored` tokens are predicted, once for every length: a context of length L is the last L tokens of
    the window, so a target has between L - scored and L - 1 tokens before the one that predicts it. Then the same
    documents are read from their start, and every token up to the longest length is predicted. The word `max_tokens`
    bounds the tokens read at the longest length.

    Args:
        factors: lengths as multiples of the trained one; the word `seq_len` gives them in tokens instead. A length that
            no document reaches is left out, and it is said so.
        scored: targets at the end of each window; None takes half of the shortest length.
    """

    name = "context_lengths"

    def __init__(self, factors: list[float], scored: int | None = None) -> None:
        self.factors, self.scored = factors, scored

    def ask(self, subject: Subject) -> Answer:
        """Score the same targets after each length, and documents from their start.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "scored", "windows", "documents", "lengths": {seq_len:
            {loss, perplexity, bits_per_byte, tokens, bytes}}, "by_position": [{start, end, loss, tokens,
            beyond_trained}]}`

        Raises:
            ConfigError: impossible lengths, more targets than the shortest length has, or data that are no text.
            DataError: no document is longer than the shortest length.
        """
        asked = context_lengths_of(subject, self.factors, "task.factors")
        text = text_of(subject, "context_lengths")
        lengths = _reached(asked, text, subject.split)
        scored = max(1, lengths[0] // 2) if self.scored is None else self.scored
        if not 1 <= scored <= lengths[0]:
            raise ConfigError(f"task.scored={scored} must be from 1 to the shortest length, {lengths[0]}.")
        max_tokens = subject.config.max_tokens
        windows, documents = _windows(text, lengths[-1], max_tokens)
        results = {length: _after_context(subject, text, windows + lengths[-1], length, scored) for length in lengths}
        report = {
            **subject.heading(),
            "scored": scored,
            "windows": len(windows),
            "documents": len(documents),
            "lengths": results,
            "by_position": _inside_documents(subject, text, documents, lengths[-1]),
        }
        return Answer(report, {"lengths": lengths, "scored": scored, "max_tokens": max_tokens})

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Results after each length, and losses by position."""
        yield _length_table(answer.report)
        yield _position_table(answer.report)

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Loss by length of the context, and by position in documents."""
        report = answer.report
        figure, (by_length, by_position) = new_figure(2)
        lengths, rows = report["lengths"], report["by_position"]
        curve = {"loss": (list(lengths), [result["loss"] for result in lengths.values()])}
        title = f"{report['split']}: the same targets"
        draw_curves(by_length, curve, title=title, x_label="tokens of context", y_label="nats", log_x=True)
        curve = {"loss": ([row["end"] for row in rows], [row["loss"] for row in rows])}
        title, x_label = f"{counted(report['documents'], 'document')} from the start", "position in the document, up to"
        draw_curves(by_position, curve, title=title, x_label=x_label, y_label="nats", log_x=True)
        for axes in (by_length, by_position):
            draw_trained(axes, report["trained_seq_len"])
        return figure


def _reached(asked: list[int], text: TokenFile, split: str) -> list[int]:
    """The lengths that at least one document exceeds."""
    longest = int(np.diff(text.offsets).max())
    lengths = [length for length in asked if length < longest]
    if not lengths:
        raise DataError(
            f"the longest document of the {split} split has {counted(longest, 'token')}, not more than the "
            "shortest context of "
            f"{asked[0]:,}; give shorter lengths, such as seq_len=[{max(1, longest // 4)},{max(1, longest // 2)}]."
        )
    if lengths != asked:
        left_out = ", ".join(f"{length:,}" for length in asked if length not in lengths)
        Console().print(f"left out: {left_out} tokens; the longest document has {longest:,}", highlight=False)
    return lengths


def _windows(text: TokenFile, length: int, max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Starts of windows of `length` + 1 tokens inside one document, and starts of windows that begin a document.

    Of each kind at least one and as many as `max_tokens` allows, evenly spread.
    """
    bounds = zip(text.offsets[:-1].tolist(), text.offsets[1:].tolist(), strict=True)
    inside = [np.arange(start, end - length, length) for start, end in bounds if end - start > length]
    most = None if max_tokens is None else max(1, max_tokens // length)
    return _spread(np.concatenate(inside), most), _spread(np.array([starts[0] for starts in inside]), most)


def _spread(items: np.ndarray, most: int | None) -> np.ndarray:
    count = len(items) if most is None else min(len(items), most)
    return items[np.arange(count) * len(items) // count]


def _cut(subject: Subject, text: TokenFile, starts: np.ndarray, length: int) -> Tensor:
    """Rows of `length` tokens, int64 [len(starts), length], on the model's device."""
    rows = np.stack([text.tokens[start : start + length] for start in starts.tolist()])
    return torch.from_numpy(rows.astype(np.int64)).to(subject.restored.device)


def _in_batches(subject: Subject, starts: np.ndarray, length: int, description: str) -> Any:
    rows = subject.rows(length)
    batches = np.split(starts, range(rows, len(starts), rows))
    return tracked(batches, description, len(batches))


def _losses(subject: Subject, hidden: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad(), subject.restored.autocast():
        return subject.model.token_losses(hidden, targets)


def _after_context(subject: Subject, text: TokenFile, ends: np.ndarray, length: int, scored: int) -> dict[str, float]:
    """Results of the `scored` tokens up to and with each of `ends`, after `length` tokens of context."""
    statistics = subject.loss_statistics(scored)
    for batch in _in_batches(subject, ends - length, length, f"context of {length}"):
        tokens = _cut(subject, text, batch, length + 1)
        hidden, targets = last_hidden(subject, tokens[:, :-1], scored), tokens[:, -scored:]
        statistics.update(_losses(subject, hidden, targets), targets, None)
    return statistics.summary()


def _inside_documents(subject: Subject, text: TokenFile, starts: np.ndarray, length: int) -> list[dict[str, Any]]:
    """Loss by position of documents read from their starts; a bucket lies on one side of the trained length."""
    statistics, trained = subject.loss_statistics(length), subject.trained_seq_len
    for batch in _in_batches(subject, starts, length, "documents"):
        tokens = _cut(subject, text, batch, length + 1)
        targets = tokens[:, 1:]
        losses, read = [], 0
        for hidden in pieces_of_hidden(subject, tokens[:, :-1]):
            losses.append(_losses(subject, hidden, targets[:, read : read + hidden.shape[1]]))
            read += hidden.shape[1]
        statistics.update(torch.cat(losses, 1), targets, None)
    edges = {edge for bucket in position_buckets(length) for edge in bucket} | {min(trained, length)}
    rows = statistics.by_position(list(pairwise(sorted(edges))))
    return [row | {"beyond_trained": row["start"] >= trained} for row in rows]


def _length_table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['split']} split: the same {counted(report['scored'], 'token')} of "
        f"{counted(report['windows'], 'window')}"
    )
    for column in ("context", "of trained", "loss", "perplexity", "bits/byte", "targets"):
        table.add_column(column, justify="right")
    for length, result in report["lengths"].items():
        numbers = (result["loss"], result["perplexity"], result["bits_per_byte"])
        share = f"{length / report['trained_seq_len']:g}x"
        table.add_row(f"{length:,}", share, *(_shown(number) for number in numbers), f"{result['tokens']:,}")
    return table


def _shown(number: float) -> str:
    return "unknown" if math.isnan(number) else f"{number:.4f}"


def _position_table(report: dict[str, Any]) -> Table:
    documents = counted(report["documents"], "document")
    table = Table(title=f"loss by position in {documents}; * beyond the trained length")
    table.add_column("position", justify="right")
    table.add_column("nats per token", justify="right")
    for row in report["by_position"]:
        mark = " *" if row["beyond_trained"] else ""
        table.add_row(f"{row['start']}-{row['end'] - 1}{mark}", f"{row['loss']:.4f}")
    return table
