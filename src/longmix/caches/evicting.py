"""The base of caches that drop tokens: exact until then, and after it what was kept, with what came since.

What is kept of the prompt is a segment that nobody writes to, which forks share.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.exact import ExactCache
from longmix.caches.representatives import check_share, representatives, signature_distance
from longmix.caches.scores import best
from longmix.caches.store import Store, of_rows, taken
from longmix_kernels.attention import Segment

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState


@dataclass(frozen=True, kw_only=True)
class EvictingKind(CacheKind):
    """The settings of all kinds that drop tokens by a score.

    Args:
        representatives: the share of the budget for tokens that stand for the dropped ones; see
            `longmix.caches.representatives`.
    """

    representatives: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.representatives, "the budget")

    def chosen(self, scores: Tensor, allowed: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The slots that stay: the best by score, and representatives of the rest.

        Args:
            scores: [B, Hkv, G, S], of each query head; or [B, Hkv, 1, S] of a group, without representatives.
            allowed: bool [B, Hkv or 1, S], what may be chosen.
            counts: int64 [B], how many slots of a head stay, at most as many as are allowed.
            most: the largest count, n.

        Returns:
            int64 [B, Hkv, n]: representatives, then the best, each in ascending order; behind those of a row, S. And
            how many representatives each row has, int64 [B].
        """
        slots, summed = scores.shape[-1], self.of_group(scores)
        standing = torch.zeros_like(counts)
        if not self.representatives or slots == 0:
            return best(summed, allowed, counts, most), standing
        standing = (counts.double() * self.representatives).long()
        standing = torch.where(counts < allowed[:, 0].sum(-1), standing, 0)  # nothing is dropped where all may stay
        index = best(summed, allowed, counts - standing, most)
        kept = torch.zeros(*index.shape[:2], slots + 1, dtype=torch.bool, device=scores.device)
        kept = kept.scatter(2, index, True)[..., :slots]
        distance = signature_distance(scores.flatten(1, 2), allowed[:, 0])
        others = representatives(distance, allowed & ~kept, standing, int(most * self.representatives))
        others = torch.where(others < slots, others - slots, slots)  # so that they come first
        both = torch.cat((others, index), -1).sort(-1).values[..., :most]
        return torch.where(both < 0, both + slots, both), standing

    def of_group(self, scores: Tensor) -> Tensor:
        """One score of each key head, [B, Hkv, S], of those of its group [B, Hkv, G, S]: here their sum."""
        return scores.sum(2)


