"""Weights under another project's names: a table says which name each has there, and how it lies.

Most weights are only renamed. Some are transposed, or are several there: `Place` has both ways.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longmix.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where one of our weights lies in another project's files.

    Attributes:
        names: there; several if it is divided.
        split: makes the weights there of ours.
        join: makes ours of those there. It may fail on weights of other shapes, which are then left as they are.
    """

    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def renamed(name: str) -> Place:
    """The same weight under another name."""
    return Place((name,), lambda weight: [weight], lambda parts: parts[0])


def transposed(name: str) -> Place:
    """A matrix whose rows are columns there."""
    return Place((name,), lambda weight: [weight.T.contiguous()], lambda parts: parts[0].mT.contiguous())


def vector(name: str, *shape: int) -> Place:
    """A vector that has another shape there, one of whose sizes may be -1."""
    return Place((name,), lambda weight: [weight.view(shape)], lambda parts: parts[0].reshape(-1))


def rows(*names: str) -> Place:
    """A matrix whose rows are weights [1, 1, width] there."""
    return Place(
        names,
        lambda weight: [row.view(1, 1, -1) for row in weight],
        lambda parts: torch.stack([part.reshape(-1) for part in parts]),
    )


@dataclass(frozen=True)
class Layout:
    """The names of all weights of a model.

    Attributes:
        outside: of our weights outside the layers, by their names.
        layer: of those of a layer, by their names after its number; places without it and `prefix`.
        prefix: before a layer's number there.
    """

    outside: Mapping[str, Place]
    layer: Mapping[str, Place]
    prefix: str

    def places(self, layers: int) -> dict[str, Place]:
        """The places of a whole model, by our names."""
        found = dict(self.outside)
        for number in range(layers):
            for name, place in self.layer.items():
                names = tuple(f"{self.prefix}{number}.{each}" for each in place.names)
                found[f"blocks.{number}.{name}"] = Place(names, place.split, place.join)
        return found

    def to_theirs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights by the names there.

        Raises:
            CheckpointError: one of them has no place there.
        """
        places = self.places(_layers(weights, "blocks."))
        found: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if name not in places:
                raise CheckpointError(f"{name} has no place in that format.")
            place = places[name]
            found |= zip(place.names, place.split(weight), strict=True)
        return found

    def to_ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights there by our names; what belongs to no place stays as it is.

        Raises:
            CheckpointError: a part of one of ours is missing.
        """
        left, found = dict(weights), {}
        for name, place in self.places(_layers(weights, self.prefix)).items():
            present = [each for each in place.names if each in left]
            if not present:
                continue
            if len(present) < len(place.names):
                lacking = next(each for each in place.names if each not in left)
                raise CheckpointError(f"{lacking} is missing.")
            parts = [left.pop(each) for each in place.names]
            try:
                found[name] = place.join(parts)
            except (RuntimeError, ValueError, IndexError):
                shapes = ", ".join(f"{each} {list(part.shape)}" for each, part in zip(place.names, parts, strict=True))
                raise CheckpointError(f"weights do not fit together: {shapes}.") from None
        return {**found, **left}


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are by the names of weights: one more than the largest number after `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,5})\.")
    numbers = [int(found[1]) for name in weights if (found := pattern.match(name))]
    return max(numbers, default=-1) + 1
