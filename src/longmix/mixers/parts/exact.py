"""Linear layers in float32 or better, also under autocast: gates and decays lose their meaning in half precision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exact_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output [..., N] for x [..., C], in float32, or in float64 if x is."""
    exact = torch.promote_types(x.dtype, torch.float32)
    bias: Tensor | None = layer.bias
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(exact), layer.weight.to(exact), None if bias is None else bias.to(exact))