class EvictingCache(ExactCache):
    """Exact until `evict` is called, then what it kept and everything since.

    Attributes:
        dropped: tokens that had come when tokens were dropped; the store holds those behind them.
        kept_key, kept_value: [R, Hkv, n, .], what stayed of the earlier ones, R a divisor of the batch; None before.
        kept_count: int32 [B], how many of them a row has.
        scale: the factor on the scores.
    """

    tensors: ClassVar[tuple[str, ...]] = (*ExactCache.tensors, "kept_count")
    numbers: ClassVar[tuple[str, ...]] = (*ExactCache.numbers, "dropped")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.dropped = 0
        self.kept_key: Tensor | None = None
        self.kept_value: Tensor | None = None
        self.kept_count = torch.zeros(shape.batch, dtype=torch.int32, device=shape.device)
        self.scale: float | None = None

    @property
    def begins(self) -> Tensor:
        """int64 [B], the first token of each row's document among those that the store and shared segments hold."""
        return self.length - self.dropped - self.next_position

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """As `exact` until tokens are dropped."""
        self.scale = new.scale
        return super().read(new, with_logsumexp) if self.kept_key is None else Cache.read(self, new, with_logsumexp)

    def segments(self, new: NewTokens) -> list[Segment]:
        """What was kept, for rows whose document began before it was, and the tokens since."""
        if self.kept_key is None or self.kept_value is None:
            return super().segments(new)
        begins, found = self.begins, []
        count = torch.where(begins < 0, self.kept_count, 0)[:, None]
        found.append(Segment(self._kept_keys(), self.kept_value, count=count))
        for key, value in self._parts():
            slots = key.shape[2]
            first = begins.clamp(0, slots).to(torch.int32) if self.ragged else None
            found.append(Segment(key, value, first=first))
            begins = begins - slots
        return found

    def _kept_keys(self) -> Tensor:
        """The keys that were kept, as queries read them."""
        assert self.kept_key is not None
        return self.kept_key

    def evict(self, index: Tensor, counts: Tensor) -> None:
        """Keep these tokens alone.

        Args:
            index: int64 [B, Hkv, n], slots of `whole`, those that a row keeps first.
            counts: int64 [B], how many a row keeps.
        """
        key, value = self.whole()
        self.kept_key, self.kept_value = taken(key, index), taken(value, index)
        self.kept_count = counts.to(torch.int32)
        self.dropped = self.length
        self.shared, self.store = [], Store()

    def fork(self, count: int) -> Self:
        """See `ExactCache.fork`; what was kept is shared too."""
        other = super().fork(count)
        other.kept_key, other.kept_value = self.kept_key, self.kept_value
        return other

    def keep(self, rows: Tensor) -> Self:
        """See `Cache.keep`."""
        other = super().keep(rows)
        if self.kept_key is not None and self.kept_value is not None:
            kept = self.kept_key, self.kept_value
            other.kept_key, other.kept_value = (of_rows(x, rows, self.shape.batch) for x in kept)
        return other

    def truncate(self, length: int) -> None:
        """See `Cache.truncate`; not beyond where tokens were dropped."""
        if length < self.dropped:
            raise ValueError(f"cache={self.kind.name} dropped tokens of the first {self.dropped}")
        super().truncate(length)

    def slots_of(self, length: int) -> int:
        """See `ExactCache.slots_of`."""
        return length - self.dropped

    def trimmed(self) -> dict[str, Any]:
        """As in `ExactCache`, with what was kept."""
        found = super().trimmed()
        if self.kept_key is not None and self.kept_value is not None:
            found |= {"kept_key": self.kept_key.clone(), "kept_value": self.kept_value.clone()}
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        kept = saved.pop("kept_key", None), saved.pop("kept_value", None)
        dropped = saved.get("dropped")
        if kept[0] is not None:
            self._check_part(*kept, f"{name}.kept_key")
        if not isinstance(dropped, int) or dropped < 0 or (dropped > 0) != (kept[0] is not None):
            raise ValueError(f"{name} does not hold what it kept of the tokens that it dropped")
        self.dropped = dropped
        super().restore(saved, name)
        self.kept_key, self.kept_value = kept
        most = 0 if kept[0] is None else kept[0].shape[2]
        if not bool(((self.kept_count >= 0) & (self.kept_count <= most)).all()):
            raise ValueError(f"{name} says that it kept other tokens than it holds")

    def adopt(self, state: "AttentionState", length: int) -> None:
        """Refused, since what a kind needs besides keys and values is not in such a state."""
        Cache.adopt(self, state, length)

    def held_bytes(self) -> int:
        """What was kept, and what came since."""
        kept = sum(0 if x is None else x.nbytes for x in (self.kept_key, self.kept_value))
        return kept + super().held_bytes()

    def bookkeeping_bytes(self) -> int:
        """See `Cache.bookkeeping_bytes`."""
        return super().bookkeeping_bytes() + self.kept_count.nbytes


class AskedCache(EvictingCache):
    """Exact until a prompt ends, whose newest queries then choose.

    Attributes:
        ended: whether the prompt has ended.
        newest_query: [B, n, Hq, K], the newest queries until then, at most `asking` of them; None before and after.
    """

    tensors: ClassVar[tuple[str, ...]] = (*EvictingCache.tensors, "newest_query")
    numbers: ClassVar[tuple[str, ...]] = (*EvictingCache.numbers, "ended")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.newest_query: Tensor | None = None
        self.ended = False

    @property
    def asking(self) -> int:
        """How many queries choose."""
        raise NotImplementedError(f"{type(self).__name__} lacks asking")

    def append(self, new: NewTokens) -> None:
        """Append in place, and remember the newest queries until the prompt ends."""
        super().append(new)
        if self.ended:
            return
        queries = [new.query] if self.newest_query is None else [self.newest_query.to(new.query.dtype), new.query]
        self.newest_query = torch.cat(queries, 1)[:, -self.asking :].clone()
