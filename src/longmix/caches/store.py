"""Buffers of keys and values that grow in place: head-major, so that the keys of a head lie behind each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longmix.caches.huge_pages import in_huge_pages

LEAST_SLOTS = 64
"""Slots of the first buffer, where nobody said how many tokens would come."""


@dataclass
class Store:
    """Keys and values of rows, slot after slot.

    Attributes:
        key: [B, Hkv, capacity, K], value: [B, Hkv, capacity, V]; None before the first token.
        length: slots in use, S. Nobody reads those behind them.
        frozen: slots, from the first on, that a fork reads too; they are not written again.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    length: int = 0
    frozen: int = 0
    _wanted: int = 0

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return 0 if self.key is None else self.key.shape[2]

    @property
    def used(self) -> tuple[Tensor, Tensor]:
        """Keys and values in use, [B, Hkv, S, .]: views of the buffers."""
        assert self.key is not None and self.value is not None
        return self.key[:, :, : self.length], self.value[:, :, : self.length]

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens when the next ones come, and for no more."""
        self._wanted = self.length + count

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append keys [B, T, Hkv, K] and values [B, T, Hkv, V].

        Their dtype, and the columns of a bias that go with it, become those of all. A buffer that is full is replaced
        by one of twice the size, so that a token is copied at most twice on average.
        """
        start, stop = self.length, self.length + key.shape[1]
        if self.key is not None and (self.key.dtype != key.dtype or self.key.shape[3] != key.shape[3]):
            self._convert(key, value)
        if stop > self.capacity:
            self._grow(key, value, stop)
        assert self.key is not None and self.value is not None
        self.key[:, :, start:stop] = key.transpose(1, 2)
        self.value[:, :, start:stop] = value.transpose(1, 2)
        self.length = stop

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on; what a fork reads of them stays there for it."""
        if length < self.frozen:
            self._copy(length)
        self.length = length

    def _grow(self, key: Tensor, value: Tensor, least: int) -> None:
        slots = max(self._wanted, least) if self._wanted >= least else max(2 * self.capacity, least, LEAST_SLOTS)
        wide = [in_huge_pages(x.new_empty(x.shape[0], x.shape[2], slots, x.shape[3])) for x in (key, value)]
        if self.length:
            for new, old in zip(wide, self.used, strict=True):
                new[:, :, : self.length] = old
        self.key, self.value = wide
        self.frozen = 0

    def _convert(self, key: Tensor, value: Tensor) -> None:
        assert self.key is not None and self.value is not None
        self.key, self.value = keys_like(self.key, key), self.value.to(value.dtype)
        self.frozen = 0

    def _copy(self, length: int) -> None:
        assert self.key is not None and self.value is not None
        kept = self.capacity
        for name in ("key", "value"):
            old: Tensor = getattr(self, name)
            new = in_huge_pages(torch.empty_like(old[:, :, :kept]))
            new[:, :, :length] = old[:, :, :length]
            setattr(self, name, new)
        self.frozen = 0


def taken(x: Tensor, index: Tensor) -> Tensor:
    """The slots `index` int64 [B, H or 1, n] of head-major x [B, H, S, .]; any finite number for those there are not.

    An index beyond the slots takes the next one there is.
    """
    if x.shape[2] == 0:
        return x.new_zeros(*x.shape[:2], index.shape[2], x.shape[3])
    at = index.clamp(0, x.shape[2] - 1).unsqueeze(-1)
    return x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))


def of_every_row(x: Tensor, batch: int) -> Tensor:
    """[batch, ...] of x [R, ...], a row of which is of batch / R rows behind each other; x itself where R is batch."""
    if len(x) == batch:
        return x
    return x.expand(batch, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(batch // len(x), 0)


def of_rows(x: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Of rows int64 [n] of a batch, what they share: [n, ...] of x [R, ...], R a divisor of the batch."""
    return x.index_select(0, rows.to(x.device) // (batch // len(x)))


def keys_like(past: Tensor, new: Tensor) -> Tensor:
    """Cached keys [..., K] in the dtype of new ones, and with as many columns for a bias.

    A bias of rank R has R columns b in float32 and float64, and 4 R in half precision: the two digits b, b' as
    b, b', b, b'.
    """
    rank, rest = divmod(abs(new.shape[-1] - past.shape[-1]), 3)
    assert rest == 0
    if rank == 0:
        return past.to(new.dtype)
    if new.shape[-1] > past.shape[-1]:
        first = past[..., -rank:].to(new.dtype)
        second = (past[..., -rank:] - first.to(past.dtype)).to(new.dtype)
        return torch.cat((past[..., :-rank].to(new.dtype), first, second, first, second), -1)
    wide = past.to(new.dtype)
    return torch.cat((wide[..., : -4 * rank], wide[..., -2 * rank : -rank] + wide[..., -rank:]), -1)
