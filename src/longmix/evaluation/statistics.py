"""Sums from which every reported loss follows: mean, perplexity, bits per byte, loss by position in the context."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from longmix.model.head import IGNORE_INDEX
from longmix_kernels.attention import positions_from_document_ids


class LossStatistics:
    """Accumulates token losses over batches, and over processes by `reduce`.

    A position is the number of earlier tokens of its own document inside the window: what the model could look back on.
    Bits per byte count only targets that stand for text: a separator has no bytes, and its loss is left out.

    Args:
        token_bytes: int [V], the UTF-8 bytes each token stands for; 0 for separators.
        seq_len: longest window; positions are 0 .. seq_len - 1.
        device: where the sums live.
    """

    def __init__(self, token_bytes: Tensor, seq_len: int, device: torch.device | str = "cpu") -> None:
        self.token_bytes = token_bytes.to(device)
        self.loss_by_position = torch.zeros(seq_len, dtype=torch.float64, device=device)
        self.count_by_position = torch.zeros(seq_len, dtype=torch.int64, device=device)
        self.text_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.int64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self._counts_hits = False

    def update(
        self, token_losses: Tensor, targets: Tensor, document_ids: Tensor | None, hits: Tensor | None = None
    ) -> None:
        """Add one batch: losses [B, T] in nats, targets int64 [B, T], document_ids int32 [B, T] or None.

        Args:
            hits: bool [B, T], the targets that were met, for their share.
        """
        if hits is not None:
            self._counts_hits = True
            self.hits += (hits & (targets != IGNORE_INDEX)).sum()
        losses = token_losses.detach().to(torch.float64)
        if document_ids is None:
            positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
        else:
            positions = positions_from_document_ids(document_ids).long()
        valid = targets != IGNORE_INDEX
        byte_counts = torch.where(valid, self.token_bytes[targets.clamp_min(0)], 0)
        self.loss_by_position.index_add_(0, positions.flatten(), torch.where(valid, losses, 0.0).flatten())
        self.count_by_position.index_add_(0, positions.flatten(), valid.long().flatten())
        self.text_loss += torch.where(byte_counts > 0, losses, 0.0).sum()
        self.bytes += byte_counts.sum()

    def reduce(self) -> None:
        """Add the sums of all processes, where there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (self.loss_by_position, self.count_by_position, self.text_loss, self.bytes, self.hits):
                torch.distributed.all_reduce(total)

    def summary(self) -> dict[str, float]:
        """`loss` in nats per target, `perplexity`, `bits_per_byte`, and the counts `tokens` and `bytes`.

        Where `update` was told of hits, also `recall`, the share of targets that were met.
        """
        tokens, byte_count = int(self.count_by_position.sum()), int(self.bytes)
        loss = float(self.loss_by_position.sum()) / max(1, tokens)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float64 above 709
            "bits_per_byte": float(self.text_loss) / math.log(2) / byte_count if byte_count else math.nan,
            "tokens": tokens,
            "bytes": byte_count,
        } | ({"recall": int(self.hits) / max(1, tokens)} if self._counts_hits else {})

    def by_position(self, buckets: list[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
        """Mean loss per bucket `start <= position < end`; buckets without targets are left out.

        Args:
            buckets: None takes `position_buckets(seq_len)`.
        """
        rows = []
        for start, end in buckets or position_buckets(len(self.loss_by_position)):
            count = int(self.count_by_position[start:end].sum())
            if count:
                mean = float(self.loss_by_position[start:end].sum()) / count
                rows.append({"start": start, "end": end, "loss": mean, "tokens": count})
        return rows

    def word_perplexity(self, words: int) -> float:
        """`exp` of the nats of all text over its number of words. As in `bits_per_byte`, separators are left out."""
        return math.exp(min(float(self.text_loss) / words, 700.0))


def equal_buckets(seq_len: int, width: int) -> list[tuple[int, int]]:
    """Buckets of `width` positions that cover 0 .. seq_len - 1; the last may be narrower."""
    return [(start, min(start + width, seq_len)) for start in range(0, seq_len, width)]


def position_buckets(seq_len: int) -> list[tuple[int, int]]:
    """Doubling buckets [0, 16), [16, 32), [32, 64) ... that cover 0 .. seq_len - 1."""
    edges = [0]
    width = 16
    while edges[-1] < seq_len:
        edges.append(min(width, seq_len))
        width *= 2
    return list(itertools.pairwise(edges))
