"""The cache of a draft that is watched: exact, with the newest queries, which say what they attended to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.exact import ExactCache
from longmix.caches.ring import RingCache


@dataclass(frozen=True, kw_only=True)
class Watched(CacheKind):
    """Everything is remembered, and the newest queries.

    Args:
        queries: how many queries of each row.
    """

    name: ClassVar[str] = "watched"
    queries: int

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache; windows are not watched."""
        return WatchedCache(self, shape) if shape.window is None else RingCache(self, shape)


class WatchedCache(ExactCache):
    """See `Watched`.

    Attributes:
        newest_query: [B, n, Hq, K], the newest queries; None before the first.
        scale: the factor on the scores.
    """

    kind: Watched
    tensors: ClassVar[tuple[str, ...]] = (*ExactCache.tensors, "newest_query")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.newest_query: Tensor | None = None
        self.scale: float | None = None

    def append(self, new: NewTokens) -> None:
        """Append in place, and remember the newest queries."""
        super().append(new)
        self.scale = new.scale
        queries = [new.query] if self.newest_query is None else [self.newest_query.to(new.query.dtype), new.query]
        self.newest_query = torch.cat(queries, 1)[:, -self.kind.queries :].clone()
