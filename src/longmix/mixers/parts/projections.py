"""The weights of a mixer's projections, counted without asking for them.

A projection may have no weight of its own: `longmix.model.sharing` forms it from matrices that layers share. So a mixer
calls its projections, `self.query(x)`, and reads `.weight` where it needs the numbers, the dtype or the device.
"""

from collections.abc import Iterable

from torch import nn


def weight_count(layers: Iterable[nn.Module]) -> int:
    """The numbers in the weights of the linear layers among these, biases left out; no weight is formed."""
    return sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))
