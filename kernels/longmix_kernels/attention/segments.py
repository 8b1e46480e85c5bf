"""Describe the keys and values that decoding reads: segments of caches, exact or in codes.

A segment is head-major, [R, Hkv, S, D], so that one head's keys lie behind each other. Its keys stand in any order,
since what has to do with positions is in them. Where R is less than the batch B, rows share it: row b of the queries
reads row b // (B / R), as forks of R rows do that follow each other. Slots that are not read hold finite numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Codes:
    """How whole numbers become the numbers they stand for: x = (code * step + low) * scale.

    `low`, `step` and `scale` have as many entries along each axis as the numbers, or a divisor of it: then each entry
    is of that many neighbours.

    Attributes:
        bits: of a code, 8, 4 or 2. A byte holds 8 / bits of them along the last axis, the first in its low bits.
        low, step: [R or 1, Hkv or 1, 1 or tokens, 1 or channels], of any floating-point dtype.
        scale: likewise; None for 1.
    """

    bits: int
    low: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """Keys and values that all queries of a row see, or part of them.

    Attributes:
        key: [R, Hkv, S, K], R a divisor of the batch; with codes uint8 [R, Hkv, S, K * bits / 8].
        value: [R, Hkv, S, V], likewise.
        count: int32 [B or 1, Hkv or 1], a row reads only slots below it; None for S.
        first: int32 [B or 1], a row reads only slots from it on; None for 0.
        index: int32 [B, Hkv, n], the slots that each row reads, none twice, and then -1 where a row reads fewer than n.
            None for all. Not together with `count` and `first`.
        key_codes, value_codes: how the codes are read; None for numbers.
        seen: bool [B or 1, Hkv or 1, S], what `count` and `first` say, from a caller that keeps it between steps; None
            where it has to be formed.
    """

    key: torch.Tensor
    value: torch.Tensor
    count: torch.Tensor | None = None
    first: torch.Tensor | None = None
    index: torch.Tensor | None = None
    key_codes: Codes | None = None
    value_codes: Codes | None = None
    seen: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """R, the number of rows that the segment has of its own."""
        return self.key.shape[0]

    @property
    def slots(self) -> int:
        """S."""
        return self.key.shape[2]

    def visible(self) -> torch.Tensor | None:
        """Return which slots each row reads, bool [B or 1, Hkv or 1, S]; None for all. Ignores `index`."""
        if self.seen is not None or (self.count is None and self.first is None):
            return self.seen
        slot = torch.arange(self.slots, device=self.key.device)
        seen = None if self.count is None else slot < self.count[..., None]
        if self.first is not None:
            begun = slot >= self.first[:, None, None]
            seen = begun if seen is None else seen & begun
        return seen

    def named(self) -> torch.Tensor:
        """Return which slots `index` names, bool [B, Hkv, S]."""
        assert self.index is not None
        named = torch.zeros(*self.index.shape[:2], self.slots + 1, dtype=torch.bool, device=self.index.device)
        at = torch.where(self.index < 0, self.slots, self.index).long()
        return named.scatter(2, at, True)[..., :-1]

    def numbers(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [R, Hkv, S, K] and values [R, Hkv, S, V] in a dtype."""
        return read(self.key, self.key_codes, dtype), read(self.value, self.value_codes, dtype)

    def slices(self, size: int) -> Iterator["Segment"]:
        """Yield the segment in runs of `size` slots, a multiple of the tokens that share a step of codes.

        The segment must not have an `index`. While a graph is recorded it comes whole, so that the graph is one for any
        number of slots.
        """
        if torch.compiler.is_compiling():
            yield self
            return
        for start in range(0, self.slots, size):
            stop = min(self.slots, start + size)
            yield replace(
                self,
                key=self.key[:, :, start:stop],
                value=self.value[:, :, start:stop],
                count=None if self.count is None else self.count - start,
                first=None if self.first is None else self.first - start,
                key_codes=_of_slots(self.key_codes, start, stop, self.slots),
                value_codes=_of_slots(self.value_codes, start, stop, self.slots),
                seen=None if self.seen is None else self.seen[..., start:stop],
            )

    def gathered(self) -> "Segment":
        """Return a copy of the slots that `index` names, for every row of the index; itself without one."""
        if self.index is None:
            return self
        batch, heads, _ = self.index.shape
        at = self.index.clamp(min=0).long().unsqueeze(-1)
        parts = []
        for x, codes in ((self.key, self.key_codes), (self.value, self.value_codes)):
            if codes is not None:
                x = read(x, codes, codes.step.dtype)
            x = x.unflatten(0, (-1, 1)).expand(-1, batch // self.rows, -1, -1, -1).flatten(0, 1)
            parts.append(x.gather(2, at.expand(batch, heads, -1, x.shape[-1])))
        return Segment(parts[0], parts[1], (self.index >= 0).sum(-1, dtype=torch.int32))


def read(x: torch.Tensor, codes: Codes | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers [R, H, S, D] in a dtype: x itself, or what its codes stand for."""
    if codes is None:
        return x.to(dtype)
    numbers = unpacked(x, codes.bits).to(dtype)
    numbers = numbers * _spread(codes.step, numbers) + _spread(codes.low, numbers)
    return numbers if codes.scale is None else numbers * _spread(codes.scale, numbers)


def packed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes, integers [..., D] below 2^bits, as bytes [..., D * bits / 8].

    Raises:
        ValueError: D does not fill whole bytes.
    """
    each = 8 // bits
    if codes.shape[-1] % each:
        raise ValueError(f"codes of {bits} bits fill whole bytes only by {each}; {codes.shape[-1]} is no multiple")
    parts = codes.to(torch.uint8).unflatten(-1, (-1, each)).unbind(-1)
    byte = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        byte |= part << (number * bits)
    return byte


def unpacked(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes, uint8 [..., D], of bytes [..., D * bits / 8]."""
    if bits == 8:
        return x
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    return ((x.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def _spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return parameters of codes such that they broadcast over the numbers [R, H, S, D]."""
    x = x.to(like.dtype)
    for axis in (2, 3):
        if x.shape[axis] not in (1, like.shape[axis]):
            x = x.repeat_interleave(like.shape[axis] // x.shape[axis], axis)
    return x


def _of_slots(codes: Codes | None, start: int, stop: int, slots: int) -> Codes | None:
    """Return the parameters of a run of slots."""
    if codes is None:
        return None

    def cut(x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] == 1:
            return x
        each = slots // x.shape[2]
        return x[:, :, start // each : -(-stop // each)]

    return Codes(codes.bits, cut(codes.low), cut(codes.step), None if codes.scale is None else cut(codes.scale))
