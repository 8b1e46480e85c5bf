"""`evaluate.py task=accuracy`: how many targets the model's first choice meets, by context length and position."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from longmix.batch import IGNORE_INDEX, documents_of
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.evaluation.tasks.loss import drawn_by_position
from longmix.model.head import slice_rows
from longmix.printable import printable

BINS = 16
"""Number of buckets of positions, all equally long."""


class Accuracy(Task):
    """The share of targets that are the most likely token, at every context length, overall and by position."""

    name = "accuracy"
    takes_stride = True

    def ask(self, subject: Subject) -> Answer:
        """Count the targets that are met.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "data", "lengths": {seq_len: {accuracy, targets,
            state_bytes, by_position: [{start, end, accuracy, targets}]}}}`; `state_bytes` is what the model remembers
            of a row in the end.
        """
        results = {length: _at_length(subject, length) for length in subject.checked_seq_lens()}
        return Answer({**subject.heading(), "data": subject.data.label, "lengths": results})

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Accuracy at each length."""
        report = answer.report
        table = Table(title=escape(printable(f"{report['data']}, {report['split']} split")))
        for column in ("seq_len", "accuracy", "targets", "state, bytes"):
            table.add_column(column, justify="right")
        for length, result in report["lengths"].items():
            counts = (f"{result[name]:,}" for name in ("targets", "state_bytes"))
            table.add_row(f"{length:,}", f"{result['accuracy']:.4f}", *counts)
        yield table

    def figure(self, answer: Answer) -> Figure:
        """Accuracy by position."""
        title = f"{answer.report['data']}: accuracy by position"
        figure = drawn_by_position(answer.report["lengths"], "accuracy", title, "share of targets met")
        figure.axes[0].set_ylim(-0.02, 1.02)
        return figure


@torch.no_grad()
def _at_length(subject: Subject, length: int) -> dict[str, Any]:
    hits, counts = torch.zeros(2, length, dtype=torch.int64, device=subject.restored.device).unbind()
    for batch in subject.batches(length):
        with subject.restored.autocast():
            hidden = subject.model(batch["tokens"], **documents_of(batch)).hidden
            chosen = _first_choices(subject, hidden)
        valid = batch["targets"] != IGNORE_INDEX
        hits += ((chosen == batch["targets"]) & valid).sum(0)
        counts += valid.sum(0)
    edges = sorted({length * edge // BINS for edge in range(BINS + 1)})
    by_position = [
        {"start": start, "end": end, "accuracy": _share(hits[start:end], counts[start:end])}
        | {"targets": int(counts[start:end].sum())}
        for start, end in pairwise(edges)
        if counts[start:end].any()
    ]
    return {
        "accuracy": _share(hits, counts),
        "targets": int(counts.sum()),
        "state_bytes": subject.model.state_bytes(length),
        "by_position": by_position,
    }


def _first_choices(subject: Subject, hidden: Tensor) -> Tensor:
    """The most likely token after each position, [B, T]; few positions at a time keep the logits small."""
    flat = hidden.flatten(0, 1)
    pieces = flat.split(slice_rows(subject.model.vocab_size, flat.device.type))
    return torch.cat([subject.model.logits(piece).argmax(-1) for piece in pieces]).view(hidden.shape[:2])


def _share(hits: Tensor, counts: Tensor) -> float:
    return hits.sum().item() / max(int(counts.sum()), 1)
