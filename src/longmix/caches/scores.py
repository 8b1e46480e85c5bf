"""What a cache keeps: how much attention keys got, and the best of them within each row's budget.

All of it is tensors, so that nothing waits for the device, and of each row alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longmix.errors import ConfigError

MOST_SCORES = 2**24
"""Scores that are computed at once."""


def check_budget(name: str, budget: float, least: int = 1, things: str = "tokens") -> None:
    """Refuse what is neither a number of tokens, or of other things, nor a share of the prompt.

    Raises:
        ConfigError: naming the setting.
    """
    whole = budget >= 1 and budget == int(budget)
    if isinstance(budget, bool) or not (0 < budget < 1 or whole) or (whole and budget < least):
        raise ConfigError(
            f"cache.{name}={budget} must be a whole number of {things}, at least {least}, or a share of the prompt "
            "between 0 and 1."
        )


def tokens_of(budget: float, length: int, least: int = 1) -> int:
    """The tokens that a budget allows a prompt of `length` tokens: a share is rounded down, and to at least `least`."""
    return int(budget) if budget >= 1 else max(least, int(budget * length))


def budgets_of(budget: float, lengths: Tensor, least: int = 1) -> Tensor:
    """`tokens_of` for prompts of these lengths, int64 [B]."""
    if budget >= 1:
        return torch.full_like(lengths, int(budget))
    return (lengths.double() * budget).long().clamp(min=least)


def best(scores: Tensor, allowed: Tensor, counts: Tensor, most: int) -> Tensor:
    """The best slots of each row and head in ascending order; the earlier one of two that are equal.

    Args:
        scores: [B, H, S].
        allowed: bool, broadcasts over `scores`; the other slots are never chosen.
        counts: int64 [B], how many of them a row keeps, at most as many as are allowed.
        most: the largest count, n.

    Returns:
        int64 [B, H, n]; behind those that a row keeps, S.
    """
    slots = scores.shape[-1]
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    beyond = torch.arange(order.shape[-1], device=scores.device) >= counts[:, None, None]
    return order.masked_fill(beyond, slots).sort(-1).values


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    first: Tensor | None = None,
    seen: Tensor | None = None,
    scale: float | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The softmax weights of queries whose own keys are the last ones, some queries at a time.

    Args:
        query: [B, T, Hq, K].
        key: [B, Hkv, S, K], head-major, in the order of the tokens.
        first: int64 [B], the first key of each row's document; queries before it get no weights. None for 0.
        seen: bool [B, S - T], which of the keys before these queries' own a row sees; None for all from `first` on.
        scale: the factor on the scores, K ** -0.5 by default.

    Yields:
        Which queries, and their weights [B, Hkv, G, t, n] on the n first keys, up to that of the last of these queries;
        float64 for float64 inputs and float32 otherwise.
    """
    batch, length, heads, width = query.shape
    key_heads, slots = key.shape[1:3]
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    key = key.to(exact).transpose(-1, -2)
    slot = torch.arange(slots, device=query.device)
    size = max(1, MOST_SCORES // (batch * heads * slots))
    for start in range(0, length, size):
        some = slice(start, min(length, start + size))
        own = torch.arange(some.start, some.stop, device=query.device) + (slots - length)
        rows = scale * query[:, some].to(exact).transpose(1, 2)  # [B, Hq, t, K]
        grouped = rows.reshape(batch, key_heads, -1, width)
        until = slots - length + some.stop
        scores = torch.matmul(grouped, key[..., :until]).unflatten(2, (heads // key_heads, -1))
        hidden = (slot > own[:, None])[None]
        if first is not None:
            hidden = hidden | (slot < first[:, None, None]) | (own[:, None] < first[:, None, None])
        if seen is not None:
            hidden = hidden | ~torch.nn.functional.pad(seen, (0, length), value=True)[:, None]
        weights = scores.masked_fill_(hidden[:, None, None, :, :until], -torch.inf).softmax(-1)
        yield some, weights if first is None else weights.nan_to_num_(0.0)


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    first: Tensor | None = None,
    seen: Tensor | None = None,
    scale: float | None = None,
    by_head: bool = False,
) -> Tensor:
    """The sum of the weights that each key got over all queries; arguments as in `attention_weights`.

    Returns:
        [B, Hkv, 1, S], summed over the group too, or with `by_head` [B, Hkv, G, S].
    """
    batch, _, heads, _ = query.shape
    key_heads, slots = key.shape[1:3]
    exact = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(batch, key_heads, heads // key_heads if by_head else 1, slots, dtype=exact, device=key.device)
    for _, weights in attention_weights(query, key, first=first, seen=seen, scale=scale):
        total[..., : weights.shape[-1]] += weights.sum(3) if by_head else weights.sum((2, 3)).unsqueeze(2)
    return total
