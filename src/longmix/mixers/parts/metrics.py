"""Metrics that mixers measure in forward passes, as sums, so that a step's metric covers all its tokens.

A step has many forward passes: of micro-batches, of slices of rows, in several processes. Their sums add up. Metrics
that do not add up, such as a root or the largest share, are computed from the sums once, where they are logged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.pytrees import pytree

_BINS = 256
"""Of the histogram from which `Quantile` is computed."""


@pytree
@dataclass
class Measure:
    """Base of the measures: `of` takes sums of a forward pass, `figure` computes the metric from them.

    Attributes:
        sums: float64, of one shape in all passes.
    """

    sums: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree(cls)

    def figure(self) -> Tensor:
        """The metric as it is logged, a scalar."""
        raise NotImplementedError

    def plus(self, other: "Measure") -> Self:
        """The measure of two passes together."""
        return dataclasses.replace(self, sums=self.sums + other.sums)

    def in_last_slice(self, state: object) -> Self:
        """The measure itself in the process with the end of the rows, else an empty one: only the end tells it."""
        elsewhere = isinstance(state, Slices) and state.rank < state.size - 1
        return dataclasses.replace(self, sums=torch.zeros_like(self.sums)) if elsewhere else self


Metric = Tensor | Measure
"""A metric of one forward pass. A plain scalar is a mean, to which every pass contributes equally."""


class Mean(Measure):
    """The mean of all numbers of `x`; its `sums` are their sum and their count."""

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Self:
        """The mean of numbers or booleans."""
        return cls(torch.stack([x.sum(dtype=torch.float64), x.new_full((), x.numel(), dtype=torch.float64)]))

    def figure(self) -> Tensor:
        """The logged scalar."""
        return self.sums[0] / self.sums[1]


class RootMeanSquare(Mean):
    """The root of the mean square of all numbers."""

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Self:
        """The root mean square of `x`."""
        return super().of(x.square())

    @classmethod
    @torch.no_grad()
    def of_each(cls, x: Tensor, dim: int) -> list[Self]:
        """Of the numbers at each place along `dim`, in one reduction for all."""
        squares = x.square().movedim(dim, 0).flatten(1)
        totals = squares.sum(1, dtype=torch.float64)
        counts = torch.full_like(totals, squares.shape[1])
        return [cls(sums) for sums in torch.stack([totals, counts], 1).unbind()]

    def figure(self) -> Tensor:
        """The logged scalar."""
        return super().figure().sqrt()


class MeanProduct(Measure):
    """The mean of one kind of numbers times that of another."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Self:
        """The mean of `x` times the mean of `y`."""
        return cls(torch.stack([Mean.of(x).sums, Mean.of(y).sums]))

    def figure(self) -> Tensor:
        """The logged scalar."""
        return (self.sums[:, 0] / self.sums[:, 1]).prod()


class Counts(Measure):
    """Base of the metrics of label counts; `sums` are [H, labels]."""

    @classmethod
    @torch.no_grad()
    def of(cls, labels: Tensor, num_labels: int) -> Self:
        """Count integer labels [B, T, H]."""
        places = labels.flatten(0, 1).long().mT
        ones = torch.ones_like(places, dtype=torch.float64)
        return cls(ones.new_zeros(len(places), num_labels).scatter_add_(1, places, ones))

    def shares(self) -> Tensor:
        """The share of each label in each head, [H, labels]."""
        return self.sums / self.sums.sum(-1, keepdim=True)


class LargestShare(Counts):
    """The largest share times the number of labels, on average over the heads: 1 is even."""

    def figure(self) -> Tensor:
        """The logged scalar."""
        return self.shares().amax(-1).mean() * self.sums.shape[-1]


class Entropy(Counts):
    """Entropy of the shares over the largest possible, on average over the heads: 1 is even."""

    def figure(self) -> Tensor:
        """The logged scalar."""
        return torch.special.entr(self.shares()).sum(-1).mean() / math.log(self.sums.shape[-1])


class Occupied(Counts):
    """The share of labels that come up at all, on average over the heads."""

    def figure(self) -> Tensor:
        """The logged scalar."""
        return (self.sums > 0).double().mean()


class Quantile(Counts):
    """A number from 0 to 1 below which a share of all numbers lies, within a bin of 1 / 256; see its subclasses."""

    share: ClassVar[float]

    @classmethod
    @torch.no_grad()
    def of_each(cls, x: Tensor) -> list[Self]:
        """Of the numbers of each head, x [B, T, H]."""
        bins = (x * _BINS).floor().clamp(0, _BINS - 1)
        return [cls(sums) for sums in Counts.of(bins, _BINS).sums.split(1)]

    def figure(self) -> Tensor:
        """The logged scalar: where in its bin, as if numbers were evenly spread there."""
        shares = self.shares()[0]
        below = shares.cumsum(0)
        place = (below < self.share).sum().clamp(max=_BINS - 1)
        inside = 1 - (below[place] - self.share) / shares[place].clamp(min=1e-30)
        return (place + inside.clamp(0, 1)) / _BINS


class LowEnd(Quantile):
    """The number below which 5 % lie."""

    share = 0.05


class HighEnd(Quantile):
    """The number below which 95 % lie."""

    share = 0.95


def accumulate(measures: dict[str, Measure], seen: Mapping[str, Metric]) -> None:
    """Add the metrics of another pass to `totals`."""
    for name, value in seen.items():
        measure = value if isinstance(value, Measure) else Mean.of(value.detach())
        measures[name] = measures[name].plus(measure) if name in measures else measure


def figures(measures: dict[str, Measure], sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The metrics over all processes, in one exchange. All must call it with the same measures."""
    if not measures:
        return {}
    flat = sum_over_processes(torch.cat([measure.sums.flatten() for measure in measures.values()]))
    parts = flat.split([measure.sums.numel() for measure in measures.values()])
    return {
        name: dataclasses.replace(measure, sums=part.view_as(measure.sums)).figure().item()
        for (name, measure), part in zip(measures.items(), parts, strict=True)
    }
