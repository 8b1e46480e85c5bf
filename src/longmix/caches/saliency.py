"""How much attention tokens of a prompt get from some of its queries, the probes (He et al. 2024, arXiv 2405.14256).

With a_ij the softmax weights of the probes i that see token j, over G heads that share its key,

    saliency_j = (sum over probes and heads of a_ij) / (G * number of probes that see j)

A sum alone would prefer early tokens, which more queries see.
"""

import hashlib

import torch
from torch import Tensor

from longmix.caches.scores import MOST_SCORES


def probe_places(length: int, newest: float, random: float, seed: int) -> Tensor:
    """The queries that are probes, int64 [n]: the newest ones, and others drawn without repetition.

    Args:
        length: tokens of the text, which with the seed decides what is drawn.
        newest, random: shares of the tokens; each is at least one token if the share is not 0.
        seed: of the draw.
    """
    last = min(length, _count(newest, length))
    drawn = min(length - last, _count(random, length))
    places = torch.randperm(length - last, generator=generator_of(seed, length))[:drawn]
    return torch.cat((torch.arange(length - last, length), places.sort().values))


def generator_of(seed: int, length: int) -> torch.Generator:
    """What is drawn for a text of so many tokens, whatever the other rows of its batch."""
    mixed = hashlib.blake2b(f"{seed} {length}".encode(), digest_size=4).digest()  # torch's generator reads 32 bits
    return torch.Generator().manual_seed(int.from_bytes(mixed, "big"))


def _count(share: float, length: int) -> int:
    return max(1, int(share * length + 1e-9)) if share else 0


def saliency(
    query: Tensor,
    key: Tensor,
    probes: Tensor,
    *,
    first: Tensor | None = None,
    seen: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The saliency of every token.

    Args:
        query: [B, Hq, S, K], key: [B, Hkv, S, K], head-major.
        probes: int64 [B, n], slots of the probes.
        first: int64 [B], the first token of each row's document; None for 0.
        seen: bool [B, n], which of the probes a row has; None for all.
        scale: the factor on the scores, K ** -0.5 by default.

    Returns:
        [B, Hkv, S], float64 for float64 inputs and float32 otherwise; infinite where no probe sees the token.
    """
    batch, heads, slots, width = query.shape
    key_heads, count = key.shape[1], probes.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    slot = torch.arange(slots, device=key.device)
    columns = key.to(exact).transpose(-1, -2)
    mass = key.new_zeros(batch, key_heads, slots, dtype=exact)
    visits = torch.zeros(batch, slots, dtype=torch.int64, device=key.device)
    size = max(1, MOST_SCORES // (batch * heads * slots))
    for start in range(0, count, size):
        at = probes[:, start : start + size]
        visible = slot <= at[:, :, None]  # [B, p, S]
        if first is not None:
            visible = visible & (slot >= first[:, None, None])
        if seen is not None:
            visible = visible & seen[:, start : start + size, None]
        rows = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).to(exact)
        scores = torch.matmul(scale * rows.reshape(batch, key_heads, -1, width), columns)
        scores = scores.unflatten(2, (heads // key_heads, -1)).masked_fill(~visible[:, None, None], -torch.inf)
        mass += scores.softmax(-1).nan_to_num(0.0).sum((2, 3))
        visits += visible.sum(1)
    found = mass / (visits * (heads // key_heads)).clamp(min=1)[:, None]
    return found.masked_fill((visits == 0)[:, None], torch.inf)


def divided(saliency: Tensor, low: int, counts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Divide tokens between the least salient and the others; the earlier of two that are equal is the less salient.

    Args:
        saliency: [B, H, n].
        low: how many tokens are of the least salient, where all n count.
        counts: int64 [B] each, how many of a row's last tokens count, and how many of them are of the least salient;
            None for all n and `low`.

    Returns:
        int64 [B, H, low] and [B, H, n - low], places in ascending order; before those of a row, -1.
    """
    slots = saliency.shape[2]
    slot = torch.arange(slots, device=saliency.device).expand_as(saliency)
    some: Tensor | int = low
    inside = torch.ones_like(slot, dtype=torch.bool)
    if counts is not None:
        inside, some = slot >= (slots - counts[0])[:, None, None], counts[1][:, None, None]
        saliency = saliency.masked_fill(~inside, torch.nan)  # which sorts last
    order = saliency.sort(dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(2, order, slot.contiguous())
    least = inside & (rank < some)
    return (
        torch.where(least, slot, -1).sort(-1).values[..., slots - low :],
        torch.where(inside & ~least, slot, -1).sort(-1).values[..., low:],
    )
