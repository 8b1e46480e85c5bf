"""How large a recurrent state is in magnitude."""

import math
from typing import Any

import torch
from torch import Tensor


def log_root_mean_square(carried: Any) -> Tensor:
    """Natural logarithm of the root mean square of each head's state, float64 [B, H], minus infinity for zeros.

    Args:
        carried: a recurrent engine's state: a tensor [B, H, K, V], or several of which `memory` is that and stands for
            exp(`log_scale`) times as much.
    """
    memory = carried if isinstance(carried, Tensor) else carried.memory
    # Divided by the largest entry before squaring, since a state that grows may overflow.
    largest = memory.detach().double().abs().amax((-2, -1))
    safe = largest.masked_fill(largest == 0, 1.0)
    size = largest.log() + 0.5 * (memory.detach().double() / safe[..., None, None]).square().mean((-2, -1)).log()
    size = size.masked_fill(largest == 0, -math.inf)
    log_scale = None if isinstance(carried, Tensor) else carried.log_scale
    return size if log_scale is None else size + log_scale.detach().to(torch.float64)
