"""`evaluate.py task=causality`: whether later tokens change earlier outputs, in a model and in its mixers."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from longmix.analysis.causality import (
    TOLERANCE,
    EntropyFinding,
    Finding,
    audit,
    entropy_test,
    mixer_function,
    model_function,
    scale_model,
)
from longmix.errors import ConfigError
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.progress import steps_bar
from longmix.reporting.plots import AROUND, draw_cells, drawing, new_figure

VOCABULARY = 8
"""Vocabulary of the unpredictable tokens; small, so that little training suffices to use a leak."""

MOST_TOKENS = 65_536
"""The most tokens of an audited row, which takes float64 and, with some mixers, memory by the square."""

TOKENS_PER_STEP = 512
"""Tokens of one step of the training on unpredictable tokens."""

CHANGES_WIDTH, CHANGES_HEIGHT = 620, 24
"""Width of the picture and height of one of its lines, in points."""


class Causality(Task):
    """Audits of the model and every layer's mixer in float64; a fresh scale model trained on unpredictable tokens.

    The scale model has the same mixers with smaller windows and blocks (`scale_model`): what selects by content only
    where a row is longer than a window is seen to select there.

    Args:
        length: tokens of the audited rows.
        entropy_length: tokens of the rows of the training.
        entropy_steps: optimizer steps of the training; 0 leaves it out.

    Raises:
        ConfigError: fewer than 8 tokens to audit or 2 to train on, or negative steps.
    """

    name = "causality"
    takes_leaky = True
    reads_split = False

    def __init__(self, length: int = 96, entropy_length: int = 8, entropy_steps: int = 200) -> None:
        for name, number, least in (("length", length, 8), ("entropy_length", entropy_length, 2)):
            if number < least:
                raise ConfigError(f"task.{name}={number} must be at least {least}.")
            if number > MOST_TOKENS:
                raise ConfigError(f"task.{name}={number} must be at most {MOST_TOKENS}.")
        if entropy_steps < 0:
            raise ConfigError(f"task.entropy_steps={entropy_steps} must be at least 0.")
        self.length, self.entropy_length, self.entropy_steps = length, entropy_length, entropy_steps

    def ask(self, subject: Subject) -> Answer:
        """Probe the model, its mixers and a scale model; train that.

        Returns:
            `{"causal", "step", "length", "entropy_length", "findings": {part: [{probe, change, where, kind}]},
            "entropy": {loss, entropy, error} or None}`
        """
        found = dict(_audited(subject, self.length))
        entropy = _trained(subject, self.entropy_length, self.entropy_steps) if self.entropy_steps else None
        causal = not any(finding.leaks for findings in found.values() for finding in findings)
        report = {
            "causal": causal and (entropy is None or entropy.passed),
            "step": subject.step,
            "length": self.length,
            "entropy_length": self.entropy_length,
            "findings": {part: [vars(finding) for finding in findings] for part, findings in found.items()},
            "entropy": None if entropy is None else vars(entropy),
        }
        lengths = {"length": self.length, "entropy_length": self.entropy_length}
        return Answer(report, {**lengths, "entropy_steps": self.entropy_steps}, shown=(found, entropy))

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: 1 if nothing leaks and else 0, and the largest change that was found."""
        changes = [found["change"] for findings in answer.report["findings"].values() for found in findings]
        return {"causal": float(answer.report["causal"]), "largest_change": max(changes, default=0.0)}

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """The findings of each probe in each part, of the training, and the verdict."""
        found, entropy = answer.shown
        yield _table(found)
        if entropy is not None:
            verdict = "not below the entropy" if entropy.passed else "BELOW THE ENTROPY: it learned to use a leak"
            yield (
                f"trained on unpredictable tokens: {entropy.loss:.4f} nats +- {entropy.error:.4f}, entropy "
                f"{entropy.entropy:.4f}: {verdict}"
            )
        causal = answer.report["causal"]
        yield "causal: nothing leaks" if causal else "NOT CAUSAL: its loss is not that of a language model"

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """The largest change that each probe found in each part."""
        found, _ = answer.shown
        figure, (axes,) = new_figure(1, width=CHANGES_WIDTH, height=CHANGES_HEIGHT * len(found) + AROUND)
        draw_changes(axes, found)
        return figure


def _audited(subject: Subject, length: int) -> Iterator[tuple[str, list[Finding]]]:
    model = copy.deepcopy(subject.model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        embedded = model.embedding(tokens)
    yield "model", audit(model_function(model), embedded)
    inputs = torch.randn(2, length, model.shape.d_model, generator=generator, dtype=torch.float64)
    for index, mixer in enumerate(model.mixers()):
        yield f"layer {index} {type(mixer).__name__}", audit(mixer_function(mixer), inputs)
    torch.manual_seed(0)
    small = scale_model(subject.restored.config, length, VOCABULARY).double().eval()
    yield "scale model", audit(model_function(small), inputs)


def _trained(subject: Subject, length: int, steps: int) -> EntropyFinding:
    torch.manual_seed(0)
    model = scale_model(subject.restored.config, length, VOCABULARY)
    rows = max(1, TOKENS_PER_STEP // length)
    with steps_bar("training on unpredictable tokens", steps) as advance:
        return entropy_test(model, seq_len=length, steps=steps, batch_size=rows, after_step=advance)


def _table(found: dict[str, list[Finding]]) -> Table:
    table = Table(title="largest change of an output that must not change, relative; float64 rounds at 1e-16")
    table.add_column("", overflow="fold")
    for finding in next(iter(found.values())):
        table.add_column(finding.probe, justify="right")
    table.add_column("leak", no_wrap=True)
    for part, findings in found.items():
        kinds = sorted({finding.kind for finding in findings} - {"none"})
        table.add_row(part, *(f"{finding.change:.0e}" for finding in findings), "\n".join(kinds) or "none")
    return table


def draw_changes(axes: Any, found: dict[str, list[Finding]]) -> None:
    """Draw the largest change that each probe found in each part: blue from rounding, red from a leak."""
    probes = [finding.probe for finding in next(iter(found.values()))]
    changes = torch.tensor([[finding.change for finding in findings] for findings in found.values()])
    middle = math.log10(TOLERANCE)
    draw_cells(
        axes,
        changes.clamp(1e-17, 1e2).log10().numpy(),
        columns=[probe.replace(" ", "\n") for probe in probes],
        rows=list(found),
        limits=(2 * middle - 2, 2),
        colours="RdBu_r",
        words=[[f"{f.change:.0e}".replace("0e+00", "0") for f in findings] for findings in found.values()],
        title="largest change before a changed token",
    )
