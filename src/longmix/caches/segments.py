"""Attention of pieces of a prompt to segments, which hold what `decode_attention` reads for a few tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longmix.caches.store import of_every_row
from longmix_kernels.attention import Segment, attention, merge
from longmix_kernels.attention.decode_codes import whole_groups
from longmix_kernels.attention.decode_torch import RUN


def of_slots(key: Tensor, value: Tensor, chosen: Tensor) -> Segment:
    """The segment of the slots that rows chose.

    Args:
        key: [R, Hkv, S, K], value: [R, Hkv, S, V]; see `Segment`.
        chosen: bool [B, Hkv, S].
    """
    slots = chosen.shape[2]
    index = torch.where(chosen, torch.arange(slots, device=chosen.device), slots).sort(-1).values
    return Segment(key, value, index=torch.where(index < slots, index, -1).to(torch.int32))


def attend_segments(
    query: Tensor, segments: Sequence[Segment], *, scale: float | None = None, goes_on: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Attend from any number of queries to each segment, without causality.

    Args:
        query: [B, T, Hq, K].
        segments: as in `decode_attention`.
        scale: the factor on the scores, K ** -0.5 by default.
        goes_on: bool [B, T], the queries that see the segments, which come first in each row; None for all.

    Returns:
        Output [B, T, Hq, V] and logsumexp [B, T, Hq] of each segment, as `merged` takes them.
    """
    runs = [run for each in segments if each.slots for run in _runs(each.gathered())]
    return [_attended(query, run, scale, goes_on) for run in runs]


def _runs(segment: Segment) -> Iterator[Segment]:
    """The segment; of codes some slots at a time, so that not all are numbers at once."""
    coded = segment.key_codes is not None or segment.value_codes is not None
    yield from segment.slices(whole_groups(RUN, segment)) if coded else (segment,)


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of one softmax over all parts."""
    return parts[0] if len(parts) == 1 else merge(parts)


def _attended(query: Tensor, segment: Segment, scale: float | None, goes_on: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    slots = segment.slots
    key, value = (of_every_row(x.transpose(1, 2), batch) for x in segment.numbers(query.dtype))
    lo = query.new_zeros(1, 1, dtype=torch.int32) if segment.first is None else segment.first[:, None].clamp(min=0)
    hi = torch.full_like(lo, slots) if segment.count is None else segment.count
    if hi.shape[1] > 1:
        hi = hi.repeat_interleave(heads // hi.shape[1], 1)
    lo, hi = (x[..., None].expand(batch, -1, length) for x in torch.broadcast_tensors(lo, torch.maximum(lo, hi)))
    if goes_on is not None:  # bounds may not fall along the queries: those that see nothing see it at the end
        lo, hi = (torch.where(goes_on[:, None], x, slots) for x in (lo, hi))
    lo, hi = (x.to(torch.int32).contiguous() for x in (lo, hi))
    return attention(query, key, value, lo=lo, hi=hi, scale=scale, return_logsumexp=True)
