"""`cache=zipcache`: tokens in 4 or 2 bits by how much attention they get (He et al. 2024, arXiv 2405.14256).

At the prompt's end some of its queries, the probes, say how salient each token is for each key head; the least salient
ones are coded in 2 bits, the others in 4. Keys are coded by channel over the tokens of one width. Values are divided by
c = sqrt(max_t |v_t|) of each channel, coded by slot, and multiplied by c again: a slot is the n-th token of each head's
list, as in the authors' code, so that a step costs little.

What comes then stays exact until there are `refresh` tokens; their own queries are the probes, and they become a block.
The authors' class codes all that it read of its codes again with each refresh, whose errors add up, and takes ranges
over the whole batch; here codes stay what they are, and rows have their own. Which token a slot holds is not kept,
since attention does not depend on the order of slots.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.coded_cache import CodedCache
from longmix.caches.coded_kind import CodedKind
from longmix.caches.coded_store import CodedStore
from longmix.caches.codes import by_channel, by_slot
from longmix.caches.saliency import divided, probe_places, saliency
from longmix.caches.store import Store
from longmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ZipCache(CodedKind):
    """The settings of `zipcache`.

    Args:
        high_share: share of the tokens that get 4 bits; the least salient others get 2.
        newest_probes, random_probes: shares of a prompt's queries that are probes: the newest, and others at random.
        refresh: tokens since the prompt, or the last block, that stay exact until there are as many.
        seed: of the random probes; with a row's length it decides which they are.
        parameters: see `CodedKind`.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "zipcache"
    high_share: float = 0.6
    newest_probes: float = 0.05
    random_probes: float = 0.05
    refresh: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("high_share", self.high_share), ("random_probes", self.random_probes)):
            if not 0 <= share <= 1:
                raise ConfigError(f"cache.{name}={share} must be from 0 to 1.")
        if not 0 < self.newest_probes <= 1:
            raise ConfigError(f"cache.newest_probes={self.newest_probes} must be above 0, and at most 1.")
        if self.refresh < 1:
            raise ConfigError(f"cache.refresh={self.refresh} must be at least 1.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the least salient tokens and of the others."""
        return (2, 4)

    @property
    def recent_size(self) -> int:
        """`refresh`."""
        return self.refresh

    @property
    def group_size(self) -> int:
        """Any number of tokens has one step."""
        return 1

    def shares(self, count: Any) -> tuple[Any, ...]:
        """The least salient tokens, rounded down, and the others."""
        part = (1 - self.high_share) * count + 1e-9  # 0.4 * 60 is 24
        low = part.floor().long() if isinstance(part, Tensor) else int(part)
        return low, count - low

    def entries(self, shape: CacheShape, bits: int, slots: int) -> dict[str, tuple[int, int, int]]:
        """See `CodedKind.entries`."""
        heads = shape.key_heads
        return {
            "key": (heads, slots, shape.key_dim * bits // 8),
            "key_low": (heads, 1, shape.key_dim),
            "key_step": (heads, 1, shape.key_dim),
            "value": (heads, slots, shape.value_dim * bits // 8),
            "value_low": (1, slots, 1),
            "value_step": (1, slots, 1),
            "value_scale": (heads, 1, shape.value_dim),
        }

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """See `CodedKind.step_bytes`; with the weight that the token got."""
        exact = torch.promote_types(shape.dtype, torch.float32).itemsize
        return super().step_bytes(shape, length) + exact * shape.key_heads

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return ZipCacheCache(self, self.checked(shape))


class ZipCacheCache(CodedCache):
    """See `ZipCache`.

    Attributes:
        queries: of the prompt until it ends; values of no width stand beside them.
        mass: [B, Hkv, refresh], the sum of the weights that each of the newest tokens got from their queries; None
            before the prompt's end.
    """

    kind: ZipCache
    tensors: ClassVar[tuple[str, ...]] = (*CodedCache.tensors, "mass")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.queries = Store()
        self.mass: Tensor | None = None
        self._saliency: Tensor | None = None  # of the tokens that are about to become a block

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """See `Cache.read`; after the prompt the logsumexp is needed for weights."""
        output, logsumexp = super().read(new, with_logsumexp or self.ended)
        return output, logsumexp if with_logsumexp else None

    def append(self, new: NewTokens) -> None:
        """See `CodedCache.append`; until the prompt ends its queries are remembered too."""
        if not self.ended:
            self.queries.append(new.query, new.query[..., :0])
        super().append(new)

    def prompt_ended(self) -> None:
        """Code the prompt by what its probes attend to."""
        if self.ended or self.length == 0:
            return
        key = self.whole()[0]
        first = self.length - self.next_position
        probes, seen = self._probes(first)
        self._saliency = saliency(self.queries.used[0], key, probes, first=first, seen=seen, scale=self.scale)
        super().prompt_ended()
        self.mass = torch.zeros_like(self._saliency[..., :1]).repeat(1, 1, self.kind.refresh)
        self.queries, self._saliency = Store(), None

    def _probes(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of each row's probes, int64 [B, n], and which of them it has, bool [B, n]."""
        kind, begins = self.kind, first.tolist()
        places = [probe_places(self.length - at, kind.newest_probes, kind.random_probes, kind.seed) for at in begins]
        most = max(map(len, places))
        probes = torch.zeros(len(places), most, dtype=torch.int64)
        seen = torch.zeros(len(places), most, dtype=torch.bool)
        for row, (at, found) in enumerate(zip(begins, places, strict=True)):
            probes[row, : len(found)], seen[row, : len(found)] = found + at, True
        return probes.to(first.device), seen.to(first.device)

    def wrote(self, new: NewTokens, part: slice) -> None:
        """Add the weights that the newest tokens got."""
        assert self.mass is not None and self.recent_key is not None and new.logsumexp is not None
        query, exact = new.query[:, part].to(self.mass.dtype), self.mass.dtype
        count, heads = query.shape[1], self.shape.key_heads
        used = self.recent
        scale = query.shape[-1] ** -0.5 if new.scale is None else new.scale
        rows = (scale * query).transpose(1, 2).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, G * t, K]
        scores = torch.matmul(rows, self.recent_key[:, :, :used].to(exact).transpose(-1, -2))
        norm = new.logsumexp[:, part].to(exact).transpose(1, 2).unflatten(1, (heads, -1)).unsqueeze(-1)
        weights = scores.unflatten(2, (-1, count)) - norm
        if count > 1:
            later = torch.ones(count, used, dtype=torch.bool, device=query.device).triu(used - count + 1)
            weights = weights.masked_fill(later, -torch.inf)
        self.mass[:, :, :used] += weights.exp().sum((2, 3))

    def _code_recent(self) -> None:
        assert self.mass is not None
        slot = torch.arange(self.kind.refresh, device=self.mass.device)
        self._saliency = self.mass / ((self.kind.refresh - slot) * self.shape.group)
        super()._code_recent()
        self._saliency = None
        self.mass.zero_()

    def encode(self, stores: list[CodedStore], key: Tensor, value: Tensor, count: Tensor | None) -> None:
        """See `CodedCache.encode`; slots of `key` are those of the saliency."""
        assert self._saliency is not None
        counts = None if count is None else (count, self.kind.shares(count)[0])
        lists = divided(self._saliency, self.kind.shares(key.shape[2])[0], counts)
        if count is not None:
            other = torch.arange(key.shape[2], device=key.device) < (key.shape[2] - count)[:, None]
            key, value = (x.masked_fill(other[:, None, :, None], 0.0) for x in (key, value))
        encode_lists(stores, key, value, lists, self.kind.dtype)

    def fork(self, count: int) -> Self:
        """See `Cache.fork`."""
        other = super().fork(count)
        other.queries = self._queries_of(torch.arange(self.shape.batch).repeat_interleave(count))
        return other

    def keep(self, rows: Tensor) -> Self:
        """See `Cache.keep`."""
        other = super().keep(rows)
        other.queries = self._queries_of(rows)
        return other

    def _queries_of(self, rows: Tensor) -> Store:
        if not self.queries.length:
            return Store()
        key, value = (x.index_select(0, rows.to(x.device)) for x in self.queries.used)
        return Store(key, value, self.queries.length)

    def truncate(self, length: int) -> None:
        """See `Cache.truncate`; not after the prompt's end, since the weights of queries were added up."""
        if self.ended:
            Cache.truncate(self, length)
        super().truncate(length)
        self.queries.truncate(length)

    def trimmed(self) -> dict[str, Any]:
        """As in `CodedCache`, with the prompt's queries."""
        found = super().trimmed()
        return found | {"queries": self.queries.used[0].clone() if self.queries.length else None}

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        query = saved.pop("queries", None)
        super().restore(saved, name)
        shape = self.shape
        wanted = (shape.batch, shape.key_heads * shape.group, self.length, shape.key_dim)
        if (query is None) != (self.ended or self.length == 0):
            raise ValueError(f"{name} does not hold the queries of its prompt")
        if query is not None:
            if not isinstance(query, Tensor) or query.shape != wanted or not query.is_floating_point():
                raise ValueError(f"{name}.queries is no part of a state of this model")
            self.queries = Store(query, query[..., :0], self.length)
        of_mass = (shape.batch, shape.key_heads, self.kind.refresh)
        if (self.mass is None) == self.ended or (self.mass is not None and self.mass.shape != of_mass):
            raise ValueError(f"{name} does not hold the weights of its newest tokens")

    def held_bytes(self) -> int:
        """As in `CodedCache`, with the queries of a prompt that has not ended, and the weights."""
        queries = self.queries.used[0].numel() * self.queries.used[0].element_size() if self.queries.length else 0
        return super().held_bytes() + queries + self._mass_bytes(self.recent)

    def spare_bytes(self) -> int:
        """Room for later tokens, blocks and weights."""
        queries = self.queries.key
        spare = 0 if queries is None else queries[:, :, self.queries.length :].numel() * queries.element_size()
        return super().spare_bytes() + spare + self._mass_bytes(self.kind.refresh - self.recent)

    def _mass_bytes(self, slots: int) -> int:
        return 0 if self.mass is None else self.mass[..., :1].numel() * self.mass.element_size() * slots


def encode_lists(
    stores: list[CodedStore], key: Tensor, value: Tensor, lists: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Append tokens to stores, each a list of them, as a block.

    Args:
        stores: one of each width.
        key, value: [B, Hkv, n, .].
        lists: int64 [B, Hkv, .] for each store, places of its tokens for each head; -1 for none.
        dtype: of the parameters.
    """
    scale = value.abs().amax(2, keepdim=True).sqrt().to(dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    for store, index in zip(stores, lists, strict=True):
        if not index.shape[2]:
            continue
        at = index.clamp(min=0).unsqueeze(-1)
        keys = key.gather(2, at.expand(-1, -1, -1, key.shape[3]))
        values = value.gather(2, at.expand(-1, -1, -1, value.shape[3])) / scale.to(value.dtype)
        coded = by_channel(keys, store.bits, index.shape[2], dtype, index >= 0)
        store.append(coded, by_slot(values, store.bits, dtype), scale)
