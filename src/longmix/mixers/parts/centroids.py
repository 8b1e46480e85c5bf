"""Centroids of spherical k-means that follow training (after Roy et al. 2021, arXiv 2003.05997, section 4).

    c(x)   = argmax_c u . mu_c,     u = x / |x|
    S_c   <- decay S_c + (1 - decay) * mean over vectors of u [c(x) = c],     N_c alike of [c(x) = c]
    mu_c   = S_c / |S_c|

Queries and keys of a head share centroids and count half each. What differs from the paper: centroids have length 1, so
none wins because it is long; they move after an optimizer step, by the statistics of all its micro-batches and
processes; and one that lost its vectors gets half of the largest cluster, cut by a direction that was drawn at
construction, so that all processes cut alike.
"""

from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.errors import ConfigError
from longmix.mixers.parts.between_steps import Observed
from longmix.mixers.parts.metrics import Entropy, LargestShare, Measure, Occupied

DEAD = 0.01
"""A cluster is dead when its running count is below this share of the mean count."""

_CUT = 0.1
"""Distance between the halves of a split cluster. Any distance splits it evenly; a small one leaves it in place."""

_BINS = 512
"""Bins of the histogram of scores, which lie in [-1, 1]: a threshold is exact to 1 / 256."""


def unit(x: Tensor) -> Tensor:
    """`x` [..., d] at length 1, in float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class SphericalKMeans(Observed):
    """Centroids for each head, drawn at random directions.

    Args:
        heads: key heads, each with its own centroids.
        head_dim: size of a vector.
        clusters: centroids per head.
        decay: share of the running sums that an update keeps, in [0, 1); they begin at 0, so the first counts whole.
        seed: of the directions drawn at construction.
        frozen: never move.

    Raises:
        ConfigError: fewer than 2 clusters, a decay outside [0, 1).
    """

    centroids: Tensor
    directions: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, heads: int, head_dim: int, clusters: int, decay: float, seed: int, frozen: bool = False) -> None:
        super().__init__(frozen)
        if clusters < 2:
            raise ConfigError(f"mixer.clusters={clusters} must be at least 2; mixer=sliding_window has none.")
        if not 0 <= decay < 1:
            raise ConfigError(f"mixer.centroid_decay={decay} must be from 0 to below 1.")
        generator = torch.Generator().manual_seed(seed)
        drawn = F.normalize(torch.randn(2, heads, clusters, head_dim, generator=generator), dim=-1)
        self.register_buffer("centroids", drawn[0])
        self.register_buffer("directions", drawn[1])
        self.register_buffer("sums", torch.zeros(heads, clusters, head_dim))
        self.register_buffer("counts", torch.zeros(heads, clusters))
        self.decay = decay

    @torch.no_grad()
    def scores(self, vectors: Tensor) -> Tensor:
        """u . mu_c for `vectors` [B, T, H, d] of length 1, H a multiple of `heads`: [B, T, H, clusters]."""
        with torch.autocast(vectors.device.type, enabled=False):
            grouped = vectors.unflatten(2, (self.centroids.shape[0], -1)).transpose(1, 2)  # [B, heads, T, group, d]
            scores = grouped.flatten(2, 3) @ self.centroids.to(vectors.dtype).mT
        return scores.unflatten(2, grouped.shape[2:4]).transpose(1, 2).flatten(2, 3)

    def error(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Mean of |u - mu_c|^2 over all vectors [B, T, H, d], labels [B, T, H]; the gradient reaches the vectors."""
        heads = torch.arange(vectors.shape[2], device=labels.device) * self.centroids.shape[0] // vectors.shape[2]
        return (vectors - self.centroids.to(vectors.dtype)[heads, labels.long()]).square().sum(-1).mean()

    def summed(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Of unit vectors [B, T, H, d] by their clusters [B, T, H], and of how many: [heads, clusters, d + 1]."""
        heads, clusters, _ = self.centroids.shape
        exact = self.sums.dtype
        with torch.autocast(vectors.device.type, enabled=False):
            member = labels.unsqueeze(-1) == torch.arange(clusters, device=labels.device)
            member = member.to(exact).unflatten(2, (heads, -1))
            grouped = vectors.detach().to(exact).unflatten(2, (heads, -1))
            # The query heads of one key head count together as one.
            weight = heads / labels.shape[2]
            total = torch.einsum("bthgk,bthgd->hkd", member, grouped)
            count = member.sum((0, 1, 3)).unsqueeze(-1)
            return torch.cat([total, count], -1) * weight

    def learn(self, together: Tensor) -> None:
        """Move sums, counts and centroids, and revive at most one cluster of each head."""
        # Shares instead of sums, because activation checkpointing shows a recomputed pass twice.
        together = together / together[..., -1:].sum(1, keepdim=True)
        self.sums.lerp_(together[..., :-1], 1 - self.decay)
        self.counts.lerp_(together[..., -1], 1 - self.decay)
        length = self.sums.norm(dim=-1, keepdim=True)
        self.centroids.copy_(torch.where(length > 0, self.sums / length.clamp(min=1e-30), self.centroids))
        self._revive()

    def dead(self) -> Tensor:
        """How many clusters of a head are dead, on average over the heads: scalar."""
        return (self.counts < DEAD * self.counts.mean(-1, keepdim=True)).sum(-1, dtype=torch.float32).mean()

    def _revive(self) -> None:
        """Give the emptiest cluster of each head, if it is dead, half of the largest one."""
        heads = torch.arange(self.counts.shape[0], device=self.counts.device)
        empty, large = self.counts.argmin(-1), self.counts.argmax(-1)
        dead = (self.counts[heads, empty] < DEAD * self.counts.mean(-1)).unsqueeze(-1)
        middle, across = self.centroids[heads, large], self.directions[heads, empty]
        across = F.normalize(across - (across * middle).sum(-1, keepdim=True) * middle, dim=-1)
        length = self.sums[heads, large].norm(dim=-1, keepdim=True) / 2
        for cluster, sign in ((empty, 1), (large, -1)):
            half = F.normalize(middle + sign * _CUT * across, dim=-1)
            self.centroids[heads, cluster] = torch.where(dead, half, self.centroids[heads, cluster])
            self.sums[heads, cluster] = torch.where(dead, half * length, self.sums[heads, cluster])
        count = self.counts[heads, large] / 2
        for cluster in (empty, large):
            self.counts[heads, cluster] = torch.where(dead[:, 0], count, self.counts[heads, cluster])


class ScoreThreshold(Observed):
    """For each cluster the score that a given share of the keys exceeds, from a running histogram.

    Args:
        heads, clusters, head_dim: sizes; before the first update keys are taken to be uniform on the sphere.
        share: of keys above the threshold, in (0, 1).
        decay: share of the histogram that an update keeps.

    Raises:
        ConfigError: a share outside (0, 1).
    """

    histogram: Tensor
    value: Tensor

    def __init__(self, heads: int, clusters: int, head_dim: int, share: float, decay: float) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise ConfigError(f"mixer.share={share} must be between 0 and 1, or null for 1 / mixer.clusters.")
        start = NormalDist().inv_cdf(1 - share) * head_dim**-0.5
        self.register_buffer("histogram", torch.zeros(heads, clusters, _BINS))
        self.register_buffer("value", torch.full((heads, clusters), start))
        self.share = share
        self.decay = decay

    def summed(self, scores: Tensor) -> Tensor:
        """The histogram of scores [B, T, heads, clusters]."""
        place = ((scores + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1).flatten(0, 1).movedim(0, -1)
        ones = torch.ones_like(place, dtype=self.value.dtype)
        return torch.zeros_like(self.histogram).scatter_add_(-1, place, ones)

    def learn(self, together: Tensor) -> None:
        """Update the histogram. The threshold becomes the lower edge of the bin in which the share is reached."""
        self.histogram.lerp_(together / together.sum(-1, keepdim=True), 1 - self.decay)
        above = self.histogram.flip(-1).cumsum(-1)
        bins = (above < self.share * above[..., -1:]).sum(-1)
        self.value.copy_(1 - 2 * (bins + 1) / _BINS)


def usage(labels: Tensor, clusters: int) -> dict[str, Measure]:
    """How evenly labels [B, T, H] fill their clusters, head by head and on average over the heads."""
    counts = Occupied.of(labels, clusters)
    return {"largest_cluster": LargestShare(counts.sums), "entropy": Entropy(counts.sums), "occupied": counts}
