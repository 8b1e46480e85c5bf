"""`evaluate.py task=needle`: a fact hidden in real text, at several depths of contexts of several lengths.

After "needle in a haystack" and RULER's form of it (arXiv 2404.06654), with one thing more: besides whether the model's
first choices are the value, how much likelier the value is than after the same text without the needle. A small model
that finds no value outright shows there whether it looks back.
"""

from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from longmix.data.synthetic import haystack
from longmix.data.synthetic.haystack import Forms, draw_needle, haystack_rows
from longmix.data.synthetic.needle import NeedleData
from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError
from longmix.evaluation.prefill import context_lengths_of, last_hidden, text_of
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.progress import tracked
from longmix.reporting.plots import AROUND, CELL, draw_needles, drawing, new_figure

MOST_NEEDLES = 100_000


class Score(NamedTuple):
    """The result of one row: the share of the value's tokens that the model chose, and the value's log probability."""

    hits: float
    log_probability: float


class Needle(Task):
    """Accuracy and gain of a hidden value, over the depth it is hidden at and the length of the context.

    Contexts are made of the split's text, see `haystack_rows`. Keys, values and texts are the same at every depth; the
    keys and values at every length too.

    Args:
        factors: lengths as multiples of the trained one; the word `seq_len` gives them in tokens instead.
        depths: where the needle lies, from 0 (first) to 1 (right before the question).
        needles: how many of them each cell is a mean of.
        seed: of keys, values and texts.
        statement, question: see `Forms`; None takes those that the data train on, and without such the default ones.

    Raises:
        ConfigError: an impossible setting.
    """

    name = "needle"

    def __init__(
        self,
        factors: list[float],
        depths: list[float],
        needles: int,
        seed: int,
        statement: str | None = None,
        question: str | None = None,
    ) -> None:
        if not depths or min(depths) < 0 or max(depths) > 1:
            raise ConfigError(f"task.depths={depths} must be a list of numbers from 0 to 1.")
        if not 1 <= needles <= MOST_NEEDLES:
            raise ConfigError(f"task.needles={needles} must be from 1 to {MOST_NEEDLES}.")
        if seed < 0:
            raise ConfigError(f"task.seed={seed} must be at least 0.")
        self.factors, self.depths, self.needles, self.seed = factors, depths, needles, seed
        self.statement, self.question = statement, question

    def ask(self, subject: Subject) -> Answer:
        """Ask for every needle at every depth of every length, and without it.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "needles", "cells": [{seq_len, depth, accuracy,
            token_accuracy, gain}], "without": [{seq_len, accuracy, log_probability}]}`: `accuracy` is of whole values
            under greedy choice; `gain` is in nats a value, over the same context without the needle, which `without`
            is of.

        Raises:
            ConfigError: no room for the needle, or data that are no text.
            DataError: the split has less text than the longest context.
        """
        forms = forms_of(subject, self.statement, self.question)
        lengths = context_lengths_of(subject, self.factors, "task.factors")
        text = text_of(subject, "needle")
        drawn = [draw_needle(subject.data.tokenizer, [self.seed, number], forms) for number in range(self.needles)]
        order = tracked(list(product(lengths, drawn)), "needles")
        scored = [_scores(subject, text, one, self.depths, length) for length, one in order]
        shape = len(lengths), self.needles, 1 + len(self.depths), 2
        found = torch.tensor(scored, dtype=torch.float64).view(*shape)
        report = {
            **subject.heading(),
            "needles": self.needles,
            "cells": [
                {"seq_len": length, "depth": depth, **_cell(found[row, :, 1 + column], found[row, :, 0])}
                for (row, length), (column, depth) in product(enumerate(lengths), enumerate(self.depths))
            ],
            "without": [{"seq_len": length, **_control(found[row, :, 0])} for row, length in enumerate(lengths)],
        }
        settings = {"lengths": lengths, "depths": self.depths, "needles": self.needles, "seed": self.seed}
        return Answer(report, {**settings, **vars(forms)})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: means over the depths at each length."""
        cells, (lengths, _) = answer.report["cells"], _axes(answer.report)
        return {
            f"{name}/{length}": fmean(cell[name] for cell in cells if cell["seq_len"] == length)
            for name in ("accuracy", "token_accuracy", "gain")
            for length in lengths
        }

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Share found and gain, over depth and length."""
        report, (lengths, depths) = answer.report, _axes(answer.report)
        table = Table(title=f"{report['needles']} needles a cell: share found, and gain in nats over no needle")
        table.add_column("depth", justify="right")
        for length in lengths:
            table.add_column(f"seq_len {length:,}", justify="right")
        cells = {
            (cell["seq_len"], cell["depth"]): f"{cell['accuracy']:.2f} {cell['gain']:+.2f}" for cell in report["cells"]
        }
        for depth in depths:
            table.add_row(f"{depth:g}", *(cells[length, depth] for length in lengths))
        yield table

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Share found and gain, each over depth and length."""
        report, (lengths, depths) = answer.report, _axes(answer.report)
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


def forms_of(subject: Subject, statement: str | None, question: str | None) -> Forms:
    """The sentences asked for; where one is None, that which the model was trained with, or the usual one.

    Raises:
        ConfigError: a sentence lacks a part; it is called `task.statement` or `task.question`.
    """
    trained = subject.data.forms if isinstance(subject.data, NeedleData) else Forms()
    asked = Forms(
        trained.statement if statement is None else statement, trained.question if question is None else question
    )
    asked.check("task")
    return asked


def _axes(report: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Lengths and depths of the cells, which come length by length."""
    cells = report["cells"]
    lengths = list(dict.fromkeys(cell["seq_len"] for cell in cells))
    return lengths, [cell["depth"] for cell in cells[: len(cells) // len(lengths)]]


def _scores(subject: Subject, text: TokenFile, one: haystack.Needle, depths: list[float], length: int) -> list[Score]:
    """Scores without the needle, and with it at every depth."""
    rows = torch.from_numpy(haystack_rows(one, text, subject.data.tokenizer, depths, length))
    value = torch.from_numpy(one.value.astype(np.int64)).to(subject.restored.device)
    scored = []
    for batch in rows.split(subject.rows(length)):
        hidden = last_hidden(subject, batch.to(subject.restored.device), len(value))
        with torch.no_grad(), subject.restored.autocast():
            scores = subject.model.logits(hidden).log_softmax(-1)
        likely = scores.gather(-1, value.expand(len(batch), -1)[..., None]).sum((1, 2))
        hits = (scores.argmax(-1) == value).double().mean(1)
        scored += [Score(*pair) for pair in zip(hits.tolist(), likely.tolist(), strict=True)]
    return scored


def _cell(with_needle: torch.Tensor, without: torch.Tensor) -> dict[str, float]:
    """The means over needles of two arrays of scores [needles, 2]."""
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
