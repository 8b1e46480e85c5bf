"""Clusters of keys, and the weight that queries give them (Hooper et al. 2024, arXiv 2411.09688).

Keys of a head are clustered by their directions; a cluster's centroid m_c is the mean of its keys as they are. A query
q gives each of the n_c keys of cluster c the weight

    p_c = exp(s q . m_c) / sum_c' n_c' exp(s q . m_c')

Everything is of each row and head alone: what is drawn follows from the seed and the number of the row's keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longmix.caches.saliency import generator_of
from longmix.caches.scores import MOST_SCORES


def clustered(keys: Tensor, count: int, *, rounds: int, seed: int) -> Tensor:
    """Cluster the keys of heads by cosine similarity: k-means++, then rounds until nothing changes.

    Args:
        keys: [H, n, K].
        count: clusters, at most n; some may end up empty.
        rounds: the most rounds.
        seed: of the first centroids.

    Returns:
        int64 [H, n], the cluster of each key.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    units = torch.nn.functional.normalize(keys.to(exact), dim=-1)
    centroids = first_centroids(units, count, seed, _unlikeness)
    labels = _nearest(units, centroids)
    for _ in range(rounds):
        sums, sizes = sums_of(units, labels, count)
        # an empty cluster keeps its centroid; of the sums only the direction counts
        centroids = torch.where(sizes[..., None] > 0, torch.nn.functional.normalize(sums, dim=-1), centroids)
        after = _nearest(units, centroids)
        if torch.equal(after, labels):
            break
        labels = after
    return labels


def centroids_of(keys: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean [H, count, K] of the keys [H, n, K] of each cluster, 0 of an empty one, and their numbers [H, count]."""
    sums, sizes = sums_of(keys, labels, count)
    return sums / sizes.clamp(min=1).unsqueeze(-1), sizes


def cluster_weights(query: Tensor, centroids: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """The weight p_c that queries give a key of each cluster.

    Args:
        query: [B, Hq, T, K].
        centroids: [B, Hkv, C, K].
        sizes: [B, Hkv, C], keys of each cluster; 0 for clusters that take no part. May have the heads of the queries.
        scale: the factor on the scores.

    Returns:
        [B, Hq, T, C], float64 for float64 inputs and float32 otherwise; 0 of clusters that take no part.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, width = query.shape
    key_heads = centroids.shape[1]
    rows = query.to(exact).reshape(batch, key_heads, -1, width)
    scores = torch.matmul(scale * rows, centroids.to(exact).transpose(-1, -2))
    scores = scores.unflatten(2, (heads // key_heads, length))  # [B, Hkv, G, T, C]
    sizes = sizes.to(exact).unflatten(1, (key_heads, -1)).unsqueeze(3)  # [B, Hkv, 1 or G, 1, C]
    total = (scores + sizes.log()).logsumexp(-1, keepdim=True)
    return (scores - total).exp().masked_fill(sizes == 0, 0.0).flatten(1, 2)


def quantile(x: Tensor, share: float) -> Tensor:
    """The quantile of all numbers, linear between neighbours as numpy's; `torch.quantile` takes 16 million at most."""
    ordered = x.flatten().sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)


def first_centroids(points: Tensor, count: int, seed: int, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """k-means++ for all heads: each next centroid is a point drawn by its distance to the nearest before.

    Args:
        points: [H, n, K].
        count: centroids.
        seed: of the draws, with the number of points.
        distance: of points [H, n, K] to one of each head, [H, 1, K]: at least 0, [H, n].

    Returns:
        [H, count, K].
    """
    heads, length, _ = points.shape
    generator = generator_of(seed, length)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(points)
    head = torch.arange(heads, device=points.device)
    at = (drawn[0] * length).long().clamp(max=length - 1).expand(heads)
    found = [points[head, at]]
    nearest = torch.full((heads, length), torch.inf, dtype=points.dtype, device=points.device)
    for number in range(1, count):
        nearest = torch.minimum(nearest, distance(points, found[-1].unsqueeze(1)))
        total = nearest.cumsum(-1)
        at = torch.searchsorted(total, (drawn[number] * total[:, -1:]).contiguous(), right=True)
        found.append(points[head, at.squeeze(-1).clamp(max=length - 1)])
    return torch.stack(found, 1)


def _unlikeness(units: Tensor, centroid: Tensor) -> Tensor:
    return (1 - torch.matmul(units, centroid.transpose(-1, -2)).squeeze(-1)).clamp(min=0)


def _nearest(units: Tensor, centroids: Tensor) -> Tensor:
    """The most similar centroid of each key."""
    size = max(1, MOST_SCORES // (len(units) * centroids.shape[1]))
    parts = [torch.matmul(some, centroids.transpose(-1, -2)).argmax(-1) for some in units.split(size, 1)]
    return torch.cat(parts, 1)


def sums_of(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum [H, count, K] of each cluster's rows of x [H, n, K], and its size [H, count]; labels are int64 [H, n]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(len(x), count, x.shape[2], dtype=exact, device=x.device)
    sums.scatter_add_(1, labels[..., None].expand(-1, -1, x.shape[2]), x.to(exact))
    sizes = torch.zeros(len(x), count, dtype=torch.int64, device=x.device)
    return sums, sizes.scatter_add_(1, labels, torch.ones_like(labels))


def label_dtype(count: int) -> torch.dtype:
    """What the numbers of so many clusters, and two more, are stored in."""
    return torch.int16 if count + 2 < 2**15 else torch.int32
