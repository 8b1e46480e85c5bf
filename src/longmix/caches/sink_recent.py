"""`cache=sink_recent`: the first tokens and the newest (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453).

A token sees the `recent` newest tokens, itself among them, and the `start` first ones, on which attention rests. By
default positions are places in the cache: the token behind start + recent others stands at start + recent - 1, however
long the text is. Only differences of positions matter, so that the newest keys stay as they are, and the first ones are
moved up to them.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.exact import ExactCache
from longmix.caches.places import moved
from longmix.caches.ring import RingCache
from longmix.caches.segments import merged
from longmix.caches.store import Store, taken
from longmix.errors import ConfigError
from longmix_kernels.attention import Segment, attention, decode_attention


@dataclass(frozen=True, kw_only=True)
class SinkRecent(CacheKind):
    """The first and the newest tokens.

    Args:
        start: first tokens of a document that stay.
        recent: newest tokens that stay.
        positions: tokens keep their positions in the text; by default they have their places in the cache.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "sink_recent"
    when: ClassVar[Literal["prompt", "piece"]] = "piece"
    takes_bias: ClassVar[bool] = False
    start: int = 4
    recent: int = 1020
    positions: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("start", self.start, 0), ("recent", self.recent, 1)):
            if value < least or value != int(value):
                raise ConfigError(f"cache.{name}={value} must be a whole number of tokens, at least {least}.")

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return SinkRecentCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Keys and values of both ends."""
        return shape.token_bytes * min(length, self.start + self.recent)


class SinkRecentCache(ExactCache):
    """Exact until there are more than start + recent tokens; then the first ones, and a ring of the newest.

    Attributes:
        sink_key, sink_value: [B, Hkv, start, .], of the tokens at the first positions; None before.
        ring_key, ring_value: [B, Hkv, recent, .], as in `RingCache`.
    """

    kind: SinkRecent
    slot_tensors: ClassVar[tuple[str, ...]] = ("sink_key", "sink_value", "ring_key", "ring_value")
    tensors: ClassVar[tuple[str, ...]] = (*ExactCache.tensors, *slot_tensors)

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.sink_key: Tensor | None = None
        self.sink_value: Tensor | None = None
        self.ring_key: Tensor | None = None
        self.ring_value: Tensor | None = None

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """As `exact` while all tokens fit."""
        kind = self.kind
        if self.ring_key is None and self.length + new.count <= kind.start + kind.recent:
            return super().read(new, with_logsumexp)
        if self.ring_key is None:
            self._split(new)
        ring = self._ring()
        if new.count == 1 and new.ids is None:
            found = self._read_one(new, ring, with_logsumexp)
        else:
            found = self._read_piece_of(new, ring)
        self.ring_key, self.ring_value = ring.key, ring.value
        return found

    def append(self, new: NewTokens) -> None:
        """Append in place."""
        if self.ring_key is not None:
            raise ValueError("tokens are appended as they are read")
        super().append(new)

    def _ring(self) -> RingCache:
        """The newest tokens as a cache of their own, which changes the tensors in place or puts others there."""
        ring = RingCache(self.kind, replace(self.shape, window=self.kind.recent))
        ring.key, ring.value = self.ring_key, self.ring_value
        ring.length, ring.ragged, ring.next_position = self.length, self.ragged, self.next_position
        return ring

    def _split(self, new: NewTokens) -> None:
        """Make sinks and a ring of the tokens so far."""
        start = self.kind.start
        if self.length == 0:
            key, value = (x[:, :0].transpose(1, 2) for x in (new.key, new.value))
        else:
            key, value = self.whole()
            ring = self._ring()
            ring._keep_last(key.transpose(1, 2), value.transpose(1, 2), self.next_position - 1, self.length)
            self.ring_key, self.ring_value = ring.key, ring.value
        slot = (self.length - self.next_position)[:, None] + torch.arange(start, device=new.key.device)
        self.sink_key, self.sink_value = (taken(x, slot[:, None]) for x in (key, value))
        self.shared, self.store = [], Store()

    def _read_one(self, new: NewTokens, ring: RingCache, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Read both ends for one token of each row."""
        kind = self.kind
        self._write_sinks(new, new.positions[:, 0])
        ring.append(new)
        segments = ring.segments(new)
        if kind.start:
            assert self.sink_key is not None and self.sink_value is not None
            hidden = (new.positions[:, 0] - (kind.recent - 1)).clamp(0, kind.start)  # the others are in the ring
            key = self.sink_key
            if not kind.positions:
                place = new.positions.clamp(max=kind.start + kind.recent - 1)
                key = moved(key.transpose(1, 2), place, new.positions, self.shape.rotary).transpose(1, 2)
            segments.insert(0, Segment(key, self.sink_value, count=hidden[:, None].to(torch.int32)))
        return decode_attention(new.query, segments, scale=new.scale, return_logsumexp=with_logsumexp)[:2]

    def _read_piece_of(self, new: NewTokens, ring: RingCache) -> tuple[Tensor, Tensor | None]:
        """Read both ends for a piece of a prompt: the newest as a window, the first ones of each document behind it."""
        kind = self.kind
        found = ring.read(new, True)
        assert found[1] is not None
        parts = [(found[0], found[1])]
        if kind.start:
            assert self.sink_key is not None and self.sink_value is not None
            positions = new.positions
            known = self.next_position.clamp(max=kind.start)  # sinks of the document that goes on
            slot = torch.arange(kind.start, device=positions.device) - kind.start + known[:, None]
            key, value = (
                torch.cat((taken(x, slot[:, None]).transpose(1, 2), own), 1)
                for x, own in ((self.sink_key, new.key), (self.sink_value, new.value))
            )
            column = torch.arange(new.count, device=positions.device) + kind.start
            lo = (column - positions).clamp(min=0)
            hi = lo + (positions - (kind.recent - 1)).clamp(0, kind.start)
            query = new.query
            if not kind.positions:
                place = positions.clamp(max=kind.start + kind.recent - 1)
                query = moved(query, positions, place, self.shape.rotary)
            lo, hi = (x[:, None].to(torch.int32).contiguous() for x in (lo, hi))
            parts.append(attention(query, key, value, lo=lo, hi=hi, scale=new.scale, return_logsumexp=True))
            last = positions[:, -1]
            place = torch.arange(kind.start, device=last.device)
            at = (key.shape[1] - 1 - last)[:, None] + place  # where the document's first tokens are in this piece
            goes_on = (last >= new.count)[:, None]
            at = torch.where(goes_on & (place < known[:, None]), kind.start - known[:, None] + place, at)
            self.sink_key, self.sink_value = (taken(x.transpose(1, 2), at[:, None]) for x in (key, value))
        return merged(parts)

    def _write_sinks(self, new: NewTokens, position: Tensor) -> None:
        """Write a token that is among the first of its document."""
        if self.kind.start == 0:
            return
        at = position.clamp(max=self.kind.start - 1)[:, None, None, None]
        first = (position < self.kind.start)[:, None, None, None]
        for sinks, x in ((self.sink_key, new.key), (self.sink_value, new.value)):
            assert sinks is not None
            x, at_all = x.transpose(1, 2), at.expand(-1, sinks.shape[1], 1, sinks.shape[3])
            sinks.scatter_(2, at_all, torch.where(first, x, sinks.gather(2, at_all)))

    def slots_of(self, length: int) -> int:
        """See `ExactCache.slots_of`."""
        return length if self.ring_key is None else 0

    def truncate(self, length: int) -> None:
        """Refused once tokens were dropped."""
        if self.ring_key is not None:
            Cache.truncate(self, length)
        super().truncate(length)

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        super().restore(saved, name)
        ends = (self.sink_key, self.sink_value, self.kind.start), (self.ring_key, self.ring_value, self.kind.recent)
        if all(x is None for x in (*ends[0][:2], *ends[1][:2])):
            return
        for key, value, slots in ends:
            self._check_part(key, value, f"{name}.key")
            if key is None or key.shape[2] != slots:
                raise ValueError(f"{name} does not hold the first and the newest keys")

    def held_bytes(self) -> int:
        """Both ends."""
        slots = [getattr(self, name) for name in self.slot_tensors]
        return super().held_bytes() + sum(x.nbytes for x in slots if x is not None)
