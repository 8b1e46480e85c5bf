"""The state of scalar-gated linear attention."""

from typing import NamedTuple

import torch


class LinearState(NamedTuple):
    """What is remembered of all tokens so far, in float32, or float64 for float64 inputs.

    With a normaliser the state means `exp(log_scale) * memory` and `exp(log_scale) * normalizer`; how it is divided
    between the factors is no information, and nothing that a continued call returns depends on it.

    Attributes:
        memory: [B, H, Dk, Dv], the decayed sum of key value^T.
        normalizer: [B, H, Dk], the decayed sum of keys; None without `normalize`.
        log_scale: [B, H], natural logarithm; None without `normalize`.
    """

    memory: torch.Tensor
    normalizer: torch.Tensor | None = None
    log_scale: torch.Tensor | None = None
