"""What the residual stream looks like layer by layer: dimensions, spread, and how far each layer moves it.

The measures of StreetMath (Tseng et al. 2025) as its code computes them, of the hidden states X [T, D] of some tokens,
which are not centred; s are the singular values of X, and layer 0 is the embedding:

    spectral_entropy   entropy of s / sum(s), in nats
    effective_rank     how many s exceed 0.01 of the largest
    eigenvalue_rank    exp of the entropy of s^2 / sum(s^2), the effective rank of Roy and Vetterli (2007) of X^T X;
                       ours: unlike the two above it compares models of different widths
    trace_covariance   sum over channels of the population variance
    cosine, distance, angle   between the mean vectors of a layer and of the one before it

StreetMath's "activation entropy" sums a density, which depends on the width of its bins, and its "gradient norm" is a
deviation times a size; both are left out.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longmix.model.backbone import LanguageModel

SIGNIFICANT = 0.01
"""Singular values above this share of the largest count in the effective rank."""

EPSILON = 1e-12
"""Added inside the logarithm, as StreetMath's code does."""

OF_LAYER = ("spectral_entropy", "effective_rank", "eigenvalue_rank", "trace_covariance")
OF_NEIGHBOURS = ("cosine", "distance", "angle")
"""The measures of a layer, and of a layer against the one before it."""


def measures_of_layer(states: Tensor) -> dict[str, float]:
    """The measures of one layer's hidden states [T, D], in float64."""
    exact = states.detach().double()
    if not exact.isfinite().all():
        return dict.fromkeys(OF_LAYER, float("nan"))
    values = torch.linalg.svdvals(exact)
    return {
        "spectral_entropy": _entropy(values).item(),
        "effective_rank": float((values > SIGNIFICANT * values[0]).sum()),
        "eigenvalue_rank": _entropy(values.square()).exp().item(),
        "trace_covariance": exact.var(0, correction=0).sum().item(),
    }


def measures_of_neighbours(before: Tensor, after: Tensor) -> dict[str, float]:
    """Cosine, distance, and angle in radians between the means [D] of two layers' hidden states."""
    one, two = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0, eps=EPSILON).clamp(-1, 1)
    return {"cosine": cosine.item(), "distance": (one - two).norm().item(), "angle": cosine.acos().item()}


def _entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of weights divided by their sum; 0 where all are 0."""
    shares = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return -(shares * (shares + EPSILON).log()).sum()


@dataclass
class LayerReading:
    """The last hidden states of one row at one layer, and the measures of its blocks of positions.

    Attributes:
        keep: tokens at the end of the row whose states are kept.
        block: positions of a block; None for no blocks.
        last: [at most `keep`, D].
        blocks: measures of each whole block, and of what is left of the last if that is at least half a block.
    """

    keep: int
    block: int | None
    last: Tensor | None = None
    blocks: list[dict[str, float]] = field(default_factory=list)
    _open: Tensor | None = None

    def take(self, states: Tensor) -> None:
        """Read the next states [t, D] of the row."""
        self.last = _joined(self.last, states)[-self.keep :].clone()
        if self.block is None:
            return
        found = _joined(self._open, states)
        while len(found) >= self.block:
            self.blocks.append(measures_of_layer(found[: self.block]))
            found = found[self.block :]
        self._open = found.clone()

    def finish(self) -> None:
        """Measure the last block, which may be half of one."""
        if self.block is not None and self._open is not None and 2 * len(self._open) >= self.block:
            self.blocks.append(measures_of_layer(self._open))
        self._open = None


def _joined(before: Tensor | None, after: Tensor) -> Tensor:
    return after if before is None else torch.cat([before, after])


@contextmanager
def read_layers(model: LanguageModel, keep: int, block: int | None = None) -> Iterator[list[LayerReading]]:
    """Within the context, what the model computes of one row, in any number of pieces, is read layer by layer.

    Args:
        model: called with one row [1, t] at a time.
        keep, block: see `LayerReading`.

    Yields:
        the embedding, and then every layer, first to last.
    """
    readings = [LayerReading(keep, block) for _ in range(len(model.blocks) + 1)]

    def embedded(module: Any, inputs: tuple[Any, ...]) -> None:
        readings[0].take(inputs[0][0].detach())

    def reader(reading: LayerReading) -> Any:
        return lambda module, inputs, output: reading.take(output.y[0].detach())

    with ExitStack() as undone:
        undone.callback(model.blocks[0].register_forward_pre_hook(embedded).remove)
        for layer, reading in zip(model.blocks, readings[1:], strict=True):
            undone.callback(layer.register_forward_hook(reader(reading)).remove)
        yield readings
    for reading in readings:
        reading.finish()
