"""Efficient probing: what frozen states know, read by a few learned queries (Psomas et al. 2025, arXiv 2506.10178).

Of states x_1 .. x_T [T, D] of one row, M queries q_m [M, D] each pool a slice of the values, and a linear classifier
reads them all, normalised without weights:

    a_m = softmax_t(q_m . x_t / sqrt(D)),    y_m = sum_t a_mt (W_v x_t)[slice m],    logits = W BatchNorm(y) + b

W_v is [D / d_out, D], so there are D^2 / d_out + M D + classes (D / d_out + 1) weights. `MeanPool` and `LastToken` have
the same normalisation and classifier on the mean state and on the last one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64
"""Rows of a step of the fit."""

LEARNING_RATE = 3e-3
"""Of Adam in the first step; it falls to 0 linearly."""


class Pool(nn.Module):
    """Turns the states [B, T, D] of rows into one vector each, [B, `width`]."""

    width: int


class EfficientProbe(Pool):
    """Pools [B, T, D] to [B, D / d_out] by learned queries.

    Args:
        width: D.
        queries: M, a divisor of D / d_out.
        d_out: by what the values are narrower than the states, a divisor of D.
    """

    def __init__(self, width: int, queries: int, d_out: int = 1) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.value = nn.Linear(width, width // d_out, bias=False)
        self.width = width // d_out

    def attention(self, x: Tensor) -> Tensor:
        """How much each position counts for each query, [B, M, T]."""
        return (torch.einsum("btd,md->bmt", x, self.queries) / math.sqrt(x.shape[-1])).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, D / d_out]."""
        values = self.value(x).unflatten(-1, (len(self.queries), -1))
        return torch.einsum("bmt,btmk->bmk", self.attention(x), values).flatten(1)


class MeanPool(Pool):
    """The mean state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, D]."""
        return x.mean(1)


class LastToken(Pool):
    """The last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, D]."""
        return x[:, -1]


@dataclass(frozen=True)
class Labelled:
    """States of rows [N, T, D] and the class of each, int64 [N]."""

    states: Tensor
    labels: Tensor


def accuracy_of(
    pool: Callable[[int], Pool], fit: Labelled, held_out: Labelled, classes: int, epochs: int, seed: int
) -> float:
    """The share of held-out rows whose class a probe tells, after it was fitted to the others.

    It is the same on every call: weights and the order of rows are drawn from `seed`, and no other generator moves.

    Args:
        pool: makes the pooling of states of a width.
        fit, held_out: rows; two at least to fit.
        classes: how many there are.
        epochs: passes over the rows of the fit.
        seed: of weights and order.
    """
    device = fit.states.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pooling = pool(fit.states.shape[-1])
        norm, classifier = nn.BatchNorm1d(pooling.width, affine=False), nn.Linear(pooling.width, classes)
    probe = nn.Sequential(pooling, norm, classifier).to(device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    rows = len(fit.labels)
    # A row alone has no deviation that it could be normalised by, so a last batch of one joins the one before.
    steps = epochs * max(1, (rows - 1) // BATCH + (1 if (rows - 1) % BATCH else 0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in _batches(torch.randperm(rows, generator=generator)):
                places = chosen.to(device)
                loss = F.cross_entropy(probe(fit.states[places].float()), fit.labels[places])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        _settle(norm, pooling, fit)
        probe.eval()
        hits = sum(
            int((probe(states.float()).argmax(-1) == labels).sum())
            for states, labels in zip(held_out.states.split(BATCH), held_out.labels.split(BATCH), strict=True)
        )
    return hits / len(held_out.labels)


def _batches(order: Tensor) -> list[Tensor]:
    parts = list(order.split(BATCH))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _settle(norm: nn.BatchNorm1d, pooling: Pool, fit: Labelled) -> None:
    """Let the normalisation of new rows be that of all rows of the fit, and not of the last batches."""
    pooled = torch.cat([pooling(states.float()) for states in fit.states.split(BATCH)])
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(pooled.mean(0))
    norm.running_var.copy_(pooled.var(0))
