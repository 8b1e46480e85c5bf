"""Cross-entropy over the vocabulary without ever holding the logits of a whole sequence.

At 64k tokens and a 50k vocabulary the logits alone are 13 GB in float32. Here they are formed for a slice of the tokens
at a time, and once more in the backward pass, so memory is one slice. `F.linear_cross_entropy` of torch 2.13 with
`reduction="none"` does the same; this form also runs on older releases and keeps float32 logits under bf16.
"""

from dataclasses import dataclass

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


@dataclass
class Scored:
    """What `scored` finds of each position; float32 [...] (float64 for float64 inputs).

    Attributes:
        losses: negative log-likelihood of the target in nats, 0 where ignored.
        peaks: the largest logit, also where ignored.
        log_normalisers: logarithm of the sum of the exponential logits, 0 where ignored.
    """

    losses: Tensor
    peaks: Tensor | None = None
    log_normalisers: Tensor | None = None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits between plus and minus `softcap`: softcap * tanh(logits / softcap); None leaves them."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of every target in nats.

    Args:
        hidden: [..., D], the normalised output of the last block.
        weight: [V, D], the head.
        targets: int64 [...], with `IGNORE_INDEX` where nothing is to be predicted.
        softcap: see `capped`.

    Returns:
        float32 [...] (float64 for float64 inputs), 0 where ignored; differentiable in `hidden` and `weight`.
    """
    return scored(hidden, weight, targets, softcap).losses


def scored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    *,
    with_peaks: bool = False,
    with_normalisers: bool = False,
) -> Scored:
    """The losses of `token_losses`, and what else is asked for of the same logits, all differentiable.

    Args:
        hidden, weight, targets, softcap: see `token_losses`.
        with_peaks, with_normalisers: what else; see `Scored`.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    most = slice_rows(weight.shape[0], device_kind(rows.device))
    options = weight, with_peaks, softcap, with_normalisers
    if rows.shape[0] <= most:
        found = _slice_losses(rows, labels, *options)
    else:
        slices = zip(rows.split(most), labels.split(most), strict=True)
        pieces = [checkpoint(_slice_losses, *piece, *options, use_reentrant=False) for piece in slices]
        found = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    losses, *others = [part.reshape(targets.shape) for part in found]
    peaks = others.pop(0) if with_peaks else None
    return Scored(losses, peaks, others[0] if with_normalisers else None)


@torch.no_grad()
def hits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Whether each target is the most likely token: bool [...], False where ignored. Arguments as in `token_losses`."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    pieces = rows.split(slice_rows(weight.shape[0], device_kind(rows.device)))
    chosen = torch.cat([F.linear(piece, weight).argmax(-1) for piece in pieces])
    return chosen.reshape(targets.shape) == targets


def _slice_losses(
    rows: Tensor, labels: Tensor, weight: Tensor, with_peaks: bool, softcap: float | None, with_normalisers: bool
) -> list[Tensor]:
    logits = F.linear(rows, weight)
    logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    found = [F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)]
    if with_peaks:
        found.append(logits.amax(-1))
    if with_normalisers:  # of the loss, which is the normaliser less the target's logit
        chosen = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        found.append(torch.where(labels == IGNORE_INDEX, 0.0, found[0] + chosen))
    return found
