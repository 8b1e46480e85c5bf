"""The SparseK operator: gates from 0 to 1 that add up to k (Lou et al. 2024, arXiv 2406.16747).

    p_j = min(max(z_j - tau, 0), 1),   tau such that sum_j p_j = k;   p_j = 1 where there are no more than k scores

The sum is piecewise linear in tau, and bends where tau is some z_j or z_j - 1: so one sort of these 2 n points and one
cumulative sum find tau. With s_j = 1 where 0 < p_j < 1 and else 0, the gradient is dz = s (g - (s . g) / sum s).
"""

from typing import Any

import torch
from torch import Tensor


def sparsek(scores: Tensor, count: int, there: Tensor | None = None) -> Tensor:
    """Return the gates of scores, with their exact gradient.

    Args:
        scores: [..., n], float32 or float64.
        count: what the gates of n scores add up to, k; at least 1.
        there: bool [..., n], which scores there are; the gates of the others are 0. None for all.

    Returns:
        The gates [..., n].
    """
    gates: Tensor = _SparseK.apply(scores, torch.ones_like(scores, dtype=torch.bool) if there is None else there, count)
    return gates


def threshold(scores: Tensor, count: int) -> Tensor:
    """Return tau [..., 1] for scores [..., n], of which there are more than `count`."""
    points = torch.cat((scores, scores - 1), -1)
    # Downwards: from z_j on a gate grows, and from z_j - 1 on it stays 1.
    growing = torch.cat((torch.ones_like(scores), torch.full_like(scores, -1)), -1)
    points, order = points.sort(dim=-1, descending=True)
    growing = growing.gather(-1, order).cumsum(-1)
    steps = growing[..., :-1] * (points[..., :-1] - points[..., 1:])
    total = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    last = ((total < count).sum(-1, keepdim=True) - 1).clamp(min=0)
    point, reached, slope = (x.gather(-1, last) for x in (points, total, growing))
    return point - (count - reached) / slope.clamp(min=1)


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, there: Tensor, count: int) -> Tensor:
        few = there.sum(-1, keepdim=True) <= count
        # Relative to the largest score, so that float32 has digits for what lies near it. The scores that are not there
        # are below every threshold, which is above the smallest score less 1.
        highest = scores.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
        scores = torch.where(there, scores - highest, 0.0)
        scores = torch.where(there, scores, scores.amin(-1, keepdim=True) - 2)
        gates = (scores - threshold(scores, count)).clamp(0, 1)
        gates = torch.where(few, 1.0, gates) * there
        ctx.save_for_backward((gates > 0) & (gates < 1))
        return gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (between,) = ctx.saved_tensors
        grad = grad * between
        return between * (grad - grad.sum(-1, keepdim=True) / between.sum(-1, keepdim=True).clamp(min=1)), None, None
