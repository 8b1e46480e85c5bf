"""Which keys each block of a row sees of those that `SparseK` keeps: all blocks of all documents at once.

A block that begins at key row r has slot r // C. Blocks that are complete begin C rows apart, and so do those with
something before the near blocks; so no two of either kind share a slot, and no shape depends on the documents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.mixers.parts.kept_keys import Chosen, Gate, Kept, Pool, best, gated_attention
from longmix.mixers.parts.scatterbrain_summaries import Part
from longmix_kernels.attention import positions_from_document_ids


@dataclass(frozen=True)
class FarBlocks:
    """Where the blocks of some rows are.

    Attributes:
        size, past: tokens of a block, and how many blocks before the own one are near.
        position: int64 [B, Tk], of each key row in what the rows have of its document.
        before: bool [B, Tk], whether a row is of the document from which keys were kept before these rows.
        complete: int64 [B, S], the first row of each slot's complete block, -1 where there is none.
    """

    size: int
    past: int
    position: Tensor
    before: Tensor
    complete: Tensor

    @classmethod
    def of(cls, document_ids: Tensor | None, like: Tensor, size: int, past: int, number: Tensor | None) -> "FarBlocks":
        """Blocks of `size` tokens in rows like those of `like` [B, Tk, ...].

        Args:
            document_ids: integer [B, Tk], non-decreasing; None if each row is one document.
            like: see above.
            size, past: as the attributes.
            number: int [B], the document from which keys were kept before these rows; None if there is none.
        """
        batch, length = like.shape[:2]
        row = torch.arange(length, device=like.device).expand(batch, length)
        position = row if document_ids is None else positions_from_document_ids(document_ids).long()
        ids = torch.zeros_like(row) if document_ids is None else document_ids
        before = torch.zeros_like(row, dtype=torch.bool) if number is None else ids == number[:, None]
        last = F.pad(position, (0, size))[:, size - 1 :][:, :length]
        begins = (position % size == 0) & (last == position + size - 1)
        return cls(size, past, position, before, _by_slot(begins, size))

    def choose(self, pool: Pool, before: Kept | None, keep: int) -> Chosen:
        """The keys kept after the block of each slot, and first, as of slot -1, those of `before`: [B, Hkv, S + 1, .].

        Args:
            pool: of `before` and these rows.
            before: what was kept before them; None for nothing.
            keep: how many are kept.
        """
        heads, device = pool.score.shape[2], pool.score.device
        ahead = 0 if before is None else keep
        start = self.complete.clamp(min=0)
        own = ahead + start.unsqueeze(-1) + torch.arange(self.size - 1, -1, -1, device=device)
        nowhere = pool.score.shape[1]
        own = own.masked_fill(self.complete.unsqueeze(-1) < 0, nowhere)[:, None].expand(-1, heads, -1, -1)
        first = (self.complete < 0) | (self.position.gather(1, start) == 0)
        with torch.no_grad():
            score, rows = _scan(*best(pool.scores(own), own, keep), first, keep)
            score, rows = (F.pad(x, (0, 0, 1, 0))[:, :, :-1] for x in (score, rows))
            rows = rows.masked_fill(first[:, None, :, None] | score.isneginf(), nowhere)
            if before is not None:
                earlier = torch.arange(keep, device=device).expand(*rows.shape[:3], keep)
                other = ~self.before.gather(1, start)[:, None, :, None]
                rows = torch.cat((rows, earlier.masked_fill(other, nowhere)), -1)
                rows = best(pool.scores(rows), rows, keep)[1]
        after = pool.chosen(torch.cat((own, rows), -1), keep)
        if before is None:
            return Chosen(*(F.pad(x, (0, 0, 1, 0)) for x in after))
        gates, there = before.gate.transpose(1, 2), (before.score > -torch.inf).transpose(1, 2)
        own = torch.arange(keep, device=device).expand_as(gates)
        return Chosen(*(torch.cat((a[:, :, None], b), 2) for a, b in zip((own, gates, there), after, strict=True)))

    def attend(self, query: Tensor, pool: Pool, chosen: Chosen, gate: Gate, scale: float) -> Part:
        """Attention of the last rows' queries [B, Tq, H, head_dim], block by block, to the keys that are kept for each.

        Args:
            query: see above.
            pool, chosen: as `choose` takes and returns them.
            gate, scale: see `gated_attention`.
        """
        batch, queries = query.shape[:2]
        length = self.position.shape[1]
        far = self.position >= self.size * torch.where(self.before, self.past, self.past + 1)
        begin = torch.arange(length, device=query.device) - self.position % self.size
        skipped = max(0, length - queries - self.size + 1) // self.size  # slots before the first query's block
        start = _by_slot((self.position % self.size == 0) & far, self.size)[:, skipped:]
        slot = torch.arange(skipped, skipped + start.shape[1], device=query.device)
        place = start.clamp(min=0)
        block = torch.where(self.position.gather(1, place) > self.past * self.size, slot - self.past, 0).clamp(min=0)
        kept = pool.taken(chosen, block)

        row = place.unsqueeze(-1) + torch.arange(self.size, device=query.device)
        inside = row.clamp(max=length - 1).flatten(1)
        same = (begin.gather(1, inside).view_as(row) == place.unsqueeze(-1)) & (row < length)
        seen = same & (row >= length - queries) & (start >= 0).unsqueeze(-1)
        count = (kept.score[..., 0] > -torch.inf).sum(1).view(batch, -1, 1)
        # Bounds must not decrease: rows before the queries have both at 0, rows of the next block at the end.
        later = (row >= length - queries).cummax(-1)[0]
        hi = count * later
        lo = torch.where(seen, 0, hi)
        index = (inside - (length - queries)).clamp(min=0)[..., None, None].expand(-1, -1, *query.shape[2:])
        folded = query.gather(1, index).view(batch * start.shape[1], self.size, *query.shape[2:])
        bounds = lo.flatten(0, 1), hi.flatten(0, 1)
        mixed, logsumexp = gated_attention(folded, kept.key, kept.value, kept.gate, *bounds, gate, scale)

        own = slice(length - queries, None)
        back = (begin[:, own] // self.size - skipped).clamp(min=0) * self.size + self.position[:, own] % self.size
        mixed, logsumexp = (x.unflatten(0, (batch, -1)).flatten(1, 2) for x in (mixed, logsumexp))
        mixed = mixed.gather(1, back[..., None, None].expand(-1, -1, *mixed.shape[2:]))
        logsumexp = logsumexp.gather(1, back.unsqueeze(-1).expand(-1, -1, logsumexp.shape[2]))
        sees = far[:, own].unsqueeze(-1)
        return mixed.masked_fill(~sees.unsqueeze(-1), 0.0), logsumexp.masked_fill(~sees, -torch.inf)

    def of_next(self) -> Tensor:
        """The place in `Chosen` of what the token after these rows sees, int64 [B]."""
        length, position = self.position.shape[1], self.position[:, -1] + 1
        start = length - position % self.size
        number = position // self.size
        return torch.where(number > self.past, start // self.size - self.past, 0).clamp(min=0)

    def next_is_far(self) -> Tensor:
        """Whether the token after these rows, of the last one's document, may see kept keys: bool [B]."""
        number = (self.position[:, -1] + 1) // self.size
        return (number > self.past) | self.before[:, -1]


