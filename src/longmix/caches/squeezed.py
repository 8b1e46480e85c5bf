"""`cache=squeezed`: everything is held, and of the prompt only what a query asks for is read (Hooper et al. 2024,
arXiv 2411.09688).

At the prompt's end the keys of each head but the newest are clustered. A query then compares itself with the centroids,
and reads the clusters whose keys would get a weight p_c of at least a threshold (see `clusters`): a quantile of the
weights that the newest queries give the prompt's keys, over all layers and heads. With two levels it compares itself
with centroids of centroids first, and of the clusters only with those of the groups that pass.

One choice serves all queries of a piece, such as a question, by their mean weight; each generated token has its own.
Heads that share keys read what any of them asks for, on which the paper, with as many key heads as heads, is silent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.clusters import centroids_of, cluster_weights, clustered, label_dtype, quantile
from longmix.caches.evicting import AskedCache
from longmix.caches.segments import of_slots
from longmix.caches.store import of_every_row, of_rows
from longmix.errors import ConfigError
from longmix_kernels.attention import Segment

LEAST_CLUSTERS = 2
"""With fewer clusters a row has none, and all of it is read; with fewer groups of them, all groups pass."""


@dataclass(frozen=True, kw_only=True)
class Squeezed(CacheKind):
    """The settings of `squeezed`.

    Args:
        newest: last tokens of a prompt that are always read, and whose queries say what weights are usual.
        clusters: clusters as a share of the other tokens.
        quantile: share of the keys whose usual weight is below the threshold.
        coarse: groups of clusters as a share of those tokens; 0 for one level.
        rounds: the most rounds of k-means.
        seed: of the first centroids.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "squeezed"
    step_by_step: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = False  # what a bias adds to a score does not lie in the directions of keys
    newest: int = 100
    clusters: float = 0.05
    quantile: float = 0.8
    coarse: float = 0.0
    rounds: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("newest", 1), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"cache.{name}={getattr(self, name)} must be at least {least}.")
        if not 0 < self.clusters <= 1:
            raise ConfigError(f"cache.clusters={self.clusters} must be above 0, and at most 1.")
        if not 0 <= self.quantile <= 1:
            raise ConfigError(f"cache.quantile={self.quantile} must be from 0 to 1.")
        if not 0 <= self.coarse < self.clusters:
            raise ConfigError(f"cache.coarse={self.coarse} must be from 0 to below cache.clusters={self.clusters}.")

    def sizes(self, length: int) -> tuple[int, int]:
        """Clusters and groups of them of a row of `length` tokens."""
        others = max(0, length - self.newest)
        clusters = int(self.clusters * others + 1e-9)
        if clusters < LEAST_CLUSTERS:
            return 0, 0
        groups = int(self.coarse * others + 1e-9)
        return clusters, groups if groups >= LEAST_CLUSTERS else 0

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return SqueezedCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """All keys and values, centroids, and of which cluster keys are."""
        return shape.token_bytes * length + self._choice_bytes(shape, length, labels=True)

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """Centroids, the newest tokens, and of the others those with weights above the quantile; an estimate."""
        if not self.sizes(length)[0]:
            return self.bytes(shape, length + 1)
        read = self.newest + 1 + round((1 - self.quantile) * (length - self.newest))
        return shape.token_bytes * read + self._choice_bytes(shape, length, labels=False)

    def _choice_bytes(self, shape: CacheShape, length: int, labels: bool) -> int:
        clusters, groups = self.sizes(length)
        if not clusters:
            return 0
        each = shape.key_dim * shape.dtype.itemsize + SIZE.itemsize
        found = (clusters + groups) * each + (clusters * label_dtype(groups).itemsize if groups else 0)
        return shape.key_heads * (found + (length * label_dtype(clusters).itemsize if labels else 0))

    def prompts_ended(self, caches: Sequence[Cache]) -> None:
        """Give all layers one threshold of each row."""
        squeezed = [cache for cache in caches if isinstance(cache, SqueezedCache)]
        for name in ("threshold", "group_threshold"):
            for row in range(squeezed[0].shape.batch if squeezed else 0):
                usual = [x for cache in squeezed for x in cache.usual.get(name, {}).get(row, ())]
                if usual:
                    shared = quantile(torch.cat([x.flatten().to(usual[0]) for x in usual]), self.quantile)
                    for cache in squeezed:
                        getattr(cache, name)[row] = shared
        for cache in squeezed:
            cache.usual = {}


