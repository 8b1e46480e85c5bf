"""One key for each earlier block: the summaries of Combiner (Ren et al. 2021, arXiv 2107.05768, its fixed form).

    k_r = pool_j k_j,   q_r = pool_j q_j,   v_r = sum_j softmax_j(scale * q_r . k_j) v_j        over the j of block r

A block is summarised by its own tokens when it is complete, so that nothing later shows. Summaries are keys like any
other: attention to them is merged with that to the near keys through the logsumexp. The pool is the largest of each
channel, as published, or the mean. Near blocks may be seen exactly besides the own one, which the paper does not do.
The state grows by one key per block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longmix.mixers.parts.states import mixer_state
from longmix_kernels.attention import attention, positions_from_document_ids
from longmix_kernels.runtime import has_values, is_readable

GONE = -1
"""The document of a summary, or key, that no later query may see; others are `numbered`, from 0 on."""

Pool = Literal["mean", "max"]

Part = tuple[Tensor, Tensor]
"""Output [B, T, H, head_dim] and logsumexp [B, T, H] of attention to some keys."""


def numbered(document_ids: Tensor, goes_on: Tensor | None = None) -> Tensor:
    """Number each row's documents [B, T] from 0 on, or from 1 where not `goes_on`: int32.

    Args:
        document_ids: integer [B, T].
        goes_on: bool [B], whether the first is the document before, which is number 0; None for all.
    """
    first = torch.zeros_like(document_ids[:, :1], dtype=torch.bool) if goes_on is None else ~goes_on[:, None]
    begins = torch.cat((first, document_ids[:, 1:] != document_ids[:, :-1]), 1)
    return begins.cumsum(1, dtype=torch.int32)


@mixer_state(bookkeeping=("document_ids",))
@dataclass(frozen=True)
class Summaries:
    """Summaries [B, N, Hkv, head_dim] of blocks of the document that goes on, and their documents int32 [B, N].

    In each row those that are there come last, in order; the others have the id `GONE`.
    """

    key: Tensor
    value: Tensor
    document_ids: Tensor

    def kept_of(self, rows: Tensor) -> "Summaries":
        """The summaries of rows where `rows` [B] is set; the others have none."""
        return Summaries(self.key, self.value, torch.where(rows[:, None], self.document_ids, GONE))

    def followed_by(self, new: "Summaries") -> "Summaries":
        """These summaries, then the new ones; `GONE` ones come first or are left out."""
        ids = torch.cat((self.document_ids, new.document_ids), 1)
        there = ids != GONE
        order = there.int().argsort(dim=1, stable=True)[:, ids.shape[1] - int(there.sum(1).max()) :]
        index = order[:, :, None, None].expand(-1, -1, *self.key.shape[2:])
        pairs = (self.key, new.key), (self.value, new.value)
        key, value = (torch.cat((a.to(b.dtype), b), 1).gather(1, index) for a, b in pairs)
        return Summaries(key, value, ids.gather(1, order))

    def attend(self, query: Tensor, sees: Tensor, scale: float) -> Part:
        """Attend from queries [B, T, H, head_dim] where `sees` [B, T] is set to the summaries that are not `GONE`."""
        hi = torch.full_like(sees, self.key.shape[1], dtype=torch.int32)
        lo = hi - (self.document_ids != GONE).sum(1, keepdim=True).int() * sees
        # Bounds must not decrease, so rows that see nothing have theirs at the end.
        return _bounded(query, self.key, self.value, lo, hi, scale)


@dataclass(frozen=True)
class Blocks:
    """Where blocks begin in some rows.

    Attributes:
        number: int64 [B, T], which block a row is in, counted through all documents.
        first: int64 [B, T], the number of the first block of its document.
        count: how many there are at most in a batch row, or more.
        size: tokens of each block where a row is one document, so that blocks lie side by side; else None.
    """

    number: Tensor
    first: Tensor
    count: int
    size: int | None = None

    @classmethod
    def of(
        cls,
        document_ids: Tensor | None,
        batch: int,
        length: int,
        size: int,
        device: torch.device,
        documents: int | None = None,
    ) -> "Blocks":
        """Blocks of `size` tokens, counted from the beginning of each document.

        Args:
            document_ids: integer [B, T]; None if every row is one document.
            batch, length: B and T.
            size: tokens of a block.
            device: of the result.
            documents: the most that a row has. Without it the number of blocks is read, and a GPU waited for; compiled
                code, which cannot read, allows for any, and tensors without values are taken to have two.
        """
        if document_ids is None:
            number = torch.arange(length, device=device).expand(batch, length) // size
            return cls(number, torch.zeros_like(number), -(-length // size), size)
        position = positions_from_document_ids(document_ids).long()
        number = (position % size == 0).long().cumsum(1) - 1
        compiling = torch.compiler.is_compiling()
        if documents is None and (compiling or not has_values(number)):
            documents = length if compiling else 2
        if documents is None or is_readable(number):
            count = int(number.max()) + 1
        else:
            count = min(length, length // size + documents)  # each document may end in a block that is not full
        return cls(number, number - position // size, count)

    def total(self, x: Tensor) -> Tensor:
        """Sums [B, N, ...] over the rows of each block of [B, T, ...]."""
        if self.size is not None:
            return self._side_by_side(x, 0).sum(2)
        index = self.number.view(*self.number.shape, *[1] * (x.dim() - 2)).expand(x.shape)
        return x.new_zeros(x.shape[0], self.count, *x.shape[2:]).scatter_add(1, index, x)

    def largest(self, x: Tensor) -> Tensor:
        """The largest numbers [B, N, ...] of the rows of each block of [B, T, ...], 0 for a block without rows."""
        found = self._largest(x)
        return found if self.size is not None else found.masked_fill(found.isneginf(), 0.0)

    def _largest(self, x: Tensor) -> Tensor:
        """`largest`, but minus infinity for a block without rows."""
        if self.size is not None:
            return self._side_by_side(x, -torch.inf).amax(2)
        index = self.number.view(*self.number.shape, *[1] * (x.dim() - 2)).expand(x.shape)
        return x.new_full((x.shape[0], self.count, *x.shape[2:]), -torch.inf).scatter_reduce(1, index, x, "amax")

    def spread(self, x: Tensor) -> Tensor:
        """Give the value of each block, [B, N, ...], to all its rows: [B, T, ...]."""
        if self.size is not None:
            return x.unsqueeze(2).expand(-1, -1, self.size, *x.shape[2:]).flatten(1, 2)[:, : self.number.shape[1]]
        index = self.number.view(*self.number.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply each of the last Tq rows by the value of its block: x [B, Tq, ...] and y [B, N, ...].

        Dimensions after the second broadcast. Where blocks lie side by side no row's value is kept for the backward
        pass.
        """
        if self.size is not None and x.shape[1] == self.number.shape[1]:
            return (self._side_by_side(x, 0) * y.unsqueeze(2)).flatten(1, 2)[:, : x.shape[1]]
        index = self.number[:, self.number.shape[1] - x.shape[1] :]
        return x * y.gather(1, index.view(*index.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:]))

    def _side_by_side(self, x: Tensor, missing: float) -> Tensor:
        """The rows [B, T, ...] of each block, [B, N, size, ...]; `missing` stands for those that the last one lacks."""
        assert self.size is not None
        lacking = self.count * self.size - x.shape[1]
        if lacking:
            x = torch.cat((x, x.new_full((x.shape[0], lacking, *x.shape[2:]), missing)), 1)
        return x.unflatten(1, (self.count, self.size))

    def summaries(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, pool: Pool = "mean"
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the summaries [B, N, Hkv, head_dim]; query, key and value are [B, T, Hkv, head_dim]."""
        if self.size == 1:  # the softmax of one token
            return key, value
        exact = torch.promote_types(key.dtype, torch.float32)
        q, k, v = (x.to(exact) for x in (query, key, value))
        if pool == "max":
            block_query, block_key = self.largest(q), self.largest(k)
        else:
            size = self.total(torch.ones_like(self.number, dtype=exact)).clamp(min=1)[..., None, None]
            block_query, block_key = self.total(q) / size, self.total(k) / size
        scores = scale * (self.spread(block_query) * k).sum(-1)
        highest = self._largest(scores.detach())
        weights = (scores - self.spread(highest)).exp()
        mixed = self.total(weights.unsqueeze(-1) * v) / self.total(weights).unsqueeze(-1).clamp(min=1.0)
        return block_key.to(key.dtype), mixed.to(value.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, past: int, scale: float) -> Part:
        """Attention of the last rows' queries to summaries of their document more than `past` blocks before them."""
        number, first = (x[:, x.shape[1] - query.shape[1] :] for x in (self.number, self.first))
        hi = torch.maximum(number - past, first)
        return _bounded(query, key, value, first, hi, scale)

    def that_leave(self, leaves: Tensor, ids: Tensor) -> Tensor:
        """Document [B, N] of the blocks of which rows leave, `GONE` for the others; from `leaves` and ids [B, T]."""
        gone = self.total(leaves.long()) > 0
        return torch.where(gone, ids[:, -1:], GONE)


def _bounded(query: Tensor, key: Tensor, value: Tensor, lo: Tensor, hi: Tensor, scale: float) -> Part:
    """Attention with the same bounds [B, T] for all heads."""
    lo, hi = (x[:, None].int().contiguous() for x in (lo, hi))
    return attention(query, key, value, lo=lo, hi=hi, scale=scale, return_logsumexp=True)


def pooled(query: Tensor, key_heads: int, pool: Pool = "mean") -> Tensor:
    """Queries [B, T, H, head_dim] pooled over those that read one key head, [B, T, Hkv, head_dim]."""
    groups = query.unflatten(2, (key_heads, -1))
    return groups.amax(3) if pool == "max" else groups.mean(3)


def no_summaries(like: Tensor, batch: int, heads: int, head_dim: int) -> Summaries:
    """Zero summaries, in the dtype and on the device of `like`."""
    none = like.new_empty(batch, 0, heads, head_dim)
    return Summaries(none, none, torch.empty(batch, 0, dtype=torch.int32, device=like.device))
