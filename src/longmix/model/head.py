"""Cross-entropy over the vocabulary without ever holding the logits of a whole sequence.

At 64k tokens and a 50k vocabulary the logits alone are 13 GB in float32. Here they are formed for a slice of the tokens
at a time, and once more in the backward pass, so memory is one slice. `F.linear_cross_entropy` of torch 2.13 with
`reduction="none"` does the same; this form also runs on older releases and keeps float32 logits under bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longmix.data.windows import IGNORE_INDEX

SLICE_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every target in nats.

    Args:
        hidden: [..., D], the normalised output of the last block.
        weight: [V, D], the head.
        targets: int64 [...], with `IGNORE_INDEX` where nothing is to be predicted.

    Returns:
        float32 [...] (float64 for float64 inputs), 0 where ignored; differentiable in `hidden` and `weight`.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    slice_rows = max(1, SLICE_ELEMENTS // weight.shape[0])
    if rows.shape[0] <= slice_rows:
        return _slice_losses(rows, labels, weight).reshape(targets.shape)
    slices = zip(rows.split(slice_rows), labels.split(slice_rows), strict=True)
    losses = [checkpoint(_slice_losses, *piece, weight, use_reentrant=False) for piece in slices]
    return torch.cat(losses).reshape(targets.shape)


def _slice_losses(rows: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(rows, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
