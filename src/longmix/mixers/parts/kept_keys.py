"""The keys that `SparseK` keeps of all blocks before the near ones: chosen, gated, and looked at block by block.

A block's candidates are the keys kept before it and its own; the `keep` largest scores of them are kept after it. The
largest of a union do not depend on the order in which it is made, so all blocks of a row are done at once, by a scan of
log2(T / C) joins, and one after the other as well. Among equal scores the latest keys are kept.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.mixers.parts.attention_state import keys_like
from longmix.mixers.parts.scatterbrain_summaries import Part
from longmix.mixers.parts.sparsek_operator import sparsek
from longmix.mixers.parts.states import mixer_state
from longmix_kernels.attention import attention, bias_columns

Gate = Literal["log", "value", "both"]
LEAST_GATE = 1e-6
"""Smaller gates have its logarithm, so that their gradient stays finite."""


@mixer_state()
@dataclass(frozen=True)
class Kept:
    """Kept keys [B, N, Hkv, K] of the document that goes on; those that are there come first.

    Attributes:
        key, value: [B, N, Hkv, K or head_dim]; K is as in `Rows`.
        score: [B, N, Hkv], by which they were chosen, in float32 or better; -inf where there is none.
        gate: [B, N, Hkv], from 0 to 1, that of the block which left last.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    gate: Tensor

    @classmethod
    def none(cls, like: Tensor, batch: int, keep: int, heads: int, key_dim: int, value_dim: int) -> "Kept":
        """No keys, with room for `keep`, in the dtype and on the device of `like`."""
        key, value = (like.new_zeros(batch, keep, heads, width) for width in (key_dim, value_dim))
        exact = torch.promote_types(like.dtype, torch.float32)
        score = like.new_full((batch, keep, heads), -torch.inf, dtype=exact)
        return cls(key, value, score, torch.zeros_like(score))

    def kept_of(self, rows: Tensor) -> "Kept":
        """The keys of rows where `rows` [B] is set; the others have none."""
        return Kept(self.key, self.value, torch.where(rows[:, None, None], self.score, -torch.inf), self.gate)

    def followed_by(self, key: Tensor, value: Tensor, score: Tensor) -> "Kept":
        """What is kept after one more block [B, C, Hkv, ...]; in rows where none leaves its scores are -inf."""
        pool, keep = Pool.of(self, key, value, score), self.score.shape[1]
        own = torch.arange(keep, device=score.device)
        candidates = torch.cat((torch.arange(keep + score.shape[1] - 1, keep - 1, -1, device=score.device), own))
        chosen = pool.chosen(candidates.expand(len(score), score.shape[2], 1, -1), keep)
        # The gates are those of the block which left last: without one they stay as they are.
        stay = score.isneginf().all(1)[:, :, None, None]
        gates = torch.where(stay, self.gate.transpose(1, 2)[:, :, None], chosen.gates)
        rows = torch.where(stay, own, chosen.rows)
        there = torch.where(stay, (self.score > -torch.inf).transpose(1, 2)[:, :, None], chosen.there)
        return pool.taken(Chosen(rows, gates, there), torch.zeros_like(score[:, :1, 0], dtype=torch.int64))

    def attend(self, query: Tensor, sees: Tensor, gate: Gate, scale: float) -> Part:
        """Attend from queries [B, T, H, head_dim] where `sees` [B, T] is set."""
        count = (self.score[..., 0] > -torch.inf).sum(1, dtype=torch.int32)[:, None]
        hi = count.expand(sees.shape).contiguous()
        # Bounds must not decrease, so rows that see nothing have both at the end.
        lo = torch.where(sees, 0, hi)
        return gated_attention(query, keys_like(self.key, query), self.value, self.gate, lo, hi, gate, scale)


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, lo: Tensor, hi: Tensor, gate: Gate, scale: float
) -> Part:
    """Attention to keys [B, N, Hkv, .] with gates [B, N, Hkv] from `lo` to before `hi`, both [B, T] for all heads."""
    if gate != "log":
        value = value * gates.unsqueeze(-1).to(value.dtype)
    key, value = key.to(query.dtype), value.to(query.dtype)
    if gate != "value":
        bias = gates.clamp(min=LEAST_GATE).log().unsqueeze(-1)
        ones = bias.new_ones(1, query.shape[1], 1, 1)
        query, key, scale = bias_columns(query, key, ones, bias, scale=scale)
    lo, hi = lo[:, None].int(), hi[:, None].int()
    return attention(query, key, value, lo=lo, hi=hi, scale=scale, return_logsumexp=True)


class Chosen(NamedTuple):
    """For each of S blocks the keys that are kept after it, largest score first: [B, Hkv, S, keep].

    Attributes:
        rows: int64, where they are in a `Pool`.
        gates: from 0 to 1.
        there: bool, whether there is such a key.
    """

    rows: Tensor
    gates: Tensor
    there: Tensor


class Pool(NamedTuple):
    """The keys that are kept before some rows, and then those rows: [B, P, Hkv, .], scores [B, P, Hkv]."""

    key: Tensor
    value: Tensor
    score: Tensor

    @classmethod
    def of(cls, before: Kept | None, key: Tensor, value: Tensor, score: Tensor) -> "Pool":
        """The pool of `before` and of rows [B, T, Hkv, ...]."""
        if before is None:
            return cls(key, value, score)
        pairs = (keys_like(before.key, key), key), (before.value, value), (before.score, score)
        return cls(*(torch.cat((a.to(b.dtype), b), 1) for a, b in pairs))

    def scores(self, rows: Tensor) -> Tensor:
        """The scores of rows [B, Hkv, S, N], -inf beyond the pool."""
        places = self.score.shape[1]
        found = self.score.transpose(1, 2).gather(2, rows.flatten(2).clamp(max=places - 1)).view(rows.shape)
        return found.masked_fill(rows >= places, -torch.inf)

    def chosen(self, candidates: Tensor, keep: int) -> Chosen:
        """The keys kept of candidate rows [B, Hkv, S, N], the latest first; there is none at a row beyond the pool."""
        score = self.scores(candidates)
        there = score > -torch.inf
        gates = sparsek(score.masked_fill(~there, 0.0), keep, there)
        order = score.detach().sort(dim=-1, descending=True, stable=True)[1][..., :keep]
        missing = max(0, keep - order.shape[-1])
        parts = (x.gather(-1, order) for x in (candidates.clamp(max=self.score.shape[1] - 1), gates, there))
        return Chosen(*(F.pad(x, (0, missing)) for x in parts))

    def taken(self, chosen: Chosen, block: Tensor) -> Kept:
        """The keys that are kept after the blocks `block` int64 [B, N], each block as a row: [B * N, keep, Hkv, .]."""
        index = block[:, None, :, None].expand(-1, chosen.rows.shape[1], -1, chosen.rows.shape[3])
        rows, gates, there = (x.gather(2, index).permute(0, 2, 3, 1).flatten(0, 1) for x in chosen)
        batch, places, heads = self.score.shape
        row = torch.arange(batch, device=rows.device).repeat_interleave(block.shape[1])[:, None, None]
        flat = ((row * places + rows) * heads + torch.arange(heads, device=rows.device)).flatten()
        key, value, score = (x.flatten(0, 2).index_select(0, flat).view(*rows.shape, *x.shape[3:]) for x in self)
        return Kept(key, value, score.masked_fill(~there, -torch.inf), gates)


def best(score: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` largest scores [..., N] and their rows, largest first, and of equal ones the first."""
    found, order = score.sort(dim=-1, descending=True, stable=True)
    return found[..., :keep], rows.gather(-1, order[..., :keep])
