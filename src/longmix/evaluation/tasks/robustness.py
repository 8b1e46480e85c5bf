"""`evaluate.py task=robustness`: the loss under changes of the attention scores, the worst ones and random ones."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from longmix.batch import IGNORE_INDEX, Batch, documents_of
from longmix.errors import ConfigError
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.model.adversarial import Adversary, attacked_mixers
from longmix.reporting.plots import draw_curves, drawing, new_figure


class Robustness(Task):
    """The loss with a bias of each key, of length xi for each row, document, layer and head.

    The worst bias is that of the gradient (`longmix.model.adversarial`), taken for each window on its own. A random one
    of the same length says how much of the harm is its direction.

    Args:
        xi: the length, or several of them.
        layers: numbers of the layers, from 0; None takes all that have such scores.

    Raises:
        ConfigError: no length, or one that is not above 0.
    """

    name = "robustness"

    def __init__(self, xi: float | list[float] = 1.0, layers: list[int] | None = None) -> None:
        self.xi, self.layers = xi, layers
        self._lengths = xi if isinstance(xi, list) else [xi]
        if not self._lengths or not all(0 < length < math.inf for length in self._lengths):
            raise ConfigError(f"task.xi={xi} must be a number above 0, or a list of them.")

    def ask(self, subject: Subject) -> Answer:
        """Run each window once for the gradient and then under every change.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "layers": how many, "lengths": {seq_len: {"loss",
            "worst": {xi: loss}, "random": {xi: loss}, "tokens"}}}`, losses in nats per token.

        Raises:
            ConfigError: a layer without such scores, or more memory than there is.
            DataError: the split has fewer tokens than a length.
        """
        mixers = attacked_mixers(subject.model, self.layers, "task.layers")
        adversaries = {f"{xi:g}": Adversary(mixers, xi) for xi in self._lengths}
        found = {length: _at_length(subject, length, adversaries) for length in subject.checked_seq_lens()}
        return Answer({**subject.heading(), "layers": len(mixers), "lengths": found})

    def tables(self, answer: Answer) -> Iterator[Table]:
        """A row for each length of the change."""
        for length, found in answer.report["lengths"].items():
            table = Table(
                title=f"loss of {answer.report['split']} windows of {length:,} tokens under a change of the scores of "
                f"{answer.report['layers']} layers"
            )
            for heading in ("xi", "worst change", "random change"):
                table.add_column(heading, justify="right")
            table.add_row("none", *[f"{found['loss']:.4f}"] * 2)
            for xi, worst in found["worst"].items():
                table.add_row(xi, f"{worst:.4f}", f"{found['random'][xi]:.4f}")
            yield table

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """The loss by the length of the change."""
        curves = {}
        for length, found in answer.report["lengths"].items():
            for kind in ("worst", "random"):
                x = [0.0, *map(float, found[kind])]
                curves[f"{kind}, seq_len {length}"] = (x, [found["loss"], *found[kind].values()])
        figure, (axes,) = new_figure(1)
        title = f"{answer.report['split']} loss under a change of the scores"
        draw_curves(axes, curves, title=title, x_label="length of the change, xi", y_label="nats per token")
        return figure


def _at_length(subject: Subject, length: int, adversaries: dict[str, Adversary]) -> dict[str, Any]:
    sums: dict[tuple[str, str], float] = {}
    clean, tokens = 0.0, 0
    random = torch.Generator().manual_seed(0)
    for batch in subject.batches(length):
        loss, gradients = _gradients(subject, next(iter(adversaries.values())), batch)
        clean += loss
        tokens += int((batch["targets"] != IGNORE_INDEX).sum())
        drawn = [torch.randn(x.shape, generator=random, dtype=x.dtype).to(x.device) for x in gradients]
        for xi, adversary in adversaries.items():
            for kind, directions in (("worst", gradients), ("random", drawn)):
                with torch.no_grad(), adversary.attacking(directions, batch["document_ids"]):
                    loss = float(_losses(subject, batch).sum())
                sums[kind, xi] = sums.get((kind, xi), 0.0) + loss
    kinds = {kind: {xi: sums[kind, xi] / max(tokens, 1) for xi in adversaries} for kind in ("worst", "random")}
    return {"loss": clean / max(tokens, 1), **kinds, "tokens": tokens}


@torch.enable_grad()
def _gradients(subject: Subject, adversary: Adversary, batch: Batch) -> tuple[float, Sequence[Tensor]]:
    """The sum of a batch's losses, and the gradient of each mixer's zeros."""
    with adversary.watching(batch["tokens"]) as zeros:
        loss = _losses(subject, batch).sum()
        found = torch.autograd.grad(loss, zeros, allow_unused=True, materialize_grads=True)
    return float(loss.detach()), found


def _losses(subject: Subject, batch: Batch) -> Tensor:
    with subject.restored.autocast():
        losses: Tensor = subject.model(batch["tokens"], batch["targets"], **documents_of(batch)).token_losses
    return losses
