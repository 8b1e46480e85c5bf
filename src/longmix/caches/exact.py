"""`cache=exact`: every key and value, in buffers that grow in place; a window's in a ring.

Forks share what was there: it becomes a segment of its own that nobody writes to (bifurcated attention, Athiwaratkun et
al. 2024, arXiv 2403.08845), read once for all rows; parent and forks append to buffers of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.ring import RingCache
from longmix.caches.segments import merged
from longmix.caches.star import StarReading
from longmix.caches.store import Store, of_every_row, of_rows
from longmix_kernels.attention import Segment, attention, decode_attention, sdpa
from longmix_kernels.attention.decode import MOST_QUERIES

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState

MOST_SHARED = 4
"""Shared segments of a cache; forks of forks of forks bring more, and then the two smallest become one."""


@dataclass(frozen=True, kw_only=True)
class Exact(CacheKind):
    """Everything is remembered, or all of the window."""

    name: ClassVar[str] = "exact"
    takes_star: ClassVar[bool] = True

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache; a ring where the layer has a window."""
        return ExactCache(self, shape) if shape.window is None else RingCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """All keys and values, or those of the window."""
        return shape.token_bytes * (length if shape.window is None else min(length, shape.window))


class ExactCache(Cache):
    """Every key and value of a layer without a window. Slots are tokens in their order.

    Attributes:
        shared: segments that other caches read too, from the first token on: key and value [R, Hkv, n, .].
        store: all tokens behind them.
    """

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.shared: list[tuple[Tensor, Tensor]] = []
        self.store = Store()
        self._begun: tuple[Tensor, Tensor] | None = None

    @property
    def shared_length(self) -> int:
        """Tokens in shared segments."""
        return sum(key.shape[2] for key, _ in self.shared)

    def slots_of(self, length: int) -> int:
        """How many of the first `length` tokens are in shared segments and the store; here all."""
        return length

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Append first, so that a single token finds its own key in place."""
        if self.reading is not None:
            return self._read_of_star(new, self.reading)
        if new.count > MOST_QUERIES or new.ids is not None:
            return self._read_piece(new, with_logsumexp)
        before = None if new.count == 1 else self.segments(new)
        self.append(new)
        output, logsumexp, _ = decode_attention(
            new.query,
            self.segments(new) if before is None else before,
            scale=new.scale,
            new=None if before is None else (new.key, new.value),
            return_logsumexp=with_logsumexp,
        )
        return output, logsumexp

    def append(self, new: NewTokens) -> None:
        """Append in place."""
        if new.ids is not None:
            self._begun = None
        self.store.append(new.key, new.value)

    def segments(self, new: NewTokens) -> list[Segment]:
        """The shared segments and the rest; a row reads from the first token of its document on."""
        if not self.ragged:
            return [Segment(*part) for part in self._parts()]
        begins, seen = self._documents()
        found, start = [], 0
        for key, value in self._parts():
            slots = key.shape[2]
            first = begins - start if start else begins
            if seen is None:
                found.append(Segment(key, value, first=first.clamp(0, slots)))
            else:
                found.append(Segment(key, value, first=first, seen=seen[..., start : start + slots]))
            start += slots
        return found

    def _documents(self) -> tuple[Tensor, Tensor | None]:
        """Where each row's document begins, int32 [B], and which slots are of it, bool [B, 1, S or more].

        Both stay the same until documents are told apart again, and are kept. Compiled steps form them anew, and
        kernels of a GPU need no mask.
        """
        if self.shape.device.type != "cpu" or torch.compiler.is_compiling():
            return (self.length - self.next_position).to(torch.int32), None
        slots = self.shared_length + self.store.capacity
        if self._begun is None or self._begun[1].shape[2] < slots:
            begins = (self.length - self.next_position).to(torch.int32)
            self._begun = begins, torch.arange(slots) >= begins[:, None, None]
        return self._begun

    def _read_piece(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Attend from a piece of a prompt: to the store, which then has the piece, and to what is shared."""
        self.append(new)
        first = self.length == 0 and not self.ragged
        if first and new.scale is None and new.key.shape[3] == new.value.shape[3] and not with_logsumexp:
            return sdpa(new.query, new.key, new.value), None
        # slots are tokens in their order, so that a token's place and its position say where its document begins
        begins = torch.arange(self.length, self.length + new.count, device=new.positions.device) - new.positions
        parts = []
        for key, value in self.shared:
            slots = key.shape[2]
            lo = begins.clamp(0, slots)[:, None].to(torch.int32)
            rows = (of_every_row(x.transpose(1, 2), self.shape.batch) for x in (key, value))
            hi = torch.full_like(lo, slots)
            parts.append(attention(new.query, *rows, lo=lo, hi=hi, scale=new.scale, return_logsumexp=True))
            begins = begins - slots
        own = (x.transpose(1, 2) for x in self.store.used) if self.store.length > new.count else (new.key, new.value)
        first_key = begins.clamp(min=0)[:, None].to(torch.int32) if self.ragged else None
        parts.append(attention(new.query, *own, lo=first_key, scale=new.scale, return_logsumexp=True))
        return merged(parts)

    def _read_of_star(self, new: NewTokens, reading: StarReading) -> tuple[Tensor, Tensor]:
        """Attend from a piece of a prompt as `prefill=star` says; nothing is shared yet."""
        assert not self.shared
        self.append(new)
        key, value = (x.transpose(1, 2) for x in self.store.used)
        return reading.attend(new.query, key, value, new.positions, scale=new.scale, one_document=not self.ragged)

    def reserve(self, count: int) -> None:
        """See `Cache.reserve`."""
        self.store.reserve(count)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See `Cache.joined`; shorter rows stand behind empty slots."""
        if any(part.slots_of(part.length) != part.length for part in parts):
            return super().joined(parts)
        other, both = cls._joined(parts), [part.whole() for part in parts]
        wide = [
            torch.cat([F.pad(x, (0, 0, other.length - x.shape[2], 0)) for x in each]).transpose(1, 2)
            for each in zip(*both, strict=True)
        ]
        other.shared, other.store = [], Store()
        other.store.append(wide[0], wide[1])
        return other

    def fork(self, count: int) -> Self:
        """Share what is there; the fork begins an empty store, and this cache goes on in its own behind what it has."""
        other = self._changed(self.shape.batch * count, lambda x: x.repeat_interleave(count, 0))
        other.shared, other.store, other._begun = list(self.shared), Store(), None
        if self.store.length:
            other.shared.append(self.store.used)
            self.store.frozen = self.store.length
        while len(other.shared) > MOST_SHARED:
            other._join()
        return other

    def keep(self, rows: Tensor) -> Self:
        """Copy what is not shared by all rows."""
        other = self._changed(len(rows), lambda x: x.index_select(0, rows.to(x.device)))
        other.shared, other.store, other._begun = [], Store(), None
        batch = self.shape.batch
        for key, value in self.shared:
            alone = len(key) == 1
            other.shared.append((key, value) if alone else (of_rows(key, rows, batch), of_rows(value, rows, batch)))
        if self.store.length:
            other.store.key, other.store.value = (of_rows(x, rows, batch) for x in self.store.used)
            other.store.length = self.store.length
        return other

    def _join(self) -> None:
        """Make one segment of the two neighbours with the fewest numbers."""
        sizes = [key.numel() for key, _ in self.shared]
        at = min(range(len(sizes) - 1), key=lambda number: sizes[number] + sizes[number + 1])
        both = self.shared[at : at + 2]
        rows = max(part[0].shape[0] for part in both)
        spread = [[of_every_row(x, rows) for x in part] for part in both]
        self.shared[at : at + 2] = [(torch.cat([p[0] for p in spread], 2), torch.cat([p[1] for p in spread], 2))]

    def truncate(self, length: int) -> None:
        """See `Cache.truncate`."""
        dropped = self.length - length
        if dropped < 0:
            raise ValueError(f"there are {self.length} tokens, and {length} were to stay")
        shared, slots = self.shared_length, self.slots_of(length)
        while shared > slots:
            key, value = self.shared.pop()
            shared -= key.shape[2]
            if shared < slots:
                self.shared.append((key[:, :, : slots - shared], value[:, :, : slots - shared]))
                shared = slots
        self.store.truncate(slots - shared)
        self.length = length
        self.next_position = self.next_position - dropped

    def trimmed(self) -> dict[str, Any]:
        """As in `Cache`, with keys and values `key_0`, `value_0`, ... of the shared segments and of the rest."""
        found = super().trimmed()
        for number, (key, value) in enumerate(self._parts()):
            found |= {f"key_{number}": key.clone(), f"value_{number}": value.clone()}
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        parts: list[tuple[Tensor, Tensor]] = []
        while f"key_{len(parts)}" in saved:
            number = len(parts)
            parts.append((saved.pop(f"key_{number}"), saved.pop(f"value_{number}", None)))
            self._check_part(*parts[-1], f"{name}.key_{number}")
        super().restore(saved, name)
        if sum(key.shape[2] for key, _ in parts) != self.slots_of(self.length):
            raise ValueError(f"{name} does not hold as many keys as it says")
        self.shared, self.store, self._begun = parts, Store(), None
        if parts and parts[-1][0].shape[0] == self.shape.batch:
            key, value = parts.pop()
            self.store = Store(key, value, key.shape[2])

    def _check_part(self, key: Any, value: Any, name: str) -> None:
        shape = self.shape
        for x in (key, value):
            if not isinstance(x, Tensor):
                raise ValueError(f"it holds {x!r} in the place of a tensor")
            wrong = x.layout != torch.strided or x.is_meta or x.is_quantized or not x.is_floating_point()
            if wrong or x.ndim != 4 or x.shape[:3] != key.shape[:3] or x.dtype != key.dtype:
                raise ValueError(f"{name} has the shape {list(x.shape)}, which is no state of this model")
        rows, heads = key.shape[:2]
        if rows < 1 or shape.batch % rows or heads != shape.key_heads or value.shape[3] != shape.value_dim:
            raise ValueError(f"{name} has the shape {list(key.shape)}, which is no state of this model")

    def adopt(self, state: "AttentionState", length: int) -> None:
        """See `Cache.adopt`."""
        if state.key.shape[1] != length:
            raise ValueError(f"it holds {state.key.shape[1]} keys of {length} tokens")
        self._adopt(state, length)
        self.store, self._begun = Store(), None
        self.store.append(state.key, state.value)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the shared segments, and then of the store."""
        return [*self.shared, self.store.used] if self.store.length else list(self.shared)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the shared segments and the store, [B, Hkv, S, .], copied where they are several."""
        parts = self._parts()
        if len(parts) == 1 and len(parts[0][0]) == self.shape.batch:
            return parts[0]
        spread = [[of_every_row(x, self.shape.batch) for x in part] for part in parts]
        return torch.cat([part[0] for part in spread], 2), torch.cat([part[1] for part in spread], 2)

    def held_bytes(self) -> int:
        """What is shared counts once."""
        return sum(x.nbytes for part in self._parts() for x in part)

    def spare_bytes(self) -> int:
        """Room behind the last token."""
        if self.store.key is None or self.store.value is None:
            return 0
        spare = self.store.capacity - self.store.length
        return sum(x[:, :, :1].numel() * x.element_size() * spare for x in (self.store.key, self.store.value))
