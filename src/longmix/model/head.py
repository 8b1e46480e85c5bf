"""Cross-entropy over the vocabulary without ever holding the logits of a whole sequence.

At 64k tokens and a 50k vocabulary the logits alone are 13 GB in float32. Here they are formed for a slice of the tokens
at a time, and once more in the backward pass, so memory is one slice. `F.linear_cross_entropy` of torch 2.13 with
`reduction="none"` does the same; this form also runs on older releases and keeps float32 logits under bf16.
"""

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distributions of the next tokens, as what their logits are made of.

    Attributes:
        hidden: [..., E], the normalised output of the teacher's last block, at the student's positions.
        weight: [V, E], the teacher's head.
        softcap: of the teacher's logits, see `capped`.
        temperature: both models' logits are divided by it.
    """

    hidden: Tensor
    weight: Tensor
    softcap: float | None
    temperature: float


@dataclass
class Scored:
    """What `scored` finds of each position; float32 [...] (float64 for float64 inputs).

    Attributes:
        losses: negative log-likelihood of the target in nats, 0 where ignored.
        peaks: the largest logit, also where ignored.
        log_normalisers: logarithm of the sum of the exponential logits, 0 where ignored.
        divergences: see `divergences`, 0 where ignored.
        hits: bool, whether the target is the most likely token; False where ignored.
    """

    losses: Tensor
    peaks: Tensor | None = None
    log_normalisers: Tensor | None = None
    divergences: Tensor | None = None
    hits: Tensor | None = None


def divergences(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature**2 * KL(p || q), with p and q the softmax of both models' logits over the temperature.

    The square keeps the size of the gradient when the temperature changes (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: [..., V], the student's.
        teacher: [..., V].
        temperature: above 0.

    Returns:
        [...] in nats.
    """
    log_q, log_p = (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


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
    soft: SoftTargets | None = None,
    with_hits: bool = False,
    skip_ignored: bool = False,
) -> Scored:
    """The losses of `token_losses`, and what else is asked for of the same logits, all differentiable but the hits.

    Args:
        hidden, weight, targets, softcap: see `token_losses`.
        with_peaks, with_normalisers, with_hits: what else; see `Scored`.
        soft: a teacher's distributions, for `Scored.divergences`; its logits too are formed slice by slice.
        skip_ignored: form no logits where the target is ignored, where most are; it waits for the device. Peaks need
            all logits, and are not to be had with it.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if skip_ignored:
        chosen = (labels != IGNORE_INDEX).nonzero()[:, 0]
        own = None if soft is None else replace(soft, hidden=soft.hidden.reshape(-1, soft.hidden.shape[-1])[chosen])
        part = scored(
            rows[chosen],
            weight,
            labels[chosen],
            softcap,
            with_normalisers=with_normalisers,
            soft=own,
            with_hits=with_hits,
        )
        columns = part.log_normalisers, part.divergences, part.hits
        placed = (None if column is None else _placed(column, chosen, targets) for column in columns)
        return Scored(_placed(part.losses, chosen, targets), None, *placed)
    most = slice_rows(weight.shape[0] * (1 if soft is None else 2), device_kind(rows.device))
    options = weight, with_peaks, softcap, with_normalisers, soft, with_hits
    taught = None if soft is None else soft.hidden.reshape(-1, soft.hidden.shape[-1])
    if rows.shape[0] <= most:
        found = _slice_losses(rows, labels, taught, *options)
    else:
        parts = rows.split(most)
        theirs = [None] * len(parts) if taught is None else taught.split(most)
        slices = zip(parts, labels.split(most), theirs, strict=True)
        pieces = [checkpoint(_slice_losses, *piece, *options, use_reentrant=False) for piece in slices]
        found = [torch.cat(column) for column in zip(*pieces, strict=True)]
    losses, *others = [part.reshape(targets.shape) for part in found]
    asked = with_peaks, with_normalisers, soft is not None, with_hits
    return Scored(losses, *(others.pop(0) if each else None for each in asked))


def _placed(values: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """`values` [N] at these places of flattened `targets`, in their shape; 0 or False elsewhere."""
    return values.new_zeros(targets.numel()).index_copy(0, places, values).reshape(targets.shape)


def _slice_logits(rows: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(rows, weight)
    return capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)


def _slice_losses(
    rows: Tensor,
    labels: Tensor,
    taught: Tensor | None,
    weight: Tensor,
    with_peaks: bool,
    softcap: float | None,
    with_normalisers: bool,
    soft: SoftTargets | None,
    with_hits: bool,
) -> list[Tensor]:
    logits = _slice_logits(rows, weight, softcap)
    found = [F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)]
    if with_peaks:
        found.append(logits.amax(-1))
    if with_normalisers:  # of the loss, which is the normaliser less the target's logit
        chosen = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        found.append(torch.where(labels == IGNORE_INDEX, 0.0, found[0] + chosen))
    if soft is not None and taught is not None:
        with torch.no_grad():
            teacher = _slice_logits(taught, soft.weight, soft.softcap)
        found.append(torch.where(labels == IGNORE_INDEX, 0.0, divergences(logits, teacher, soft.temperature)))
    if with_hits:
        found.append(logits.argmax(-1) == labels)
    return found
