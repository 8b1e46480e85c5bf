"""`evaluate.py task=needle`: a fact hidden in real text, at several depths of contexts of several lengths.

After "needle in a haystack" and RULER's form of it (arXiv 2404.06654), with one thing more: besides whether the model's
first choices are the value, how much likelier the value is than after the same text without the needle. A small model
that finds no value outright shows there whether it looks back.
"""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from longmix.data.synthetic.haystack import Forms, Needle, draw_needle, haystack_rows
from longmix.data.synthetic.needle import NeedleData
from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError
from longmix.evaluation.prefill import context_lengths_of, last_hidden, text_of
from longmix.evaluation.subject import Subject, tracked
from longmix.reporting.plots import AROUND, CELL, draw_needles, drawing, new_figure

MOST_NEEDLES = 100_000


class Answer(NamedTuple):
    """The result of one row: the share of the value's tokens that the model chose, and the value's log probability."""

    hits: float
    log_probability: float


def needle(
    subject: Subject,
    factors: list[float],
    depths: list[float],
    needles: int,
    seed: int,
    statement: str | None = None,
    question: str | None = None,
) -> dict[str, Any]:
    """Accuracy and gain of a hidden value, over the depth it is hidden at and the length of the context.

    Contexts are made of the split's text, see `haystack_rows`. Keys, values and texts are the same at every depth; the
    keys and values at every length too.

    Args:
        subject: what to evaluate.
        factors: lengths as multiples of the trained one; the word `seq_len` gives them in tokens instead.
        depths: where the needle lies, from 0 (first) to 1 (right before the question).
        needles: how many of them each cell is a mean of.
        seed: of keys, values and texts.
        statement, question: see `Forms`; None takes those that the data train on, and without such the default ones.

    Returns:
        `{"split", "step", "trained_seq_len", "precision", "needles", "cells": [{seq_len, depth, accuracy,
        token_accuracy, gain}], "without": [{seq_len, accuracy, log_probability}]}`: `accuracy` is of whole values under
        greedy choice; `gain` is in nats a value, over the same context without the needle, which `without` is of.

    Raises:
        ConfigError: an impossible setting, no room for the needle, or data that are no text.
        DataError: the split has less text than the longest context.
    """
    forms = _forms(subject, statement, question)
    _check(depths, needles, seed)
    lengths = context_lengths_of(subject, factors, "task.needle.factors")
    text = text_of(subject, "needle")
    drawn = [draw_needle(subject.data.tokenizer, [seed, number], forms) for number in range(needles)]
    order = list(product(lengths, drawn))
    answers = [
        _answers(subject, text, one, depths, length) for length, one in tracked(order, "needles", total=len(order))
    ]
    found = torch.tensor(answers, dtype=torch.float64).view(len(lengths), needles, 1 + len(depths), 2)
    report = {
        **subject.heading(),
        "needles": needles,
        "cells": [
            {"seq_len": length, "depth": depth, **_cell(found[row, :, 1 + column], found[row, :, 0])}
            for (row, length), (column, depth) in product(enumerate(lengths), enumerate(depths))
        ],
        "without": [{"seq_len": length, **_control(found[row, :, 0])} for row, length in enumerate(lengths)],
    }
    _print(report, lengths, depths)
    settings = {"lengths": lengths, "depths": depths, "needles": needles, "seed": seed, **vars(forms)}
    subject.save("needle", report, _drawn(report, lengths, depths), settings)
    return report


def _check(depths: list[float], needles: int, seed: int) -> None:
    if not depths or min(depths) < 0 or max(depths) > 1:
        raise ConfigError(f"task.needle.depths={depths} must be a list of numbers from 0 to 1.")
    if not 1 <= needles <= MOST_NEEDLES:
        raise ConfigError(f"task.needle.needles={needles} must be from 1 to {MOST_NEEDLES}.")
    if seed < 0:
        raise ConfigError(f"task.needle.seed={seed} must be at least 0.")


def _forms(subject: Subject, statement: str | None, question: str | None) -> Forms:
    trained = subject.data.forms if isinstance(subject.data, NeedleData) else Forms()
    forms = Forms(
        trained.statement if statement is None else statement, trained.question if question is None else question
    )
    forms.check("task.needle")
    return forms


def _answers(subject: Subject, text: TokenFile, one: Needle, depths: list[float], length: int) -> list[Answer]:
    """Answers without the needle, and with it at every depth."""
    rows = torch.from_numpy(haystack_rows(one, text, subject.data.tokenizer, depths, length))
    value = torch.from_numpy(one.value.astype(np.int64)).to(subject.restored.device)
    answers = []
    for batch in rows.split(subject.rows(length)):
        hidden = last_hidden(subject, batch.to(subject.restored.device), len(value))
        with torch.no_grad(), subject.restored.autocast():
            scores = subject.model.logits(hidden).log_softmax(-1)
        likely = scores.gather(-1, value.expand(len(batch), -1)[..., None]).sum((1, 2))
        hits = (scores.argmax(-1) == value).double().mean(1)
        answers += [Answer(*pair) for pair in zip(hits.tolist(), likely.tolist(), strict=True)]
    return answers


def _cell(with_needle: torch.Tensor, without: torch.Tensor) -> dict[str, float]:
    """Means over needles; both are [needles, 2] as `Answer` has it."""
    return {
        "accuracy": (with_needle[:, 0] == 1).double().mean().item(),
        "token_accuracy": with_needle[:, 0].mean().item(),
        "gain": (with_needle[:, 1] - without[:, 1]).mean().item(),
    }


def _control(without: torch.Tensor) -> dict[str, float]:
    return {
        "accuracy": (without[:, 0] == 1).double().mean().item(),
        "log_probability": without[:, 1].mean().item(),
    }


def _print(report: dict[str, Any], lengths: list[int], depths: list[float]) -> None:
    table = Table(title=f"{report['needles']} needles a cell: share found, and gain in nats over no needle")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"seq_len {length:,}", justify="right")
    cells = {
        (cell["seq_len"], cell["depth"]): f"{cell['accuracy']:.2f} {cell['gain']:+.2f}" for cell in report["cells"]
    }
    for depth in depths:
        table.add_row(f"{depth:g}", *(cells[length, depth] for length in lengths))
    Console().print(table)


@drawing()
def _drawn(report: dict[str, Any], lengths: list[int], depths: list[float]) -> Figure:
    figure, (found, gained) = new_figure(2, height=CELL * len(depths) + AROUND)
    grids = {
        name: np.array([cell[name] for cell in report["cells"]]).reshape(len(lengths), len(depths)).T
        for name in ("accuracy", "gain")
    }
    reach = max(1.0, float(np.abs(grids["gain"]).max()))
    trained: Any = {"trained_seq_len": report["trained_seq_len"]}
    title = f"{report['split']}: share of {report['needles']} needles found"
    draw_needles(found, grids["accuracy"], lengths, depths, title=title, **trained)
    title, limits = "nats that the needle adds to its value", (-reach, reach)
    draw_needles(gained, grids["gain"], lengths, depths, title=title, limits=limits, colours="RdBu", **trained)
    return figure
