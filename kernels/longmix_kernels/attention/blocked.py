"""Bounded attention tile by tile, in memory linear in the length (FlashAttention-2, Dao 2023, in torch operations).

Forward: each tile of query rows goes through the panels of keys it sees; panels are merged through their logsumexp.
Backward: the weights are recomputed from the logsumexp L, panel by panel and independently of each other:

    P = exp(S - L)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q
    delta_i = o_i . dO_i - dL_i

The gradient dL of the logsumexp therefore costs nothing but the subtraction; here it rides as one more value column
(v = 0, dO = 1, o = -dL), so that panels need not know of it.

Batch rows and heads with equal bounds go through one panel together; those whose bounds differ take turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch.nn import functional as F

from longmix_kernels.attention.panels import PanelMath, panel_math
from longmix_kernels.attention.tiling import Panel, Tile, plan_tiles


def blocked_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    scale: float,
    math: PanelMath | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention; arguments and results as `attention_reference`.

    `math` overrides how a panel is computed.
    """
    math = math or panel_math(query.device)
    value_dim = value.shape[-1]
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(*query.shape[:-1], value_dim)
    logsumexp = query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
    width = max(query.shape[-1], value_dim)
    query, key, value = (_widen(x.to(exact), width) for x in (query, key, value))
    mask_of = _mask_maker(query)

    for group in _groups(lo, hi, query.shape[0], query.shape[2], key.shape[2]):
        q, out, lse = (group.query_rows(x) for x in (query, output, logsumexp))
        k, v = (group.key_rows(x).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in _turns(group, math, q):
            parts, rows = [], _rows(q, tile, turn)
            for panel in tile.panels:
                mask, empty = mask_of(group, tile.rows, panel)
                panel_k, panel_v = (_keys(x, tile, panel.keys, turn) for x in (k, v))
                part, part_lse = math.forward(rows, panel_k, panel_v, scale, panel.kind == "causal", mask)
                parts.append((part, part_lse if empty is None else part_lse.masked_fill(empty, -torch.inf)))
            merged, merged_lse = reduce(_merge, parts)
            _rows(out, tile, turn).copy_(merged[..., :value_dim])
            _rows(lse, tile, turn).copy_(merged_lse)
    return output, logsumexp


def blocked_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    math: PanelMath | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes.

    Args:
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero; what it holds for rows that see nothing is not looked at.
        query, key, value, lo, hi, scale, math: as in the forward.
        output, logsumexp: what it returned.
    """
    math = math or panel_math(query.device)
    head_dim, value_dim, dtype = query.shape[-1], value.shape[-1], query.dtype
    empty = logsumexp.isneginf()
    logsumexp = logsumexp.masked_fill(empty, 0.0)
    width = max(head_dim, value_dim + (grad_logsumexp is not None))
    query, key, value, output, grad_output = (
        _widen(x.to(logsumexp.dtype), width) for x in (query, key, value, output, grad_output)
    )
    if grad_logsumexp is not None:
        grad_output[..., value_dim] = 1.0
        output[..., value_dim] = -grad_logsumexp.masked_fill(empty, 0.0)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    mask_of = _mask_maker(query)

    for group in _groups(lo, hi, query.shape[0], query.shape[2], key.shape[2]):
        row_inputs = [group.query_rows(x) for x in (grad_output, output, logsumexp, query)]
        grad_q, grad_k, grad_v = group.query_rows(grad_query), group.key_rows(grad_key), group.key_rows(grad_value)
        k, v = (group.key_rows(x).expand(-1, grad_q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in _turns(group, math, grad_q):
            rows = [_rows(x, tile, turn) for x in row_inputs]
            for panel in tile.panels:
                mask, _ = mask_of(group, tile.rows, panel)
                panel_k, panel_v = (_keys(x, tile, panel.keys, turn) for x in (k, v))
                parts = math.backward(*rows, panel_k, panel_v, scale, panel.kind == "causal", mask)
                _rows(grad_q, tile, turn).add_(parts[0])
                _add_to_keys(grad_k, parts[1], tile, panel.keys, turn)
                _add_to_keys(grad_v, parts[2], tile, panel.keys, turn)
    return (
        grad_query[..., :head_dim].to(dtype).contiguous(),
        grad_key[..., :head_dim].to(dtype).contiguous(),
        grad_value[..., :value_dim].to(dtype).contiguous(),
    )


@dataclass
class _Group:
    """Batch rows and heads that share their bounds, and the views [X, Y, T, ...] in which panels see them.

    X and Y are batch and head; or, where several query heads read one key head, key head and query head within it for
    one batch row at a time, so that keys expand along Y without a copy.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    batch: slice
    heads: slice
    key_heads: slice

    def query_rows(self, x: torch.Tensor) -> torch.Tensor:
        """View [B, Tq, Hq, ...] as [X, Y, Tq, ...]."""
        x = x[self.batch, :, self.heads].transpose(1, 2)
        return x[0].unflatten(0, (_length(self.key_heads), -1)) if self._grouped() else x

    def key_rows(self, x: torch.Tensor) -> torch.Tensor:
        """View [B, Tk, Hkv, D] as [X, 1 or Y, Tk, D]."""
        x = x[self.batch, :, self.key_heads].transpose(1, 2)
        return x[0].unsqueeze(1) if self._grouped() else x

    def bounds(self, rows: slice, keys: slice) -> tuple[int, ...]:
        """Bounds of some rows relative to the first of some keys and cut off at them: all `lo`, then all `hi`."""
        bounds = torch.stack([self.lo[rows], self.hi[rows]]).sub_(keys.start).clamp_(0, _length(keys))
        return tuple(bounds.flatten().tolist())

    def _grouped(self) -> bool:
        return _length(self.heads) > _length(self.key_heads)


def _groups(lo: torch.Tensor, hi: torch.Tensor, batch: int, heads: int, key_heads: int) -> Iterator[_Group]:
    """Split batch rows and heads into groups with equal bounds, as large as the views allow."""
    lo, hi = (x.cpu() for x in torch.broadcast_tensors(lo, hi))
    per_key_head = heads // key_heads

    def group(rows: slice, some: slice) -> _Group:
        row, head = min(rows.start, lo.shape[0] - 1), min(some.start, lo.shape[1] - 1)
        read = slice(some.start // per_key_head, -(-some.stop // per_key_head))
        return _Group(lo[row, head], hi[row, head], rows, some, read)

    together = per_key_head == 1 and _all_equal(lo, hi)
    for rows in [slice(0, batch)] if together else [slice(b, b + 1) for b in range(batch)]:
        own = slice(0, 1) if lo.shape[0] == 1 else rows
        if _all_equal(lo[own], hi[own]):
            yield group(rows, slice(0, heads))
            continue
        for first in range(0, heads, per_key_head):
            some = slice(first, first + per_key_head)
            if _all_equal(lo[own, some], hi[own, some]):
                yield group(rows, some)
            else:
                yield from (group(rows, slice(h, h + 1)) for h in range(some.start, some.stop))


def _turns(group: _Group, math: PanelMath, x: torch.Tensor) -> Iterator[tuple[Tile, int]]:
    """Tiles of a group, and which of X to take: repetitions go through a panel together, for one of X at a time."""
    for tile in plan_tiles(group.lo, group.hi, math.sizes_for(x.shape[0] * x.shape[1])):
        for turn in range(1 if tile.repeats == 1 else x.shape[0]):
            yield tile, turn


def _rows(x: torch.Tensor, tile: Tile, turn: int) -> torch.Tensor:
    """View the rows of a tile in [X, Y, Tq, ...] as [X, Y, rows, ...], or if repeated as [Y, repeats, rows, ...]."""
    if tile.repeats == 1:
        return x[:, :, tile.rows]
    height = _length(tile.rows)
    every = slice(tile.rows.start, tile.rows.start + height * tile.repeats)
    return x[turn, :, every].unflatten(1, (tile.repeats, height))


def _keys(x: torch.Tensor, tile: Tile, keys: slice, turn: int) -> torch.Tensor:
    """View keys in [X, Y, Tk, D] as [X, Y, keys, D], or if repeated, shifted by a tile each, [Y, repeats, keys, D]."""
    if tile.repeats == 1:
        return x[:, :, keys]
    height = _length(tile.rows)
    every = slice(keys.start, keys.stop + height * (tile.repeats - 1))
    return x[turn, :, every].unfold(1, _length(keys), height).transpose(2, 3)


def _mask_maker(like: torch.Tensor) -> Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return a function of a group, rows and a panel: what to add to the scores [rows, keys], which rows see nothing.

    None stands for nothing to add and for no such row. Regular bounds (diagonals, windows, segments of any length)
    need the same few masks over and over, so the latest are kept.
    """

    @lru_cache(maxsize=16)
    def make(bounds: tuple[int, ...], keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        column = torch.arange(keys, device=like.device)
        first, end = torch.tensor(bounds, device=like.device).view(2, -1, 1)
        hidden = (column < first).logical_or_(column >= end)
        empty = (first >= end).squeeze(-1)
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf), empty if empty.any() else None

    def mask(group: _Group, rows: slice, panel: Panel) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if panel.kind != "masked":
            return None, None
        return make(group.bounds(rows, panel.keys), _length(panel.keys))

    return mask


def _add_to_keys(total: torch.Tensor, part: torch.Tensor, tile: Tile, keys: slice, turn: int) -> None:
    """Add the gradient of a panel's keys to that of all keys [X, 1 or Y, Tk, D].

    Repetitions overlap in their keys, but not within as many keys as they are apart.
    """
    step = _length(keys) if tile.repeats == 1 else _length(tile.rows)
    for start in range(keys.start, keys.stop, step):
        some = slice(start, min(start + step, keys.stop))
        view = _keys(total, tile, some, turn)
        view += part[:, :, some.start - keys.start : some.stop - keys.start].sum_to_size(view.shape)


def _merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine the output and logsumexp of two disjoint sets of keys; a row that sees neither stays 0 and -inf."""
    total = torch.logaddexp(first[1], second[1])
    share = torch.sigmoid(second[1] - first[1]).masked_fill_(total.isneginf(), 0.0)
    return first[0].lerp_(second[0], share.unsqueeze(-1)), total


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the last axis with zeros, which changes no score and no output; without copying where nothing is missing."""
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    # Panels want unit stride along the last axis, and padding keeps whatever order of axes it finds.
    return x if x.stride(-1) == 1 else x.contiguous()


def _all_equal(lo: torch.Tensor, hi: torch.Tensor) -> bool:
    return bool((lo == lo[:1, :1]).all() and (hi == hi[:1, :1]).all())


def _length(x: slice) -> int:
    return x.stop - x.start