def _by_slot(wanted: Tensor, size: int) -> Tensor:
    """The wanted row of each slot of `size` rows, -1 where there is none: [B, S] from bool [B, T]."""
    length = wanted.shape[1]
    row = torch.where(wanted, torch.arange(length, device=wanted.device), -1)
    return F.pad(row, (0, -length % size), value=-1).unflatten(1, (-1, size)).amax(-1)


def _scan(score: Tensor, rows: Tensor, first: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` largest scores [B, H, S, N], and their rows, of all slots up to each one from the last `first` on.

    Two joins for each slot, in log2(S) rounds (Blelloch 1990).
    """
    slots = score.shape[2]
    if slots == 1:
        return score, rows
    even, odd = slice(0, slots - slots % 2, 2), slice(1, None, 2)
    pairs = _joined((score[:, :, even], rows[:, :, even]), (score[:, :, odd], rows[:, :, odd]), first[:, odd], keep)
    inner = _scan(*pairs, first[:, even] | first[:, odd], keep)
    rest = slice(2, None, 2)
    before = tuple(x[:, :, : (slots - 1) // 2] for x in inner)
    others = _joined(before, (score[:, :, rest], rows[:, :, rest]), first[:, rest], keep)
    # Of an odd number of slots the last one has more keys than any pair; else those of a pair are the most there are.
    width = (others if slots % 2 else inner)[0].shape[-1]
    found = []
    for alone, pair, other, none in zip((score, rows), inner, others, (-torch.inf, 0), strict=True):
        first_one, pair, other = (
            F.pad(x, (0, width - x.shape[-1]), value=none) for x in (alone[:, :, :1], pair, other)
        )
        at_even = torch.cat((first_one, other), 2)
        both = torch.stack((at_even[:, :, : slots // 2], pair), 3).flatten(2, 3)
        found.append(torch.cat((both, at_even[:, :, slots // 2 :]), 2))
    return found[0], found[1]


def _joined(
    earlier: tuple[Tensor, ...], later: tuple[Tensor, Tensor], first: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """The best of both, but of `later` alone where it is `first` [B, S] in its document."""
    score = earlier[0].masked_fill(first[:, None, :, None], -torch.inf)
    return best(torch.cat((later[0], score), -1), torch.cat((later[1], earlier[1]), -1), keep)
