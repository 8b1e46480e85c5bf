"""Codes of tokens, block after block, in buffers that grow in place."""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from longmix.caches.codes import Coded
from longmix.caches.huge_pages import in_huge_pages
from longmix_kernels.attention import Codes, Segment

LEAST_BLOCKS = 4
"""Blocks of the first buffer, where nobody said how many would come."""


@dataclass
class CodedStore:
    """Keys and values of rows in codes.

    A block brings the same number of slots each time, whose keys are coded by channel and values by token.

    Attributes:
        bits: of a code.
        parts: [R, Hkv or 1, capacity, .] by name: `key`, `value` (codes), `key_low`, `key_step`, `value_low`,
            `value_step`, and `value_scale` where values have one.
        blocks: how many there are.
        sizes: entries that a block has along the third axis, by name.
        wanted: how many there will be; 0 where nobody said so.
    """

    bits: int
    parts: dict[str, Tensor] = field(default_factory=dict)
    blocks: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    wanted: int = 0

    @property
    def capacity(self) -> int:
        """Blocks that there is room for."""
        return self.parts["key"].shape[2] // self.sizes["key"] if self.parts else 0

    @property
    def used(self) -> dict[str, Tensor]:
        """The parts without spare room: views of the buffers."""
        return {name: x[:, :, : self.blocks * self.sizes[name]] for name, x in self.parts.items()}

    def append(self, key: Coded, value: Coded, scale: Tensor | None = None) -> None:
        """Append a block: keys, values, and the scale [B, Hkv, 1, V] of the values; older codes stay as they are."""
        new = {f"key{end}": x for end, x in zip(("", "_low", "_step"), key, strict=True)}
        new |= {f"value{end}": x for end, x in zip(("", "_low", "_step"), value, strict=True)}
        if scale is not None:
            new["value_scale"] = scale
        if not self.parts:
            self.sizes = {name: x.shape[2] for name, x in new.items()}
            if self.wanted == 1:
                self.parts, self.blocks = new, 1
                return
            self.parts = {name: x[:, :, :0] for name, x in new.items()}
        if self.blocks == self.capacity:
            self._grow(self.wanted if self.wanted > self.blocks else max(2 * self.blocks, LEAST_BLOCKS))
        for name, x in new.items():
            size = self.sizes[name]
            self.parts[name][:, :, self.blocks * size : (self.blocks + 1) * size] = x
        self.blocks += 1

    def _grow(self, blocks: int) -> None:
        for name, old in self.used.items():
            new = in_huge_pages(old.new_empty(*old.shape[:2], blocks * self.sizes[name], old.shape[3])).zero_()
            new[:, :, : old.shape[2]] = old
            self.parts[name] = new

    def segment(self, first: Tensor | None) -> Segment | None:
        """What decoding reads, from the slot `first` int64 [B] on or all; None if there is nothing."""
        if not self.blocks or not self.sizes["key"]:
            return None
        x = self.used
        return Segment(
            x["key"],
            x["value"],
            first=None if first is None else first.to(torch.int32),
            key_codes=Codes(self.bits, x["key_low"], x["key_step"]),
            value_codes=Codes(self.bits, x["value_low"], x["value_step"], x.get("value_scale")),
        )

    def rows(self, index: Tensor) -> Self:
        """These rows, int64 [n], without spare room; independent of this store."""
        return self.of({name: x.index_select(0, index.to(x.device)) for name, x in self.used.items()})

    def of(self, parts: dict[str, Tensor]) -> Self:
        """A store of as many blocks with other parts."""
        return type(self)(self.bits, parts, self.blocks, dict(self.sizes), self.wanted)

    def held_bytes(self) -> int:
        """Without spare room."""
        return sum(x.numel() * x.element_size() for x in self.used.values())

    def spare_bytes(self) -> int:
        """Room for later blocks."""
        return sum(x.numel() * x.element_size() for x in self.parts.values()) - self.held_bytes()

    def trimmed(self) -> dict[str, Any]:
        """What has to be saved, by name."""
        return {name: x.clone() for name, x in self.used.items()} | {"blocks": self.blocks}
