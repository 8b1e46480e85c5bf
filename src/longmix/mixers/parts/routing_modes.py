"""Whom a routed query sees: the modes of `mixer=routing`, each a few lines that sort rows and bound them.

    argmax_window   the last `window` keys of its cluster
    argmax_full     all earlier keys of its cluster
    prefix_topk     the `window` best keys of its cluster among finished blocks, and its cluster in its own block
    threshold       the last `window` keys whose score exceeds its cluster's threshold
    sequence_topk   as published: each cluster takes its `window` best tokens of the whole row, later ones included

The first four ask of a token nothing but itself and what came before it. Functions take the routed heads as `Rows`,
whose labels are what `Routing.select` chose, and return output [B, Tq, H, D].
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.mixers.parts.attention_state import Rows
from longmix_kernels.attention import Ordering, order_by_label, positions_from_document_ids

CAUSAL = ("argmax_window", "argmax_full", "prefix_topk", "threshold")
LEAKY = "sequence_topk"

_MEAN_EPS = 1e-5
"""Added to a token's number of clusters before the mean over them, as lucidrains' code does; the authors add 0.01."""

_ALIKE = 2.0**-12
"""Resolution of scores in [-1, 1]: far above the rounding of float32, 1e-7, so that equal scores stay equal."""


def latest(
    rows: Rows, clusters: int, window: int | None, shared: bool, *, alone: bool = True, copies: int = 1
) -> tuple[Tensor, list[Ordering]]:
    """Queries labelled [B, Tq, Hq, n] see the latest keys, labelled [B, Tk, Hkv, 1], of their n clusters.

    Args:
        rows: the routed heads.
        clusters: how many there are; a key labelled so is nobody's.
        window: how many keys of a cluster are seen; None for all.
        shared: queries are keys, and do not see their own.
        alone: but they do if it is the first of their cluster; needs that the first label of a query is its key's.
        copies: key rows per position, see `order_by_label`; `rows.document_ids` has one for each key row.
    """
    assert rows.query_labels is not None and rows.key_labels is not None
    orderings = []
    for turn in range(rows.query_labels.shape[-1]):
        own = shared and alone and turn == 0
        order = order_by_label(
            rows.query_labels[..., turn],
            None if own and rows.query.shape[1] == rows.key.shape[1] else rows.key_labels[..., 0],
            num_labels=clusters + 1,
            gap=int(shared),
            members=window,
            copies=copies,
            **rows.documents(),
        )
        if own:
            assert order.hi is not None
            # A query without an earlier key is the first of its run, so `lo` is its own place.
            order = order._replace(hi=torch.maximum(order.hi, order.lo + 1))
        orderings.append(order)
    return rows.merged([rows.attended(**order._asdict()) for order in orderings]), orderings


def copied(rows: Rows) -> Rows:
    """Repeat each key, labelled [B, Tk, Hkv, n], once for each of its n clusters."""
    assert rows.key_labels is not None
    copies, ids = rows.key_labels.shape[-1], rows.document_ids
    key, value = (x.repeat_interleave(copies, 1) for x in (rows.key, rows.value))
    ids = None if ids is None else ids.repeat_interleave(copies, 1)
    labels = rows.key_labels.transpose(2, 3).flatten(1, 2).unsqueeze(-1)
    return replace(rows, key=key, value=value, document_ids=ids, key_labels=labels, layout=None)


def prefix_topk(rows: Rows, clusters: int, window: int, block: int, shared: bool) -> tuple[Tensor, list[Ordering]]:
    """Queries labelled [B, Tq, Hq, 1], keys with their scores [B, Tk, Hkv, clusters] in place of labels.

    Blocks are counted from the beginning of a document. The lists of each finished block are gathered, so that memory
    grows with (Tk / block) * clusters * window.
    """
    assert rows.query_labels is not None and rows.key_labels is not None
    queries, keys = rows.query.shape[1], rows.key.shape[1]
    scores, labels = rows.key_labels, rows.query_labels[..., 0]
    batch, device = rows.key.shape[0], rows.key.device
    if rows.document_ids is None:
        position = torch.arange(keys, device=device).expand(batch, -1)
    else:
        position = positions_from_document_ids(rows.document_ids).long()
    own_block = (position % block == 0).cumsum(1).int()
    own = order_by_label(
        labels,
        None if shared and queries == keys else scores.argmax(-1),
        num_labels=clusters,
        document_ids=own_block,
        gap=int(shared),
        members=window,
    )
    parts = [rows.attended(**own._asdict())]
    ends, turn = _finished_blocks(position, queries, block)
    best, count = _best_of_prefixes(scores, position, ends, min(window, keys), block)
    key, value = (_take(x, best) for x in (rows.key, rows.value))
    code = torch.where((turn < 0)[:, None], ends.shape[1] * clusters, turn[:, None] * clusters + labels.mT)
    code, query_rows = code.to(_narrow(ends.shape[1] * clusters)).sort(dim=-1, stable=True)
    code = code.long()
    # Queries without a finished block come last and see an empty run at the end.
    size = F.pad(count.flatten(2), (0, 1)).repeat_interleave(code.shape[1] // count.shape[1], 1).gather(-1, code)
    lo = code * min(window, keys)
    lo, hi, query_rows = lo.int(), (lo + size).int(), query_rows.int()
    parts.append(replace(rows, key=key, value=value).attended(lo=lo, hi=hi, query_rows=query_rows))
    return rows.merged(parts), [own]


def _finished_blocks(position: Tensor, queries: int, block: int) -> tuple[Tensor, Tensor]:
    """Last rows of the blocks whose lists are needed, [B, G], -1 for none, and which is each query's, [B, Tq].

    The first is the last block that was finished before the queries, the others are those they finish.
    """
    keys = position.shape[1]
    ends_here = position % block == block - 1
    number = ends_here.long().cumsum(1)
    before = number[:, keys - queries] - ends_here[:, keys - queries].long()
    most = 1 + -(-queries // block)
    row = torch.where(ends_here, torch.arange(keys, device=position.device), -1)
    place = torch.where(ends_here, (number - before[:, None]).clamp(0, most), most)
    ends = row.new_full((position.shape[0], most + 1), -1).scatter_reduce_(1, place, row, "amax")[:, :most]
    own = position[:, keys - queries :]
    turn = (number - ends_here.long() - before[:, None])[:, keys - queries :]
    return ends, torch.where(own >= block, turn, -1)


def _best_of_prefixes(scores: Tensor, position: Tensor, ends: Tensor, window: int, block: int) -> tuple[Tensor, Tensor]:
    """Rows of the best keys of each cluster up to each end within its document, and how many there are.

    Returns:
        rows [B, G * clusters * window, Hkv], the empty places of a list last, and counts [B, Hkv, G, clusters].
    """
    length = scores.shape[1]
    place = torch.arange(length, device=scores.device)
    # In the first layer equal tokens have equal scores, up to rounding. Of these the earlier one is better: `topk`
    # alone would choose by how long the row is.
    order = (scores / _ALIKE).round().to(torch.int16).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, place[:, None, None].expand_as(order))
    starts = ends - position.gather(1, ends.clamp(min=0))
    inside = (place >= starts[:, :1]) & (place <= ends[:, :1])
    ranks = rank.masked_fill(~inside[..., None, None], length).topk(window, dim=1, largest=False).values
    every = [ranks]
    # A later list is that of the block before it in its document and the rows of its own block.
    goes_on = F.pad(starts[:, 1:] == starts[:, :-1], (1, 0)) & (ends >= 0)
    back = torch.arange(block, device=scores.device)
    for turn in range(1, ends.shape[1]):
        rows = ends[:, turn, None] - back
        new = rank.gather(1, rows.clamp(min=0)[..., None, None].expand(-1, -1, *rank.shape[2:]))
        new = new.masked_fill((rows < 0)[..., None, None], length)
        held = ranks.masked_fill(~goes_on[:, turn, None, None, None], length)
        ranks = torch.cat((held, new), 1).topk(window, dim=1, largest=False).values
        every.append(ranks)
    found = torch.stack(every, 1)  # [B, G, window, Hkv, clusters]
    best = order.gather(1, found.clamp(max=length - 1).flatten(1, 2)).view_as(found)
    return best.permute(0, 1, 4, 2, 3).flatten(1, 3), (found < length).sum(2).permute(0, 2, 1, 3)


def _narrow(largest: int) -> torch.dtype:
    """The narrowest kind of integers up to `largest`: a GPU sorts these fastest."""
    return next(kind for kind in (torch.uint8, torch.int16, torch.int64) if largest <= torch.iinfo(kind).max)


def sequence_topk(rows: Rows, window: int, shared: bool) -> tuple[Tensor, list[Ordering]]:
    """The published routing: queries [B, T, Hq, clusters] and keys [B, T, Hkv, clusters] with scores for labels.

    A token in several clusters gets the mean of what it found there, one in none gets 0. Documents see their own keys
    only, but compete for places. With `shared` a token sees itself only if it is first.
    """
    assert rows.query_labels is not None and rows.key_labels is not None
    batch, length, heads, _ = rows.query.shape
    window = min(window, length)
    query_rows, query_place = _members(rows.query_labels, window)
    key_rows, key_place = _members(rows.key_labels, window)
    position = query_place % length
    ids = rows.document_ids
    begin = torch.zeros_like(position)
    if ids is not None:
        first = torch.arange(length, device=ids.device) - positions_from_document_ids(ids).long()
        begin = first[:, None].expand(-1, heads, -1).gather(-1, position)
    lo = _count_below(key_place, query_place - position + begin)
    hi = _count_below(key_place, query_place + 1 - int(shared))
    if shared:
        hi = torch.maximum(hi, lo + 1)
    query, key, value = _take(rows.query, query_rows), _take(rows.key, key_rows), _take(rows.value, key_rows)
    found = replace(rows, query=query, key=key, value=value).attended(lo=lo.int(), hi=hi.int())[0]
    index = query_rows.unsqueeze(-1).expand_as(found)
    total = found.new_zeros(*rows.query.shape[:3], found.shape[-1]).scatter_add_(1, index, found)
    times = found.new_zeros(batch, length, heads).scatter_add_(1, query_rows, found.new_ones(1).expand_as(query_rows))
    return total / (times + _MEAN_EPS).unsqueeze(-1), []


def _members(scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Rows of the `window` best of each cluster in order of time, [B, clusters * window, H], and cluster * T + row."""
    length, clusters = scores.shape[1], scores.shape[-1]
    rows = scores.topk(window, dim=1).indices.sort(1).values.permute(0, 3, 1, 2)  # [B, clusters, window, H]
    place = rows + length * torch.arange(clusters, device=rows.device)[:, None, None]
    return rows.flatten(1, 2), place.flatten(1, 2).mT.contiguous()


def _count_below(places: Tensor, limits: Tensor) -> Tensor:
    """For each limit [B, Hq, m], count the places of its key head, ascending [B, Hkv, n], that are below it."""
    return torch.searchsorted(places, limits.reshape(*places.shape[:2], -1)).view(limits.shape)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Gather from `x` [B, T, H, D] the rows with indices [B, n, H]: [B, n, H, D]."""
    return x.gather(1, rows.unsqueeze(-1).expand(*rows.shape, x.shape[-1]))
