"""Representatives of the tokens that a cache drops (KVCrush, Jha et al. 2025, arXiv 2503.00022).

A token's signature has one bit for each query head: whether its score is in the better half of that head's. Tokens with
like signatures are attended to alike; so the dropped ones are put in order by the distance of their signatures to one
anchor, of alternating bits, and of each of n equal runs the middle one stays. No pair of tokens is compared.
"""

import torch
from torch import Tensor

from longmix.errors import ConfigError


def check_share(share: float, budget_name: str) -> None:
    """Refuse a share of representatives outside [0, 1).

    Raises:
        ConfigError: it is.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"cache.representatives={share} must be a share of {budget_name}, at least 0 and below 1.")


def signature_distance(scores: Tensor, allowed: Tensor) -> Tensor:
    """How many bits of each token's signature differ from 0, 1, 0, 1, ...

    Args:
        scores: [B, Hq, S], of each query head.
        allowed: bool [B, S], the tokens of each row; its better half, rounded down, is of these.

    Returns:
        int64 [B, S].
    """
    order = scores.masked_fill(~allowed[:, None], -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, rank)
    bits = rank < allowed.sum(-1)[:, None, None] // 2
    anchor = torch.arange(scores.shape[1], device=scores.device) % 2 == 1
    return (bits != anchor[:, None]).sum(1)


def representatives(distance: Tensor, dropped: Tensor, counts: Tensor, most: int) -> Tensor:
    """The tokens that stand for the dropped ones.

    Args:
        distance: int64 [B, S], of `signature_distance`.
        dropped: bool [B, H, S].
        counts: int64 [B], how many of them a row keeps; of fewer dropped ones it keeps all.
        most: the largest count, n.

    Returns:
        int64 [B, H, n], ascending; behind those that there are, S.
    """
    slots = dropped.shape[-1]
    slot = torch.arange(slots, device=distance.device)
    rank = (distance[:, None] * slots + slot).masked_fill(~dropped, torch.iinfo(torch.int64).max)
    order = rank.sort(-1).indices
    many = dropped.sum(-1, keepdim=True)
    counts = torch.minimum(counts[:, None, None], many)
    run = torch.arange(most, device=distance.device)
    middle = (2 * run + 1) * many // (2 * counts.clamp(min=1))
    found = order.gather(-1, middle.clamp(max=slots - 1))
    return found.masked_fill(run >= counts, slots).sort(-1).values
