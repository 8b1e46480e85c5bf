"""`prefill=star`: a prompt is read in blocks that see themselves and the prompt's first tokens.

Star Attention (Acharya et al. 2024, arXiv 2411.17116), first phase. With blocks of n tokens and an anchor of a <= n,
token i of a prompt sees

    j <= i,  j // n == i // n                   its own block
    j < a                                       the anchor

at true positions. The authors read each block behind a copy of the anchor; the layers above see the same in one pass,
since the anchor's tokens see only the first block. What comes later sees everything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longmix.caches.segments import merged
from longmix.errors import ConfigError
from longmix_kernels.attention import attention


@dataclass(frozen=True, kw_only=True)
class Star:
    """The settings.

    Args:
        block: tokens of a block, counted from the beginning of the prompt.
        anchor: first tokens that every block sees, at most `block`; None for the whole first block, 0 for none.

    Raises:
        ConfigError: naming the setting.
    """

    block: int = 4096
    anchor: int | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"prefill.block={self.block} must be at least 1.")
        if self.anchor is not None and not 0 <= self.anchor <= self.block:
            raise ConfigError(f"prefill.anchor={self.anchor} must be from 0 to prefill.block={self.block}.")

    @property
    def anchor_tokens(self) -> int:
        """How many first tokens every block sees."""
        return self.block if self.anchor is None else self.anchor

    def visible_pairs(self, length: int) -> int:
        """How many pairs of a query and a key a prompt of `length` tokens has in a layer."""
        blocks, rest = divmod(length, self.block)
        triangles = blocks * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        return triangles + self.anchor_tokens * max(0, length - self.block)


@dataclass(frozen=True)
class StarReading:
    """A prompt on its way through `Star`.

    Attributes:
        star: the settings.
        dense_from: the place in the row, padding included, from which tokens see everything before them.
    """

    star: Star
    dense_from: int

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        *,
        scale: float | None = None,
        one_document: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend from a piece of prompts.

        Args:
            query: [B, T, Hq, K].
            key, value: [B, S, Hkv, .], of every token of the rows so far, the piece at their end.
            positions: int64 [B, T], of the piece in its documents.
            scale: the factor on the scores, K ** -0.5 by default.
            one_document: whether each row is one document, so that positions are places.

        Returns:
            The output [B, T, Hq, V] and the logsumexp [B, T, Hq].
        """
        block, (length, end) = self.star.block, (query.shape[1], key.shape[1])
        place = torch.arange(end - length, end, device=positions.device)
        document = place - positions  # where each token's document begins
        own = positions // block * block
        before = torch.where(place < self.dense_from, own.clamp(max=self.star.anchor_tokens), own)
        skipped = (end - length) // block * block if one_document else 0
        lo = _bounds(document + own - skipped)
        found = [attention(query, key[:, skipped:], value[:, skipped:], lo=lo, scale=scale, return_logsumexp=True)]
        most = min(end, self.star.anchor_tokens) if one_document and end <= self.dense_from else end
        if most and not (one_document and end <= block):
            lo, hi = _bounds(document), _bounds(document + before)
            anchor = key[:, :most], value[:, :most]
            found.append(attention(query, *anchor, lo=lo, hi=hi, scale=scale, return_logsumexp=True))
        return merged(found)


def _bounds(x: Tensor) -> Tensor:
    """int64 [B, T] as bounds of all heads, int32 [B, 1, T]."""
    return x[:, None].to(torch.int32).contiguous()
