"""Cross-entropy over the vocabulary without ever holding the logits of a whole sequence.

At 64k tokens and a 50k vocabulary the logits alone are 13 GB in float32. Here they are formed for a slice of the tokens
at a time, and once more in the backward pass, so memory is one slice. `F.linear_cross_entropy` of torch 2.13 with
`reduction="none"` does the same; this form also runs on older releases and keeps float32 logits under bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longmix.batch import IGNORE_INDEX
from longmix_kernels.runtime import device_kind

SLICE_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32."""

CUDA_SLICE_ELEMENTS = 1 << 27
"""The same on a GPU, 512 MiB: each slice is some 25 launches, which smaller ones would not outlast."""


def slice_rows(vocabulary: int, kind: str) -> int:
    """How many tokens' logits are formed at once.

    Args:
        vocabulary: logits of a token.
        kind: type of the device, such as "cuda".
    """
    return max(1, (CUDA_SLICE_ELEMENTS if kind == "cuda" else SLICE_ELEMENTS) // vocabulary)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every target in nats.

    Args:
        hidden: [..., D], the normalised output of the last block.
        weight: [V, D], the head.
        targets: int64 [...], with `IGNORE_INDEX` where nothing is to be predicted.

    Returns:
        float32 [...] (float64 for float64 inputs), 0 where ignored; differentiable in `hidden` and `weight`.
    """
    return _in_slices(hidden, weight, targets, with_peaks=False)[0]


def token_losses_and_peaks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of `token_losses`, and the largest logit of every position, ignored ones included; float32 [...]."""
    losses, peaks = _in_slices(hidden, weight, targets, with_peaks=True)
    return losses, peaks


@torch.no_grad()
def hits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Whether each target is the most likely token: bool [...], False where ignored. Arguments as in `token_losses`."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    pieces = rows.split(slice_rows(weight.shape[0], device_kind(rows.device)))
    chosen = torch.cat([F.linear(piece, weight).argmax(-1) for piece in pieces])
    return chosen.reshape(targets.shape) == targets


def _in_slices(hidden: Tensor, weight: Tensor, targets: Tensor, with_peaks: bool) -> list[Tensor]:
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    most = slice_rows(weight.shape[0], device_kind(rows.device))
    if rows.shape[0] <= most:
        found = _slice_losses(rows, labels, weight, with_peaks)
    else:
        slices = zip(rows.split(most), labels.split(most), strict=True)
        pieces = [checkpoint(_slice_losses, *piece, weight, with_peaks, use_reentrant=False) for piece in slices]
        found = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    return [part.reshape(targets.shape) for part in found]


def _slice_losses(rows: Tensor, labels: Tensor, weight: Tensor, with_peaks: bool) -> list[Tensor]:
    logits = F.linear(rows, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    return [losses, logits.amax(-1)] if with_peaks else [losses]
