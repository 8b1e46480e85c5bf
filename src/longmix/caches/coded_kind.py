"""The settings of caches in codes, and what they count."""

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch

from longmix.caches.cache import CacheKind, CacheShape
from longmix.caches.codes import DTYPES
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodedKind(CacheKind):
    """The settings of all caches in codes.

    Args:
        parameters: the dtype that steps and least numbers are stored in, `float16` or `float32`.

    Raises:
        ConfigError: a setting is out of range.

    Attributes:
        widths: bits of the codes of each of the stores that tokens are divided between.
        recent_size: tokens that become a block.
        group_size: tokens with one step; it divides `recent_size`.
    """

    takes_bias: ClassVar[bool] = False  # a bias's columns are larger than keys, and would be rounded as much
    step_by_step: ClassVar[bool] = True  # in a piece all tokens see what only becomes codes at its end
    parameters: str = "float16"

    def __post_init__(self) -> None:
        if self.parameters not in DTYPES:
            raise ConfigError(f"cache.parameters={self.parameters} must be one of {', '.join(DTYPES)}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """See the class."""
        raise NotImplementedError(f"{type(self).__name__} lacks widths")

    @property
    def recent_size(self) -> int:
        """See the class."""
        raise NotImplementedError(f"{type(self).__name__} lacks recent_size")

    @property
    def group_size(self) -> int:
        """See the class."""
        raise NotImplementedError(f"{type(self).__name__} lacks group_size")

    @property
    def dtype(self) -> torch.dtype:
        """Of steps and least numbers."""
        return DTYPES[self.parameters]

    def shares(self, count: Any) -> tuple[Any, ...]:
        """How many of `count` coded tokens, a number or int64 [B], each store gets."""
        raise NotImplementedError(f"{type(self).__name__} lacks shares(count)")

    def entries(self, shape: CacheShape, bits: int, slots: int) -> dict[str, tuple[int, int, int]]:
        """The sizes of a block's parts without the rows: heads, entries and width, by name; see `CodedStore`."""
        raise NotImplementedError(f"{type(self).__name__} lacks entries(shape, bits, slots)")

    def checked(self, shape: CacheShape) -> CacheShape:
        """The shape, if heads fill whole bytes of codes.

        Raises:
            ConfigError: they do not.
        """
        for width in (shape.key_dim, shape.value_dim):
            if any(width * bits % 8 for bits in self.widths):
                raise ConfigError(
                    f"cache={self.name}: {min(self.widths)} bits of {width} channels fill no whole bytes; use more "
                    "bits or another size of heads."
                )
        return shape

    def part_bytes(self, name: str, sizes: tuple[int, int, int]) -> int:
        """Bytes of a part of these sizes."""
        return prod(sizes) * (1 if name in ("key", "value") else self.dtype.itemsize)

    def coded_bytes(self, shape: CacheShape, count: int) -> int:
        """Bytes of `count` tokens in one block."""
        found = 0
        for bits, slots in zip(self.widths, self.shares(count), strict=True):
            parts = self.entries(shape, bits, slots) if slots else {}
            found += sum(self.part_bytes(name, sizes) for name, sizes in parts.items())
        return found

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Codes of whole groups, and the rest as it is."""
        rest = length % self.group_size
        return self.coded_bytes(shape, length - rest) + rest * shape.token_bytes

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """The same, and the token itself, which is exact."""
        return self.bytes(shape, length) + shape.token_bytes
