"""`cache=quantised`: keys and values in 8, 4 or 2 bits (KIVI, Liu et al. 2024, arXiv 2402.02750).

Keys are coded by channel over a group of consecutive tokens, since some channels are larger than others in all tokens;
values by token over a group of channels. With the group's least number as low,

    step = (high - low) / (2^bits - 1),   code = round((x - low) / step),   x' = code * step + low

The prompt is read exactly and then coded; codes stay what they are. KIVI keeps the newest values exact whether a group
is full or not, and transformers codes what it has read of its codes again; neither is done here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from longmix.caches.cache import Cache, CacheShape
from longmix.caches.coded_cache import CodedCache
from longmix.caches.coded_kind import CodedKind
from longmix.caches.coded_store import CodedStore
from longmix.caches.codes import by_channel, by_token
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Quantised(CodedKind):
    """The settings of `quantised`.

    Args:
        bits: of a code: 8, 4 or 2.
        group: tokens of a key's channel, and channels of a value, that share a step; where it does not divide the
            channels of a value, all of them do.
        residual: newest tokens, a multiple of `group`, that stay exact until there are as many.
        parameters: see `CodedKind`.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "quantised"
    takes_star: ClassVar[bool] = True
    bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (8, 4, 2):
            raise ConfigError(f"cache.bits={self.bits} must be 8, 4 or 2.")
        if self.group < 1:
            raise ConfigError(f"cache.group={self.group} must be at least 1.")
        if self.residual < 1 or self.residual % self.group:
            raise ConfigError(f"cache.residual={self.residual} must be a multiple of cache.group={self.group}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """One."""
        return (self.bits,)

    @property
    def recent_size(self) -> int:
        """`residual`."""
        return self.residual

    @property
    def group_size(self) -> int:
        """`group`."""
        return self.group

    def shares(self, count: Any) -> tuple[Any, ...]:
        """All."""
        return (count,)

    def value_group(self, shape: CacheShape) -> int:
        """Channels of a value that share a step."""
        return self.group if shape.value_dim % self.group == 0 else shape.value_dim

    def entries(self, shape: CacheShape, bits: int, slots: int) -> dict[str, tuple[int, int, int]]:
        """See `CodedKind.entries`."""
        heads = shape.key_heads
        of_keys = heads, slots // self.group, shape.key_dim
        of_values = heads, slots, shape.value_dim // self.value_group(shape)
        return {
            "key": (heads, slots, shape.key_dim * bits // 8),
            "key_low": of_keys,
            "key_step": of_keys,
            "value": (heads, slots, shape.value_dim * bits // 8),
            "value_low": of_values,
            "value_step": of_values,
        }

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return QuantisedCache(self, self.checked(shape))


class QuantisedCache(CodedCache):
    """See `Quantised`."""

    kind: Quantised

    def encode(self, stores: list[CodedStore], key: Tensor, value: Tensor, count: Tensor | None) -> None:
        """See `CodedCache.encode`; a document begins with a group, so that no group is of two."""
        kind = self.kind
        coded = by_channel(key, kind.bits, kind.group, kind.dtype)
        stores[0].append(coded, by_token(value, kind.bits, kind.value_group(self.shape), kind.dtype))
