"""Codebooks of keys in the metric of queries, and the tokens whose codes score best (He et al. 2025, arXiv 2502.12665).

With Q the queries [n, K] of the heads that share a key head, their metric is H = Q^T Q, divided by the root mean square
of its entries, and its factor F is lower triangular with F F^T = H + 1e-6 I. The error of a score is then a distance:

    mean over q of (q . k - q . c)^2  ~  |k F - c F|^2

So the codebook are the centroids C of the keys k F, a key's code is the nearest of them, and q . c is (F^-1 q) . C.
Everything is of each row and key head alone.
"""

import torch
from torch import Tensor

from longmix.caches.clusters import first_centroids, sums_of
from longmix.caches.scores import MOST_SCORES

RIDGE = 1e-6
"""What is added to the metric, so that it has a factor where queries leave directions out."""


def metric_factor(moment: Tensor) -> Tensor:
    """The factor F of the metric that queries give.

    Args:
        moment: Q^T Q, float64 [..., K, K].

    Returns:
        float64 [..., K, K], lower triangular.
    """
    size = moment.square().mean((-2, -1), keepdim=True).sqrt()
    metric = moment / size.clamp(min=torch.finfo(moment.dtype).tiny)
    metric = metric + RIDGE * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky_ex(metric).L


def codebook_of(points: Tensor, count: int, *, rounds: int, seed: int) -> Tensor:
    """Centroids of the points of heads: k-means++, then rounds until nothing changes.

    A centroid without points goes to the point that is farthest from its own, the second one to the second, and so on.

    Args:
        points: [H, n, K], float32 or float64.
        count: centroids, at most n.
        rounds: the most rounds.
        seed: of the first centroids.

    Returns:
        [H, count, K].
    """
    codebook = first_centroids(points, count, seed, lambda x, centroid: (x - centroid).square().sum(-1))
    codes = nearest_codes(points, codebook)
    for _ in range(rounds):
        codebook = _centroids(points, codes, codebook)
        after = nearest_codes(points, codebook)
        if torch.equal(after, codes):
            break
        codes = after
    return codebook


def nearest_codes(points: Tensor, codebook: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The nearest centroid of each point, int64 [..., n]; the first one of two that are equal.

    Args:
        points: [..., n, K].
        codebook: [..., C, K].
        sizes: [...], how many of the centroids there are; None for all.
    """
    norms = codebook.square().sum(-1)
    if sizes is not None:
        norms = norms.masked_fill(torch.arange(norms.shape[-1], device=norms.device) >= sizes[..., None], torch.inf)
    turned, norms = -2 * codebook.transpose(-1, -2), norms.unsqueeze(-2)
    size = max(1, MOST_SCORES // max(1, norms.numel()))
    parts = [(torch.matmul(some, turned) + norms).argmin(-1) for some in points.split(size, -2)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def code_scores(query: Tensor, codebook: Tensor, factor: Tensor, scale: float) -> Tensor:
    """The scores that queries give the codes, [..., n, C].

    Args:
        query: [..., n, K].
        codebook: [..., C, K].
        factor: F, [..., K, K].
        scale: the factor on the scores.
    """
    seen = torch.linalg.solve_triangular(factor.transpose(-1, -2), scale * query, upper=True, left=False)
    return torch.matmul(seen, codebook.transpose(-1, -2))


def best_tokens(scores: Tensor, codes: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """Which tokens have the codes with the best scores; of one code the earlier tokens.

    All tokens of a code have its score, so that codes are sorted, and tokens only counted.

    Args:
        scores: [B, Hkv, G, C], of codes.
        codes: int64 [B, Hkv, S], of tokens.
        allowed: bool [B, S]; the other tokens are never chosen.
        counts: int64 [B], how many tokens each query head chooses; all that are allowed if they are fewer.

    Returns:
        bool [B, Hkv, G, S].
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    allowed, counts = allowed[:, None], counts[:, None, None, None]
    sizes = torch.zeros_like(order[:, :, 0]).scatter_add_(2, codes, allowed.expand_as(codes).long())
    ordered = sizes.unsqueeze(2).expand_as(order).gather(-1, order)
    inside = ordered.cumsum(-1) <= counts  # codes all of whose tokens are chosen; those before them are too
    whole = inside.sum(-1, keepdim=True)
    left = counts - (ordered * inside).sum(-1, keepdim=True)
    ranks = rank.gather(-1, codes.unsqueeze(2).expand(*codes.shape[:2], order.shape[2], -1))
    last = (ranks == whole) & allowed[:, :, None]
    return ((ranks < whole) & allowed[:, :, None]) | (last & (last.cumsum(-1) <= left))


def _centroids(points: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """The mean of the points of each code; those of codes without points are the farthest points."""
    sums, sizes = sums_of(points, codes, codebook.shape[1])
    empty = sizes == 0
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    own = codebook.gather(1, codes.unsqueeze(-1).expand_as(points))
    farthest = (points - own).square().sum(-1).sort(dim=-1, descending=True, stable=True).indices
    number = (empty.cumsum(-1) - 1).clamp(min=0)  # of the empty codes before
    moved = points.gather(1, farthest.gather(1, number).unsqueeze(-1).expand_as(means))
    return torch.where(empty.unsqueeze(-1), moved, means)
