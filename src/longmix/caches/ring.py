"""The ring of a window: the token at position p of its document lies in slot p mod `window`.

Each row counts its own positions, so that a row's slots are in use from the first on, whatever the others' lengths.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.huge_pages import in_huge_pages
from longmix.caches.store import LEAST_SLOTS, keys_like, taken
from longmix_kernels.attention import Segment, attention, decode_attention

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState


class RingCache(Cache):
    """The latest `shape.window` keys and values of each row's document.

    Attributes:
        key, value: [B, Hkv, slots, .], with as many slots as the longest row has needed, at most the window.
    """

    tensors: ClassVar[tuple[str, ...]] = (*Cache.tensors, "key", "value")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        assert shape.window is not None
        self.window = shape.window
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self._wanted = 0

    def reserve(self, count: int) -> None:
        """See `Cache.reserve`."""
        self._wanted = self.length + count

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Append a single token and read the ring; read a piece behind the ring in order, and then keep its end."""
        if new.count == 1:
            self.append(new)
            segments = self.segments(new)
            return decode_attention(new.query, segments, scale=new.scale, return_logsumexp=with_logsumexp)[:2]
        key, value = self._in_order(new)
        before, window = key.shape[1] - new.count, self.window
        if self.ragged:
            column = torch.arange(before, before + new.count, device=new.positions.device)
            begins = torch.maximum(column - new.positions, column - (window - 1)).clamp(min=0)
            bounds: dict[str, Any] = {"lo": begins[:, None].to(torch.int32)}
        else:
            bounds = {"window": window}
        found = attention(new.query, key, value, **bounds, scale=new.scale, return_logsumexp=True)
        self._keep_last(key, value, new.positions[:, -1], self.length + new.count)
        return found

    def append(self, new: NewTokens) -> None:
        """Write a single token into its slot; the one a window before it goes."""
        self._make_room(new.key, new.value, min(self.length + 1, self.window))
        assert self.key is not None and self.value is not None
        if not self.ragged:
            slot = self.length % self.window
            self.key[:, :, slot : slot + 1] = new.key.transpose(1, 2)
            self.value[:, :, slot : slot + 1] = new.value.transpose(1, 2)
            return
        at = (new.positions % self.window)[:, None, :, None]  # [B, 1, 1, 1]
        for ring, x in ((self.key, new.key), (self.value, new.value)):
            x = x.transpose(1, 2)
            ring.scatter_(2, at.expand_as(x), x)

    def segments(self, new: NewTokens) -> list[Segment]:
        """The slots in use after the new token was appended."""
        assert self.key is not None and self.value is not None
        used = min(self.length + 1, self.window)
        key, value = self.key[:, :, :used], self.value[:, :, :used]
        if not self.ragged:
            return [Segment(key, value)]
        return [Segment(key, value, count=(new.positions + 1).clamp(max=self.window).to(torch.int32))]

    def _in_order(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """The keys and values that new tokens may see, oldest first and their own last, [B, S, Hkv, .]."""
        before = min(self.length, self.window - 1)
        if before == 0 or self.key is None or self.value is None:
            return new.key, new.value
        offset = torch.arange(before, device=new.positions.device) - before
        slot = (self.next_position[:, None] + offset) % self.window  # before a row's first token any slot will do
        found = []
        for ring, own in ((keys_like(self.key, new.key), new.key), (self.value.to(new.value.dtype), new.value)):
            found.append(torch.cat((taken(ring, slot[:, None]).transpose(1, 2), own), 1))
        return found[0], found[1]

    def _keep_last(self, key: Tensor, value: Tensor, last: Tensor, length: int) -> None:
        """Fill the ring from keys in order, [B, S, Hkv, .], of which the last is at position `last` int64 [B].

        One key less than the window is enough: the next token takes the slot of the one that is missing.

        Args:
            key, value, last: see above.
            length: tokens of a row, the last one among them.
        """
        columns = key.shape[1]
        slot = torch.arange(min(length, self.window), device=last.device)
        age = (last[:, None] - slot) % self.window  # how long ago the position came that belongs to the slot
        column = (columns - 1 - age)[:, None]
        self.key, self.value = (taken(x.transpose(1, 2), column) for x in (key, value))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See `Cache.joined`."""
        other = cls._joined(parts)
        for name in ("key", "value"):
            rings = [getattr(part, name) for part in parts]
            most = max(ring.shape[2] for ring in rings)
            setattr(other, name, torch.cat([F.pad(ring, (0, 0, 0, most - ring.shape[2])) for ring in rings]))
        return other

    def _make_room(self, key: Tensor, value: Tensor, least: int) -> None:
        """Let there be `least` slots for tokens such as these, [B, T, Hkv, .]."""
        have = 0
        if self.key is not None and self.value is not None:
            if self.key.dtype != key.dtype or self.key.shape[3] != key.shape[3]:
                self.key, self.value = keys_like(self.key, key), self.value.to(value.dtype)
            have = self.key.shape[2]
            if have >= least:
                return
        slots = min(self.window, max(2 * have, least, self._wanted, LEAST_SLOTS))
        wide = [in_huge_pages(x.new_empty(x.shape[0], x.shape[2], slots, x.shape[3])).zero_() for x in (key, value)]
        if self.key is not None and self.value is not None:
            wide[0][:, :, :have], wide[1][:, :, :have] = self.key, self.value
        self.key, self.value = wide

    def trimmed(self) -> dict[str, Any]:
        """As in `Cache`, with the slots in use."""
        used, found = min(self.length, self.window), super().trimmed()
        for name in ("key", "value"):
            found[name] = None if found[name] is None else found[name][:, :, :used].contiguous()
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        super().restore(saved, name)
        wanted = (self.shape.batch, self.shape.key_heads, min(self.length, self.window))
        for x in (self.key, self.value):
            if (x is None) != (self.length == 0) or (x is not None and (x.ndim != 4 or x.shape[:3] != wanted)):
                raise ValueError(f"{name} does not hold the keys and values of a window")

    def adopt(self, state: "AttentionState", length: int) -> None:
        """See `Cache.adopt`."""
        kept = state.key.shape[1]
        if kept < min(length, self.window - 1) or kept == 0:
            raise ValueError(f"it holds {kept} keys of a window of {self.window}")
        self._adopt(state, length)
        self._keep_last(state.key, state.value, state.next_position - 1, length)

    def held_bytes(self) -> int:
        """The slots in use."""
        return self._slot_bytes() * min(self.length, self.window)

    def spare_bytes(self) -> int:
        """Slots that are not in use yet."""
        have = 0 if self.key is None else self.key.shape[2]
        return self._slot_bytes() * (have - min(self.length, self.window))

    def _slot_bytes(self) -> int:
        if self.key is None or self.value is None:
            return 0
        return sum(x[:, :, :1].numel() * x.element_size() for x in (self.key, self.value))
