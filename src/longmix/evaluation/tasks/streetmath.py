"""`evaluate.py task=streetmath`: everyday arithmetic in words, answered exactly, about right or not (StreetMath)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from longmix.data.synthetic.street_math import KINDS, LABELS, Question, label_of, number_in, prompt_of, question
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.errors import ConfigError
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.generation.session import Session
from longmix.generation.text import Row
from longmix.progress import tracked
from longmix.reporting.plots import AROUND, CELL, draw_cells, drawing, new_figure

MOST = 100_000
"""The largest number of questions, shots and tokens."""

LARGE = 3_000_000_000
"""Parameters of the smallest models for which the paper's questions tell anything."""

USUAL_TOKENS = 12
"""Tokens of an answer; twice as many where the tokenizer has a token for each digit and letter."""


class StreetMath(Task):
    """The model goes on from "Final answer:" by its first choices, and what it writes is judged.

    Args:
        questions: of each kind.
        shots: answered questions before each.
        max_tokens: of an answer; None takes 12, or 24 with a tokenizer of bytes.
        seed: of the questions.

    Raises:
        ConfigError: an impossible number.
    """

    name = "streetmath"
    reads_split = False

    def __init__(self, questions: int = 32, shots: int = 2, max_tokens: int | None = None, seed: int = 0) -> None:
        for name, number, least in (
            ("questions", questions, 1),
            ("shots", shots, 0),
            ("max_tokens", max_tokens, 1),
            ("seed", seed, 0),
        ):
            if number is not None and not least <= number <= MOST:
                raise ConfigError(f"task.{name}={number} must be from {least} to {MOST}.")
        self.questions, self.shots, self.max_tokens, self.seed = questions, shots, max_tokens, seed

    def ask(self, subject: Subject) -> Answer:
        """Ask all questions.

        Returns:
            `{"step", "precision", "questions", "shots", "max_tokens", "parameters", "kinds": {kind: {label: share}},
            "shares": {label: share}, "answers": [{"kind", "question", "text", "number", "exact", "label"}]}`.

        Raises:
            ConfigError: the model was trained on a synthetic task.
        """
        tokenizer = subject.restored.tokenizer
        if isinstance(tokenizer, NumberTokenizer):
            raise ConfigError("task=streetmath asks in words, and this model was trained on a synthetic task.")
        most = self.max_tokens or (2 * USUAL_TOKENS if len(tokenizer.encode("123456")) == 6 else USUAL_TOKENS)
        asked = [question(kind, self.seed, number) for kind in KINDS for number in range(self.questions)]
        prompts = [self._prompt(subject, one) for one in asked]
        rows = max(1, subject.rows(max(map(len, prompts)) + most))
        texts: list[str] = []
        for start in tracked(range(0, len(asked), rows), "streetmath", -(-len(asked) // rows)):
            texts += _answers(subject, prompts[start : start + rows], most)
        answers = [_judged(one, text) for one, text in zip(asked, texts, strict=True)]
        report: dict[str, Any] = {"step": subject.step, "precision": subject.restored.precision}
        report |= {"questions": self.questions, "shots": self.shots, "max_tokens": most}
        report |= {"parameters": subject.model.parameter_counts()["total"]}
        report["kinds"] = {kind: _shares([a for a in answers if a["kind"] == kind]) for kind in KINDS}
        report |= {"shares": _shares(answers), "answers": answers}
        own = {"questions": self.questions, "shots": self.shots, "max_tokens": most, "seed": self.seed}
        return Answer(report, own)

    def _prompt(self, subject: Subject, asked: Question) -> torch.Tensor:
        tokenizer = subject.restored.tokenizer
        ids = tokenizer.encode(prompt_of(asked, self.shots, self.seed))
        return torch.from_numpy(np.concatenate([[tokenizer.separator_id], ids]).astype(np.int64))

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the share of each label."""
        return {label.lower().replace(" ", "_"): share for label, share in answer.report["shares"].items()}

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """Shares of the labels by kind, and whether the model is large enough for them to tell anything."""
        report = answer.report
        table = Table(title=f"StreetMath, {report['questions']} questions of a kind: share of answers")
        for heading in ("kind", "exact", "good", "mild", "way off", "none"):
            table.add_column(heading, justify="left" if heading == "kind" else "right")
        for kind, shares in [*report["kinds"].items(), ("all", report["shares"])]:
            table.add_row(kind, *(f"{shares[label]:.1%}" for label in LABELS))
        yield table
        if report["parameters"] < LARGE:
            yield (
                f"the model has {report['parameters']:,} parameters; below about 3 billion, answers to such questions "
                "are guesses, and these shares say little"
            )

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Shares by kind and label."""
        rows = [*answer.report["kinds"].items(), ("all", answer.report["shares"])]
        grid = np.array([[100 * shares[label] for label in LABELS] for _, shares in rows])
        figure, (axes,) = new_figure(1, width=560, height=CELL * len(rows) + AROUND)
        draw_cells(
            axes,
            grid,
            columns=[label.lower() for label in LABELS],
            rows=[kind for kind, _ in rows],
            limits=(0.0, 100.0),
            colours="viridis",
            words=[[f"{share:.0f}" for share in row] for row in grid],
            title="StreetMath: answers, %",
        )
        return figure


def _judged(asked: Question, text: str) -> dict[str, Any]:
    number = number_in(text)
    found = {"kind": asked.kind, "question": asked.text, "text": text, "number": number, "exact": asked.exact}
    return found | {"label": label_of(number, asked.exact)}


def _shares(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    counts = Counter(answer["label"] for answer in answers)
    return {label: counts[label] / len(answers) for label in LABELS}


@torch.no_grad()
def _answers(subject: Subject, prompts: Sequence[torch.Tensor], most: int) -> list[str]:
    """What the model writes after each prompt by its first choices, up to the end of the line."""
    restored = subject.restored
    session = Session(restored.model, len(prompts))
    rows = [Row(restored.tokenizer, []) for _ in prompts]
    with restored.autocast():
        session.prefill([prompt.to(restored.device) for prompt in prompts])
        for left in reversed(range(most)):
            assert session.logits is not None
            chosen = session.logits.argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if not _finished(row):
                    row.take(token)
            if left == 0 or all(map(_finished, rows)):
                break
            session.step(chosen)
    for row in rows:
        row.finish()
    return [row.text.lstrip().split("\n")[0] for row in rows]


def _finished(row: Row) -> bool:
    """Whether the answer's line is over."""
    return row.ended or "\n" in row.text.lstrip()