SIZE = torch.int32
"""What the numbers of keys of clusters are stored in."""


class SqueezedCache(AskedCache):
    """See `Squeezed`. Of a prompt with clusters, `kept_key` has the newest tokens and then cluster after cluster.

    Attributes:
        clusters: by name, of R rows, which forks share; empty without clusters: `labels` [R, Hkv, n] of slots, where C
            stands for what is always read and C + 1 for what is not there, `centroids` [R, Hkv, C, K], `sizes`
            [R, Hkv, C], and with two levels `groups` [R, Hkv, C] of the clusters, `group_centroids`, `group_sizes`.
        threshold, group_threshold: [B], of weights.
        usual: the weights of a row's keys by the newest queries, until all layers have theirs.
        slots_read: int64 [B], how many slots of all heads the last piece or token read of the prompt.
    """

    kind: Squeezed
    tensors: ClassVar[tuple[str, ...]] = (*AskedCache.tensors, "threshold", "group_threshold")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.clusters: dict[str, Tensor] = {}
        self.threshold = torch.zeros(shape.batch, dtype=torch.float64, device=shape.device)
        self.group_threshold = self.threshold.clone()
        self.usual: dict[str, dict[int, list[Tensor]]] = {}
        self.slots_read: Tensor | None = None

    @property
    def asking(self) -> int:
        """See `AskedCache.asking`."""
        return self.kind.newest

    def prompt_ended(self) -> None:
        """Cluster the keys, and take the threshold from the newest queries."""
        if self.ended or self.newest_query is None:
            return
        query, self.newest_query, self.ended = self.newest_query.transpose(1, 2), None, True
        lengths = self.next_position.tolist()
        sizes = [self.kind.sizes(length) for length in lengths]
        if not any(clusters for clusters, _ in sizes):
            return
        key = self.whole()[0]
        rows = [self._clustered_row(key[row], length, *sizes[row]) for row, length in enumerate(lengths)]
        most = max(max(lengths), 1)
        index = torch.stack([_padded(order, most, self.length) for order, _ in rows])
        count = max(clusters for clusters, _ in sizes)
        labels = [torch.where(found < 0, count, found) for _, found in rows]
        self.evict(index, self.next_position)
        self._set_clusters(torch.stack([_padded(x, most, count + 1) for x in labels]), count)
        if any(groups for _, groups in sizes):
            self._set_groups([groups for _, groups in sizes])
        self._set_thresholds(query)

    def _clustered_row(self, key: Tensor, length: int, clusters: int, groups: int) -> tuple[Tensor, Tensor]:
        """A row's slots of `key` [Hkv, S, K], the newest first and then by cluster, and their clusters, -1 for none."""
        newest, slots = min(self.kind.newest, length), key.shape[1]
        heads = len(key)
        last = torch.arange(slots - newest, slots, device=key.device).expand(heads, -1)
        others = key[:, slots - length : slots - newest]
        if clusters:
            labels = clustered(others, clusters, rounds=self.kind.rounds, seed=self.kind.seed)
        else:
            labels = torch.full(others.shape[:2], -1, dtype=torch.int64, device=key.device)
        ordered = labels.sort(dim=1, stable=True)
        order = torch.cat((last, ordered.indices + slots - length), 1)
        return order, torch.cat((torch.full_like(last, -1), ordered.values), 1)

    def _set_clusters(self, labels: Tensor, count: int) -> None:
        """Take the labels int64 [B, Hkv, n], and the centroids of `count` clusters of the keys that were kept."""
        assert self.kept_key is not None
        found = [
            centroids_of(keys, labels_of, count + 2) for keys, labels_of in zip(self.kept_key, labels, strict=True)
        ]
        self.clusters = {
            "labels": labels.to(label_dtype(count)),
            "centroids": torch.stack([x[:, :count] for x, _ in found]).to(self.kept_key.dtype),
            "sizes": torch.stack([x[:, :count] for _, x in found]).to(SIZE),
        }

    def _set_groups(self, groups: list[int]) -> None:
        """Cluster the centroids of each row that has some."""
        most, (centroids, sizes) = max(groups), (self.clusters[name] for name in ("centroids", "sizes"))
        labels = torch.zeros(sizes.shape, dtype=torch.int64, device=sizes.device)
        means, numbers = [], []
        for row, count in enumerate(groups):
            used = self.kind.sizes(int(self.next_position[row]))[0]
            if count:
                found = clustered(centroids[row, :, :used], count, rounds=self.kind.rounds, seed=self.kind.seed)
                labels[row, :, :used] = found
            there = (sizes[row] > 0).to(centroids.dtype)  # an empty cluster's centroid is no part of the mean
            weighed = torch.cat((centroids[row] * there[..., None], there[..., None]), -1)
            sums = weighed.new_zeros(len(weighed), most, weighed.shape[2])
            sums.scatter_add_(1, labels[row, ..., None].expand_as(weighed), weighed)
            means.append(sums[..., :-1] / sums[..., -1:].clamp(min=1))
            keys = torch.zeros(len(weighed), most, dtype=SIZE, device=sizes.device)
            numbers.append(keys.scatter_add_(1, labels[row], sizes[row]))
        self.clusters |= {
            "groups": labels.to(label_dtype(most)),
            "group_centroids": torch.stack(means),
            "group_sizes": torch.stack(numbers),
        }

    def _set_thresholds(self, query: Tensor) -> None:
        """Take this layer's quantiles of the weights by the newest queries [B, Hq, n, K]; see `prompts_ended`."""
        levels = {"threshold": self._weights(query, "")}
        labels = self.clusters["labels"].long()
        if "groups" in self.clusters:
            levels["group_threshold"] = self._weights(query, "group_").gather(
                2, self._of_heads(self.clusters["groups"])
            )
        for name, weights in levels.items():
            of_rows: dict[int, list[Tensor]] = {}
            for row, (some, labels_of) in enumerate(zip(weights, labels, strict=True)):
                inside = labels_of[0] < weights.shape[2]  # in each head as many slots are of clusters
                if bool(inside.any()) and (name == "threshold" or self.kind.sizes(int(self.next_position[row]))[1]):
                    at = labels_of[:, inside].repeat_interleave(self.shape.group, 0)
                    of_rows[row] = [some.gather(1, at)]
                    getattr(self, name)[row] = quantile(of_rows[row][0], self.kind.quantile)
            self.usual[name] = of_rows

    def _weights(self, query: Tensor, level: str, sizes: Tensor | None = None) -> Tensor:
        """The mean weight [B, Hq, C] of queries [B, Hq, T, K], of clusters or groups."""
        centroids = self._of_rows(self.clusters[f"{level}centroids"])
        sizes = self._of_rows(self.clusters[f"{level}sizes"]) if sizes is None else sizes
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return cluster_weights(query, centroids, sizes, scale).nan_to_num(0.0).mean(2)

    def _of_rows(self, x: Tensor) -> Tensor:
        """Of every row, what R rows share."""
        return of_every_row(x, self.shape.batch)

    def _of_heads(self, x: Tensor) -> Tensor:
        """Of every row and query head, what R rows and heads that share keys share; int64."""
        return self._of_rows(x).long().repeat_interleave(self.shape.group, 1)

    def wanted(self, query: Tensor) -> Tensor:
        """Which clusters queries [B, Hq, T, K] read, bool [B, Hkv, C]."""
        sizes, there = self._of_rows(self.clusters["sizes"]), None
        if "groups" in self.clusters:
            passed = self._weights(query, "group_") >= self.group_threshold[:, None, None]
            there = passed.gather(2, self._of_heads(self.clusters["groups"]))
            sizes = (sizes.unsqueeze(2) * there.unflatten(1, (-1, self.shape.group))).flatten(1, 2)
        asked = self._weights(query, "", sizes) >= self.threshold[:, None, None]
        if there is not None:
            asked = asked & there
        return asked.unflatten(1, (-1, self.shape.group)).any(2)

    def segments(self, new: NewTokens) -> list[Segment]:
        """The chosen slots of the prompt, and the tokens since."""
        found = super().segments(new)
        if not self.clusters:
            return found
        asked = self.wanted(new.query.transpose(1, 2))
        always = torch.ones_like(asked[..., :1])
        mask = torch.cat((asked, always, ~always), -1).gather(2, self._of_rows(self.clusters["labels"]).long())
        mask = mask & (self.begins < 0)[:, None, None]
        self.slots_read = mask.sum((1, 2))
        return [of_slots(found[0].key, found[0].value, mask), *found[1:]]

    def fork(self, count: int) -> Self:
        """See `EvictingCache.fork`; clusters are shared too."""
        other = super().fork(count)
        other.slots_read, other.usual = None, {}
        return other

    def keep(self, rows: Tensor) -> Self:
        """See `Cache.keep`."""
        other = super().keep(rows)
        other.slots_read, other.usual = None, {}
        other.clusters = {name: of_rows(x, rows, self.shape.batch) for name, x in self.clusters.items()}
        return other

    def trimmed(self) -> dict[str, Any]:
        """As in `EvictingCache`, with the clusters."""
        return super().trimmed() | {f"clusters_{name}": x.clone() for name, x in self.clusters.items()}

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        names = [key for key in saved if key.startswith("clusters_")]
        found = {key.removeprefix("clusters_"): saved.pop(key) for key in names}
        super().restore(saved, name)
        if self.kept_key is not None:
            self._check_clusters(found, name)
        elif found:
            raise ValueError(f"{name} holds clusters of nothing")
        self.clusters = found

    def _check_clusters(self, found: dict[str, Any], name: str) -> None:
        assert self.kept_key is not None
        wanted = {"labels": self.kept_key.shape[2], "sizes": None, "centroids": None}
        if "groups" in found:
            wanted |= {"groups": None, "group_sizes": None, "group_centroids": None}
        if set(found) != set(wanted) or not all(isinstance(x, Tensor) and x.ndim >= 3 for x in found.values()):
            raise ValueError(f"{name} does not hold the clusters of its keys")
        rows, heads, slots, width = self.kept_key.shape
        counts = {"": found["sizes"].shape[2], "group_": found["group_sizes"].shape[2] if "groups" in found else 0}
        shapes: dict[str, tuple[int, ...]] = {"labels": (rows, heads, slots), "groups": (rows, heads, counts[""])}
        for level, count in counts.items():
            shapes |= {f"{level}sizes": (rows, heads, count), f"{level}centroids": (rows, heads, count, width)}
        limits = {"labels": counts[""] + 2, "groups": counts["group_"]}
        for part, x in found.items():
            real = part.endswith("centroids")
            wrong = x.shape != shapes[part] or x.is_floating_point() != real
            if wrong or (part in limits and not bool(((x >= 0) & (x < limits[part])).all())):
                raise ValueError(f"{name}.clusters_{part} is no part of a state of this model")

    def held_bytes(self) -> int:
        """Everything, and what chooses of it."""
        queries = 0 if self.newest_query is None else self.newest_query.nbytes
        return super().held_bytes() + queries + sum(x.nbytes for x in self.clusters.values())

    def read_bytes(self) -> int:
        """Of the prompt the slots that were read last, and all of the rest but the clusters of keys."""
        if self.slots_read is None or self.kept_key is None or self.kept_value is None:
            return self.held_bytes()
        both = sum(x[0, 0, :1].nbytes for x in (self.kept_key, self.kept_value))
        whole = self.kept_key.nbytes + self.kept_value.nbytes
        rest = self.held_bytes() - whole - self.clusters["labels"].nbytes
        return rest + min(whole, int(self.slots_read.sum()) * both)

    def bookkeeping_bytes(self) -> int:
        """See `Cache.bookkeeping_bytes`."""
        return super().bookkeeping_bytes() + self.threshold.nbytes + self.group_threshold.nbytes


def _padded(x: Tensor, slots: int, value: int) -> Tensor:
    """Numbers [H, n] with others behind them, [H, slots]."""
    return torch.nn.functional.pad(x, (0, slots - x.shape[1]), value=value)
