"""The cache of `cache=h2o`: slots for heavy hitters and a ring for the newest tokens, which are written again."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.exact import ExactCache
from longmix.caches.scores import attention_mass, best, budgets_of
from longmix.caches.store import Store, taken
from longmix_kernels.attention import Segment, decode_attention

if TYPE_CHECKING:
    from longmix.caches.h2o import H2O


class H2OCache(ExactCache):
    """Exact, with scores, until a prompt has ended that is beyond the budget; then slots that are written again.

    Attributes:
        score: [B, Hkv, 1 or G, capacity], of the tokens in the store; None once tokens were dropped.
        heavy_key, heavy_value, recent_key, recent_value: [B, Hkv, slots, .], None before. The token at position p of a
            document is in slot p mod the row's `recent_size` while it is among the newest.
        heavy_score, recent_score: [B, Hkv, slots].
        heavy_position: int32 [B, Hkv, slots], only where means are taken.
        heavy_size, recent_size: int64 [B], how many slots a row has.
        standing: int64 [B], how many heavy slots, from the first on, are of representatives, which stay.
        ended: whether a prompt has ended.
    """

    kind: "H2O"
    slot_tensors: ClassVar[tuple[str, ...]] = (
        *("heavy_key", "heavy_value", "heavy_score", "heavy_position"),
        *("recent_key", "recent_value", "recent_score"),
    )
    row_tensors: ClassVar[tuple[str, ...]] = ("heavy_size", "recent_size", "standing")
    tensors: ClassVar[tuple[str, ...]] = (*ExactCache.tensors, "score", *slot_tensors, *row_tensors)
    numbers: ClassVar[tuple[str, ...]] = (*ExactCache.numbers, "ended")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.score: Tensor | None = None
        self.heavy_key: Tensor | None = None
        self.heavy_value: Tensor | None = None
        self.heavy_score: Tensor | None = None
        self.heavy_position: Tensor | None = None
        self.recent_key: Tensor | None = None
        self.recent_value: Tensor | None = None
        self.recent_score: Tensor | None = None
        zeros = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.heavy_size, self.recent_size, self.standing = zeros, zeros.clone(), zeros.clone()
        self.ended = False

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """As `exact` until tokens are dropped."""
        if self.recent_key is not None:
            return self._read_slots(new, with_logsumexp)
        found = super().read(new, with_logsumexp)
        self._score(new)
        if self.ended:
            self._drop(self.length + new.count, new.positions[:, -1] + 1)
        return found

    def prompt_ended(self) -> None:
        """Drop what is beyond the budget, from now on after each step."""
        self.ended = True
        if self.recent_key is None and self.length:
            self._drop(self.length, self.next_position)

    # before tokens are dropped

    def _score(self, new: NewTokens) -> None:
        """Add the weights of new queries, whose tokens the store has."""
        after = self.length + new.count
        scores = self._score_room(new.query, after)
        by_head = bool(self.kind.representatives)
        if new.count == 1 and new.ids is None:
            segments = self.segments(new)
            _, _, weights = decode_attention(new.query, segments, scale=new.scale, return_weights=True)
            start = 0
            for part in weights or ():
                mass = part[:, :, :, 0] if by_head else part[:, :, :, 0].sum(2, keepdim=True)
                scores[..., start : start + mass.shape[-1]] += mass
                start += mass.shape[-1]
            return
        first = after - 1 - new.positions[:, -1]
        scores[..., :after] += attention_mass(new.query, self.whole()[0], first=first, scale=new.scale, by_head=by_head)

    def _score_room(self, query: Tensor, slots: int) -> Tensor:
        have = 0 if self.score is None else self.score.shape[-1]
        if self.score is None or have < slots:
            size = self.shape.batch, self.shape.key_heads, self.kind.score_heads(self.shape)
            room = max(2 * have, self.shared_length + self.store.capacity)
            wide = torch.zeros(*size, room, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
            if self.score is not None:
                wide[..., :have] = self.score
            self.score = wide
        return self.score

    def _drop(self, length: int, lengths: Tensor) -> None:
        """Move the tokens that stay into slots, if the longest row is beyond the budget.

        Args:
            length: tokens in the store.
            lengths: int64 [B], those of each row's document.
        """
        heavy, recent = self.kind.slots(length)
        if length <= heavy + recent:
            return
        assert self.score is not None
        key, value = self.whole()
        score, self.score = self.score[..., :length], None
        self.shared, self.store = [], Store()
        self.heavy_size = budgets_of(self.kind.heavy, lengths, 0)
        self.recent_size = budgets_of(self.kind.recent, lengths)
        position = torch.arange(length, device=key.device) - (length - lengths)[:, None]
        self._fill((heavy, recent), key, value, score, position[:, None], lengths)

    def _fill(
        self, sizes: tuple[int, int], key: Tensor, value: Tensor, score: Tensor, position: Tensor, lengths: Tensor
    ) -> None:
        """Fill the slots from tokens in any order.

        Args:
            sizes: heavy and recent slots.
            key, value: [B, Hkv, S, .].
            score: [B, Hkv, 1 or G, S].
            position: int64 [B, Hkv or 1, S], of each in the row's document; below 0 for what is none of it.
            lengths: int64 [B], tokens of the row's document so far.
        """
        heavy, recent = sizes
        newest = position >= (lengths - self.recent_size)[:, None, None]
        allowed = (position >= 0) & ~newest
        counts = torch.minimum((lengths - self.recent_size).clamp(min=0), self.heavy_size)
        ranks = score
        if self.kind.mean:
            ranks = score / (lengths[:, None, None] - position.clamp(min=0)).unsqueeze(2)
        index, self.standing = self._chosen(ranks, allowed, counts, heavy)
        summed = score.sum(2)
        self.heavy_key, self.heavy_value = taken(key, index), taken(value, index)
        self.heavy_score = taken(summed.unsqueeze(-1), index).squeeze(-1)
        if self.kind.mean:
            wide = position.expand(summed.shape).unsqueeze(-1)
            self.heavy_position = taken(wide, index).squeeze(-1).to(torch.int32)
        # the slot behind the last takes what is not among the newest
        slot = torch.where(newest & (position >= 0), position % self.recent_size[:, None, None], recent)
        slot = slot.expand(summed.shape)
        found = []
        for x in (key, value, summed.unsqueeze(-1)):
            room = x.new_zeros(*x.shape[:2], recent + 1, x.shape[3])
            found.append(room.scatter_(2, slot.unsqueeze(-1).expand_as(x), x)[:, :, :recent].contiguous())
        self.recent_key, self.recent_value, self.recent_score = found[0], found[1], found[2].squeeze(-1)

    def _chosen(self, ranks: Tensor, allowed: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The heavy hitters: those that stand for others, where there are such already, stay in front."""
        if self.kind.representatives and self.heavy_key is not None:
            slot = torch.arange(ranks.shape[-1], device=ranks.device)
            ranks = ranks.masked_fill((slot < self.standing[:, None])[:, None, None], torch.inf)
            return best(ranks.sum(2), allowed, counts, most), self.standing
        return self.kind.chosen(ranks, allowed, counts, most)

    # afterwards

    def segments(self, new: NewTokens) -> list[Segment]:
        """The slots in use by each row's document."""
        if self.recent_key is None:
            return super().segments(new)
        assert self.recent_value is not None and self.heavy_key is not None and self.heavy_value is not None
        heavy, recent = self._used()
        found = [Segment(self.recent_key, self.recent_value, count=recent[:, None].to(torch.int32))]
        if self.heavy_key.shape[2]:
            found.insert(0, Segment(self.heavy_key, self.heavy_value, count=heavy[:, None].to(torch.int32)))
        return found

    def _used(self) -> tuple[Tensor, Tensor]:
        """How many heavy and recent slots each row uses, int64 [B]."""
        before = self.next_position
        heavy = torch.minimum((before - self.recent_size).clamp(min=0), self.heavy_size)
        return heavy, torch.minimum(before, self.recent_size)

    def _read_slots(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        if new.count > 1 or new.ids is not None:
            return Cache.read(self, new, with_logsumexp)
        output, logsumexp, weights = decode_attention(
            new.query,
            self.segments(new),
            scale=new.scale,
            new=(new.key, new.value),
            return_logsumexp=with_logsumexp,
            return_weights=True,
        )
        assert weights is not None
        mass = [part[:, :, :, 0].sum(2) for part in weights]
        assert self.heavy_score is not None and self.recent_score is not None
        if len(mass) == 3:
            self.heavy_score += mass[0]
        self.recent_score += mass[-2]
        self._insert(new.key.transpose(1, 2), new.value.transpose(1, 2), mass[-1], new.positions[:, 0])
        return output, logsumexp

    def _insert(self, key: Tensor, value: Tensor, score: Tensor, position: Tensor) -> None:
        """Write a token into the slot of the one that is no longer among the newest, which may become a heavy hitter.

        Args:
            key, value: [B, Hkv, 1, .].
            score: [B, Hkv, 1].
            position: int64 [B].
        """
        slot = (position % self.recent_size)[:, None, None].expand(-1, self.shape.key_heads, 1)
        mine = (self.recent_key, self.recent_value, self.recent_score)
        for recent, heavy, x in zip(mine, self._heavy_places(slot, position), (key, value, score), strict=True):
            assert recent is not None
            at = _like(slot, recent)
            if heavy is not None:
                heavy[0].scatter_(2, *heavy[1:])
            recent.scatter_(2, at, x.to(recent.dtype))

    def _heavy_places(self, slot: Tensor, position: Tensor) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        """What becomes of the token in a recent slot: of key, value and score, the heavy slots, where, and what."""
        assert self.heavy_score is not None and self.recent_score is not None
        size = self.heavy_score.shape[-1]
        if size == 0:
            return [None, None, None]
        old = position - self.recent_size  # its position
        place = torch.arange(size, device=slot.device)
        open_to_all = (place >= self.standing[:, None]) & (place < self.heavy_size[:, None])
        worst, at = (
            self._ranks(self.heavy_score, self.heavy_position, position)
            .masked_fill(~open_to_all[:, None], torch.inf)
            .min(-1, keepdim=True)
        )
        own = self._ranks(self.recent_score.gather(2, slot), old[:, None, None], position)
        free = (old < self.heavy_size)[:, None, None]
        goes = (old >= 0)[:, None, None] & (self.heavy_size > 0)[:, None, None] & (free | (own > worst))
        at = torch.where(free, old.clamp(0, size - 1)[:, None, None], at)
        found: list[tuple[Tensor, Tensor, Tensor] | None] = []
        for heavy, recent in zip(
            (self.heavy_key, self.heavy_value, self.heavy_score),
            (self.recent_key, self.recent_value, self.recent_score),
            strict=True,
        ):
            assert heavy is not None and recent is not None
            there, own_slot = _like(at, heavy), _like(slot, recent)
            stays = torch.where(_like(goes, heavy), recent.gather(2, own_slot), heavy.gather(2, there))
            found.append((heavy, there, stays))
        if self.heavy_position is not None:
            stays = torch.where(goes, old[:, None, None].to(torch.int32), self.heavy_position.gather(2, at))
            self.heavy_position.scatter_(2, at, stays)
        return found

    def _ranks(self, score: Tensor, position: Tensor | None, last: Tensor) -> Tensor:
        """Scores [B, Hkv, n], as sums or as means up to the query at position `last`."""
        if not self.kind.mean or position is None:
            return score
        return score / (last[:, None, None] + 1 - position).clamp(min=1)

    def append(self, new: NewTokens) -> None:
        """Append in place; of a piece after tokens were dropped, keep what the budget allows."""
        if self.recent_key is None:
            super().append(new)
            return
        assert self.recent_value is not None and self.heavy_key is not None and self.heavy_value is not None
        assert self.heavy_score is not None and self.recent_score is not None
        batch, heads, heavy = self.heavy_score.shape
        recent, count = self.recent_score.shape[-1], new.count
        key, value = (
            torch.cat((old.to(x.dtype), ring.to(x.dtype), x.transpose(1, 2)), 2)
            for old, ring, x in (
                (self.heavy_key, self.recent_key, new.key),
                (self.heavy_value, self.recent_value, new.value),
            )
        )
        lengths = new.positions[:, -1] + 1
        begins = torch.zeros_like(lengths) if new.begins is None else new.begins
        goes_on = lengths > count
        position = self._positions(new, begins, goes_on)  # [B, Hkv, S]
        seen = position[:, 0, : heavy + recent] >= 0
        first = begins + heavy + recent
        masses = attention_mass(new.query, key, first=torch.where(goes_on, 0, first), seen=seen, scale=new.scale)
        old = torch.cat((self.heavy_score, self.recent_score), -1).unsqueeze(2)
        score = torch.cat((old, old.new_zeros(batch, heads, 1, count)), -1) + masses
        self.standing = torch.where(goes_on, self.standing, 0)
        self._fill((heavy, recent), key, value, score, position, lengths)

    def _positions(self, new: NewTokens, begins: Tensor, goes_on: Tensor) -> Tensor:
        """Positions of slots and new tokens in each row's document, int64 [B, Hkv, S]; -1 for what is none of it."""
        assert self.heavy_score is not None and self.recent_score is not None
        batch, heads, heavy = self.heavy_score.shape
        recent, last = self.recent_score.shape[-1], self.next_position - 1
        in_heavy, in_recent = self._used()
        slot = torch.arange(max(heavy, recent), device=begins.device)
        if self.heavy_position is None:  # before all of the newest; which of them does not matter
            of_heavy = torch.zeros(batch, heads, heavy, dtype=torch.int64, device=begins.device)
        else:
            of_heavy = self.heavy_position.long()
        of_heavy = of_heavy.masked_fill((slot[:heavy] >= in_heavy[:, None])[:, None], -1)
        age = (last[:, None] - slot[:recent]) % self.recent_size[:, None]
        of_recent = (last[:, None] - age).masked_fill(slot[:recent] >= in_recent[:, None], -1)
        column = torch.arange(new.count, device=begins.device)
        own = new.positions.masked_fill(column < begins[:, None], -1)
        old = torch.cat((of_heavy, of_recent[:, None].expand(-1, heads, -1)), -1)
        old = old.masked_fill(~goes_on[:, None, None], -1)
        return torch.cat((old, own[:, None].expand(-1, heads, -1)), -1)

    def slots_of(self, length: int) -> int:
        """See `ExactCache.slots_of`."""
        return length if self.recent_key is None else 0

    def truncate(self, length: int) -> None:
        """Refused, since scores cannot be taken back."""
        Cache.truncate(self, length)

    def trimmed(self) -> dict[str, Any]:
        """As in `ExactCache`, with the scores of the tokens there are."""
        found = super().trimmed()
        if found["score"] is not None:
            found["score"] = found["score"][..., : self.length].contiguous()
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        super().restore(saved, name)
        slots = self.heavy_key, self.heavy_value, self.recent_key, self.recent_value
        if all(x is None for x in slots):
            return
        self._check_part(*slots[:2], f"{name}.heavy_key")
        self._check_part(*slots[2:], f"{name}.recent_key")
        for part, size in (("heavy", self.heavy_size), ("recent", self.recent_size)):
            key, score = getattr(self, f"{part}_key"), getattr(self, f"{part}_score")
            if score is None or score.shape != key.shape[:3] or not bool(((size >= 0) & (size <= key.shape[2])).all()):
                raise ValueError(f"{name} does not hold as many scores as keys")

    def held_bytes(self) -> int:
        """Keys and values, and their scores."""
        slots = [getattr(self, name) for name in self.slot_tensors]
        scores = 0 if self.score is None else self.score[..., : self.length].numel() * self.score.element_size()
        return super().held_bytes() + scores + sum(x.nbytes for x in slots if x is not None)

    def spare_bytes(self) -> int:
        """Room behind the last token."""
        if self.score is None:
            return super().spare_bytes()
        return super().spare_bytes() + self.score[..., self.length :].numel() * self.score.element_size()

    def bookkeeping_bytes(self) -> int:
        """See `Cache.bookkeeping_bytes`."""
        return super().bookkeeping_bytes() + sum(getattr(self, name).nbytes for name in self.row_tensors)


def _like(at: Tensor, slots: Tensor) -> Tensor:
    """[B, Hkv, 1] for slots [B, Hkv, n] or [B, Hkv, n, D]."""
    return at if slots.ndim == 3 else at.unsqueeze(-1).expand(-1, -1, -1, slots.shape[3])
