"""What autocast rounds: nothing of gates and decays, and the input of several projections once for all."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output [..., N] for x [..., C], in float32, or in float64 if x is."""
    exact = torch.promote_types(x.dtype, torch.float32)
    bias: Tensor | None = layer.bias
    tensors = x.to(exact), layer.weight.to(exact), None if bias is None else bias.to(exact)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(*tensors)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(*tensors)


def rounded_once(x: Tensor) -> Tensor:
    """`x` as autocast would round it for each of several projections, so that one copy of it is kept for backward.

    Without autocast, and in float64, it is x itself. What must stay exact, as the input of gates, takes x.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
