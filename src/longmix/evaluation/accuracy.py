"""`evaluate.py task=accuracy`: how many targets the model's first choice meets, by context length and position."""

from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from longmix.data.windows import IGNORE_INDEX
from longmix.evaluation.loss import to_device
from longmix.evaluation.run import Subject
from longmix.evaluation.tasks import TOKENS_AT_ONCE
from longmix.files import replace_json, storage_errors
from longmix.model.head import SLICE_ELEMENTS
from longmix.reporting.plots import draw_curves, new_figure, save_figure

BINS = 16
"""Of positions, all equally long."""


def accuracy(subject: Subject) -> dict[str, Any]:
    """Share of targets that the most likely token is, at every context length asked for, overall and by position.

    Returns:
        `{"split", "step", "data", "lengths": {seq_len: {accuracy, targets, by_position: [{start, end, accuracy,
        targets}]}}}`
    """
    results = {length: _at_length(subject, length) for length in subject.seq_lens()}
    split = subject.words["split"]
    report = {"split": split, "step": subject.step, "data": subject.data.corpus.name, "lengths": results}
    console = Console()
    table = Table(title=f"{subject.data.corpus.name}, {split} split")
    for column in ("seq_len", "accuracy", "targets"):
        table.add_column(column, justify="right")
    for length, result in results.items():
        table.add_row(f"{length:,}", f"{result['accuracy']:.4f}", f"{result['targets']:,}")
    console.print(table)
    name = f"accuracy_{subject.data.corpus.name}_{split}_step{subject.step}"
    with storage_errors(subject.output):
        subject.output.mkdir(parents=True, exist_ok=True)
        figure, (axes,) = new_figure(1)
        curves = {
            f"seq_len {length}": (
                [row["end"] for row in result["by_position"]],
                [row["accuracy"] for row in result["by_position"]],
            )
            for length, result in results.items()
        }
        words = {"title": f"{subject.data.corpus.name}: accuracy by position", "y_label": "share of targets met"}
        draw_curves(axes, curves, x_label="position, up to", log_x=True, marker="o", **words)
        axes.set_ylim(-0.02, 1.02)
        save_figure(figure, subject.output / f"{name}.png")
    replace_json(subject.output / f"{name}.json", report)
    console.print(f"wrote {subject.output / name}.json and .png", highlight=False, markup=False, soft_wrap=True)
    return report


@torch.no_grad()
def _at_length(subject: Subject, length: int) -> dict[str, Any]:
    rows = subject.words["batch_size"] or max(1, TOKENS_AT_ONCE // length)
    loader = subject.data.evaluation_loader(subject.words["split"], length, rows, subject.words["max_tokens"])
    terminal = Console(stderr=True)
    hits, counts = torch.zeros(2, length, dtype=torch.int64, device=subject.restored.device).unbind()
    batches = track(loader, f"seq_len {length}", console=terminal, transient=True, disable=not terminal.is_terminal)
    for batch in batches:
        moved = to_device(batch, subject.restored.device)
        with subject.restored.autocast():
            hidden = subject.model(moved["tokens"], document_ids=moved["document_ids"]).hidden
            chosen = _first_choices(subject, hidden)
        valid = moved["targets"] != IGNORE_INDEX
        hits += ((chosen == moved["targets"]) & valid).sum(0)
        counts += valid.sum(0)
    edges = sorted({length * edge // BINS for edge in range(BINS + 1)})
    by_position = [
        {"start": start, "end": end, "accuracy": _share(hits[start:end], counts[start:end])}
        | {"targets": int(counts[start:end].sum())}
        for start, end in pairwise(edges)
        if counts[start:end].any()
    ]
    return {"accuracy": _share(hits, counts), "targets": int(counts.sum()), "by_position": by_position}


def _first_choices(subject: Subject, hidden: Tensor) -> Tensor:
    """The most likely token after each position [B, T], from a few positions at a time, so that logits stay small."""
    flat = hidden.flatten(0, 1)
    pieces = flat.split(max(1, SLICE_ELEMENTS // subject.model.vocab_size))
    return torch.cat([subject.model.logits(piece).argmax(-1) for piece in pieces]).view(hidden.shape[:2])


def _share(hits: Tensor, counts: Tensor) -> float:
    return hits.sum().item() / max(int(counts.sum()), 1)
