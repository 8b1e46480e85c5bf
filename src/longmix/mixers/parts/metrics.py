"""What mixers measure in a forward pass, as sums, so that the figure of a step is of all its tokens.

A step has many forward passes: of micro-batches, of slices of rows, in several processes. Their sums add up. Figures
that do not, as a root or the largest share, are made of the sums once, and only where somebody logs them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from longmix.distributed.slices import Slices
from longmix.pytrees import pytree


@pytree
@dataclass
class Measure:
    """Base of the measures; a subclass says in `of` which sums it takes and in `figure` what follows from them.

    Attributes:
        sums: float64, of one shape in all passes.
    """

    sums: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree(cls)

    def figure(self) -> Tensor:
        """What is logged: scalar."""
        raise NotImplementedError

    def plus(self, other: "Measure") -> Self:
        """What two passes measured together."""
        return dataclasses.replace(self, sums=self.sums + other.sums)

    def in_last_slice(self, state: object) -> Self:
        """Of something that only the end of a row tells: of other slices' processes, nothing."""
        elsewhere = isinstance(state, Slices) and state.rank < state.size - 1
        return dataclasses.replace(self, sums=torch.zeros_like(self.sums)) if elsewhere else self


Metric = Tensor | Measure
"""What a forward pass says by a name; a plain scalar is a mean, in which every pass counts alike."""


class Mean(Measure):
    """The mean of all numbers of `x`; its `sums` are their sum and their count."""

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Self:
        """Of numbers or booleans."""
        return cls(torch.stack([x.sum(dtype=torch.float64), x.new_full((), x.numel(), dtype=torch.float64)]))

    def figure(self) -> Tensor:
        """The logged scalar."""
        return self.sums[0] / self.sums[1]


class RootMeanSquare(Mean):
    """The root of the mean square of all numbers."""

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Self:
        """Of numbers."""
        return super().of(x.square())

    def figure(self) -> Tensor:
        """The logged scalar."""
        return super().figure().sqrt()


class MeanProduct(Measure):
    """The mean of one kind of numbers times that of another."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Self:
        """Of numbers of both kinds."""
        return cls(torch.stack([Mean.of(x).sums, Mean.of(y).sums]))

    def figure(self) -> Tensor:
        """The logged scalar."""
        return (self.sums[:, 0] / self.sums[:, 1]).prod()


class Counts(Measure):
    """Base of what follows from how often each label comes up; `sums` are [H, labels]."""

    @classmethod
    @torch.no_grad()
    def of(cls, labels: Tensor, num_labels: int) -> Self:
        """Of integer labels [B, T, H]."""
        places = labels.flatten(0, 1).long().mT
        ones = torch.ones_like(places, dtype=torch.float64)
        return cls(ones.new_zeros(len(places), num_labels).scatter_add_(1, places, ones))

    def shares(self) -> Tensor:
        """Of the labels of each head, [H, labels]."""
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


def accumulate(measures: dict[str, Measure], seen: Mapping[str, Metric]) -> None:
    """Add what another pass measured."""
    for name, value in seen.items():
        measure = value if isinstance(value, Measure) else Mean.of(value.detach())
        measures[name] = measures[name].plus(measure) if name in measures else measure


def figures(measures: dict[str, Measure], sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The figures over all processes, which must all call it and have the same measures; one exchange for all."""
    if not measures:
        return {}
    flat = sum_over_processes(torch.cat([measure.sums.flatten() for measure in measures.values()]))
    parts = flat.split([measure.sums.numel() for measure in measures.values()])
    return {
        name: dataclasses.replace(measure, sums=part.view_as(measure.sums)).figure().item()
        for (name, measure), part in zip(measures.items(), parts, strict=True)
    }
