"""Compute bounded attention tile by tile, in memory linear in the length (FlashAttention-2, Dao 2023, in torch).

Forward, each tile of query rows goes through the panels of keys it sees, and panels are merged through their logsumexp.
Backward, each panel recomputes its weights from the logsumexp L, independently of the others:

    P = exp(S - L)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q
    delta_i = o_i . dO_i - dL_i

The gradient dL of the logsumexp costs one subtraction. Here it is one more value column (v = 0, dO = 1, o = -dL), so
that panels need not know of it.

Batch rows and heads with equal bounds go through a panel together; those whose bounds differ take turns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch.nn import functional as F

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.panels import PanelMath, panel_math
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.attention.tiling import Panel, Tile, plan_blocks, plan_tiles

_MASKS_KEPT = 16


def blocked_forward(inputs: Inputs, math: PanelMath | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, Tq, Hq, Dv] and the logsumexp [B, Tq, Hq].

    Args:
        inputs: the call; its pattern must have bounds.
        math: how to compute a panel; None for what suits the device.
    """
    query, key, value, pattern, scale = inputs.query, inputs.key, inputs.value, inputs.pattern, inputs.scale
    math = math or panel_math(query.device)
    query = take_rows(query, pattern.query_rows)
    key, value = (take_rows(x, pattern.key_rows) for x in (key, value))
    value_dim = value.shape[-1]
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(*query.shape[:-1], value_dim)
    logsumexp = query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
    width = max(query.shape[-1], value_dim)
    query, key, value = (widened(x.to(exact), width) for x in (query, key, value))
    plan = Plan(pattern, query, key, math)

    for group in plan.groups():
        q, out, lse = (group.query_rows(x) for x in (query, output, logsumexp))
        k, v = (group.key_rows(x).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in plan.turns(group):
            parts, rows = [], tile_rows(q, tile, turn)
            for panel in tile.panels:
                mask, empty = plan.mask(group, tile, panel, turn)
                panel_k, panel_v = (tile_keys(x, tile, panel.keys, turn) for x in (k, v))
                part, part_lse = math.forward(rows, panel_k, panel_v, scale, panel.kind == "causal", mask)
                parts.append((part, part_lse if empty is None else part_lse.masked_fill(empty, -torch.inf)))
            merged, merged_lse = reduce(_merge, parts)
            tile_rows(out, tile, turn).copy_(merged[..., :value_dim])
            tile_rows(lse, tile, turn).copy_(merged_lse)
    return put_rows(output, pattern.query_rows), put_rows(logsumexp, pattern.query_rows)


def blocked_backward(
    inputs: Inputs,
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    math: PanelMath | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes.

    Args:
        inputs, math: as in `blocked_forward`.
        grad_output: [B, Tq, Hq, Dv].
        grad_logsumexp: [B, Tq, Hq], or None for zero; its values in rows that see nothing are not used.
        output, logsumexp: what the forward returned.
    """
    query, key, value, pattern, scale = inputs.query, inputs.key, inputs.value, inputs.pattern, inputs.scale
    math = math or panel_math(query.device)
    key, value = (take_rows(x, pattern.key_rows) for x in (key, value))
    query, output, logsumexp, grad_output = (
        take_rows(x, pattern.query_rows) for x in (query, output, logsumexp, grad_output)
    )
    if grad_logsumexp is not None:
        grad_logsumexp = take_rows(grad_logsumexp, pattern.query_rows)
    head_dim, value_dim, dtype = query.shape[-1], value.shape[-1], query.dtype
    empty = logsumexp.isneginf()
    logsumexp = logsumexp.masked_fill(empty, 0.0)
    width = max(head_dim, value_dim + (grad_logsumexp is not None))
    query, key, value, output, grad_output = (
        widened(x.to(logsumexp.dtype), width) for x in (query, key, value, output, grad_output)
    )
    if grad_logsumexp is not None:
        grad_output[..., value_dim] = 1.0
        output[..., value_dim] = -grad_logsumexp.masked_fill(empty, 0.0)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    plan = Plan(pattern, query, key, math)

    for group in plan.groups():
        row_inputs = [group.query_rows(x) for x in (grad_output, output, logsumexp, query)]
        grad_q, grad_k, grad_v = group.query_rows(grad_query), group.key_rows(grad_key), group.key_rows(grad_value)
        k, v = (group.key_rows(x).expand(-1, grad_q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in plan.turns(group):
            rows = [tile_rows(x, tile, turn) for x in row_inputs]
            for panel in tile.panels:
                mask, _ = plan.mask(group, tile, panel, turn)
                panel_k, panel_v = (tile_keys(x, tile, panel.keys, turn) for x in (k, v))
                parts = math.backward(*rows, panel_k, panel_v, scale, panel.kind == "causal", mask)
                tile_rows(grad_q, tile, turn).add_(parts[0])
                add_to_keys(grad_k, parts[1], tile, panel.keys, turn)
                add_to_keys(grad_v, parts[2], tile, panel.keys, turn)
    return (
        put_rows(grad_query[..., :head_dim].to(dtype), pattern.query_rows).contiguous(),
        put_rows(grad_key[..., :head_dim].to(dtype), pattern.key_rows).contiguous(),
        put_rows(grad_value[..., :value_dim].to(dtype), pattern.key_rows).contiguous(),
    )


@dataclass
class _Group:
    """Batch rows and heads that share their bounds, and the views [X, Y, T, ...] in which panels see them.

    X and Y are batch and head. Where several query heads read one key head, they are key head and query head within it,
    for one batch row at a time, so that keys expand along Y without a copy.

    Attributes:
        lo, hi: int32 [Tq], the shared bounds, on the CPU.
        batch: the batch rows.
        heads: the query heads.
        key_heads: the key heads that these read.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    batch: slice
    heads: slice
    key_heads: slice

    def query_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, Tq, Hq, ...] as a view [X, Y, Tq, ...]."""
        x = x[self.batch, :, self.heads].transpose(1, 2)
        return x[0].unflatten(0, (length_of(self.key_heads), -1)) if self.grouped() else x

    def key_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, Tk, Hkv, D] as a view [X, 1 or Y, Tk, D]."""
        x = x[self.batch, :, self.key_heads].transpose(1, 2)
        return x[0].unsqueeze(1) if self.grouped() else x

    def bounds(self, rows: slice, keys: slice) -> tuple[int, ...]:
        """Return the bounds of some rows relative to some keys, and cut off at these: all `lo`, then all `hi`."""
        bounds = torch.stack([self.lo[rows], self.hi[rows]]).sub_(keys.start).clamp_(0, length_of(keys))
        return tuple(bounds.flatten().tolist())

    def grouped(self) -> bool:
        """Say whether several query heads read one key head."""
        return length_of(self.heads) > length_of(self.key_heads)


class Plan:
    """The plan of a call: the groups of heads, the tiles of each group, and the mask of each panel."""

    def __init__(self, pattern: Pattern, query: torch.Tensor, key: torch.Tensor, math: PanelMath) -> None:
        self.pattern, self.math, self.like = pattern, math, query
        self.lo, self.hi = (x.cpu() for x in torch.broadcast_tensors(*pattern.bounds()))
        self.batch, self.queries, self.heads, _ = query.shape
        self.keys, self.key_heads = key.shape[1:3]
        # The latest masks by bounds, in a dict, because a cached method would keep this plan and its tensors alive.
        self._masks: dict[tuple[tuple[int, ...], int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def groups(self) -> Iterator[_Group]:
        """Yield groups of batch rows and heads with equal bounds, as large as the views allow."""
        lo, hi, per_key_head = self.lo, self.hi, self.heads // self.key_heads
        together = per_key_head == 1 and _all_equal(lo, hi)
        for rows in [slice(0, self.batch)] if together else [slice(b, b + 1) for b in range(self.batch)]:
            own = slice(0, 1) if lo.shape[0] == 1 else rows
            if _all_equal(lo[own], hi[own]):
                yield self._group(rows, slice(0, self.heads))
                continue
            for first in range(0, self.heads, per_key_head):
                some = slice(first, first + per_key_head)
                if _all_equal(lo[own, some], hi[own, some]):
                    yield self._group(rows, some)
                else:
                    yield from (self._group(rows, slice(h, h + 1)) for h in range(some.start, some.stop))

    def _group(self, rows: slice, heads: slice) -> _Group:
        row, head = min(rows.start, self.lo.shape[0] - 1), min(heads.start, self.lo.shape[1] - 1)
        per_key_head = self.heads // self.key_heads
        read = slice(heads.start // per_key_head, -(-heads.stop // per_key_head))
        return _Group(self.lo[row, head], self.hi[row, head], rows, heads, read)

    def turns(self, group: _Group) -> Iterator[tuple[Tile, int]]:
        """Yield each tile of a group, and which of X to take.

        A tile takes all of X at once. The repetitions of a tile go through a panel together, for one of X at a time.
        """
        outer = length_of(group.key_heads if group.grouped() else group.batch)
        for tile in self._tiles(group, length_of(group.batch) * length_of(group.heads)):
            for turn in range(1 if tile.repeats == 1 else outer):
                yield tile, turn

    def _tiles(self, group: _Group, heads: int) -> Iterator[Tile]:
        sizes = self.math.sizes_for(heads)
        if self.pattern.alibi_slopes is not None:
            # Every panel needs its own bias, so none may be large.
            sizes = replace(sizes, whole_rows=None, full_keys=sizes.masked_keys)
        if self.pattern.blocks is None:
            return plan_tiles(group.lo, group.hi, sizes)
        return plan_blocks(group.lo, group.hi, sizes, self.pattern.blocks, self.keys)

    def mask(
        self, group: _Group, tile: Tile, panel: Panel, turn: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what to add to a panel's scores, and which of its rows see nothing.

        The first is [rows, keys] or [X, Y, rows, keys], or None if there is nothing to add. The second is [rows], or
        None if every row sees a key.
        """
        hidden, empty = None, None
        if panel.kind == "masked":
            hidden, empty = self._visibility(group.bounds(tile.rows, panel.keys), length_of(panel.keys))
        if self.pattern.alibi_slopes is None:
            return hidden, empty
        bias = self._alibi(group, tile, panel, turn)
        return bias if hidden is None else bias.add_(hidden), empty

    def _visibility(self, bounds: tuple[int, ...], keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return 0 or -inf for each row and key, and which rows see nothing; None if each sees a key.

        The latest results are kept, since regular bounds need the same few again and again.
        """
        if (bounds, keys) not in self._masks:
            if len(self._masks) == _MASKS_KEPT:
                del self._masks[next(iter(self._masks))]
            device = self.like.device
            column = torch.arange(keys, device=device)
            first, end = torch.tensor(bounds, device=device).view(2, -1, 1)
            hidden = (column < first).logical_or_(column >= end)
            empty = (first >= end).squeeze(-1)
            mask = self.like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self._masks[bounds, keys] = mask, empty if empty.any() else None
        return self._masks[bounds, keys]

    def _alibi(self, group: _Group, tile: Tile, panel: Panel, turn: int) -> torch.Tensor:
        slopes, row, column = self._alibi_rows
        slope, row = (tile_rows(group.query_rows(x), tile, turn).unsqueeze(-1) for x in (slopes, row))
        column = group.key_rows(column).expand(-1, row.shape[1] if tile.repeats == 1 else -1, -1, -1)
        return (tile_keys(column, tile, panel.keys, turn).mT - row).mul_(slope)

    @cached_property
    def _alibi_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the slope and the position of each row, [B, Tq, Hq], and the position of each key, [B, Tk, Hkv, 1]."""
        pattern, like = self.pattern, self.like
        assert pattern.alibi_slopes is not None
        row, column = (torch.arange(n, device=like.device)[None, None] for n in (self.queries, self.keys))
        row = (row if pattern.query_rows is None else pattern.query_rows) + (self.keys - self.queries)
        column = column if pattern.key_rows is None else pattern.key_rows
        row, column = (x.to(like.dtype).transpose(1, 2) for x in (row, column))
        rows = self.batch, self.queries, self.heads
        column = column.expand(self.batch, self.keys, self.key_heads).unsqueeze(-1)
        return pattern.alibi_slopes.to(like.dtype).expand(rows), row.expand(rows), column


def tile_rows(x: torch.Tensor, tile: Tile, turn: int) -> torch.Tensor:
    """Return the rows of a tile in [X, Y, Tq, ...] as a view [X, Y, rows, ...].

    If the tile is repeated, the view is [Y, repeats, rows, ...].
    """
    if tile.repeats == 1:
        return x[:, :, tile.rows]
    height = length_of(tile.rows)
    every = slice(tile.rows.start, tile.rows.start + height * tile.repeats)
    return x[turn, :, every].unflatten(1, (tile.repeats, height))


def tile_keys(x: torch.Tensor, tile: Tile, keys: slice, turn: int) -> torch.Tensor:
    """Return some keys in [X, Y, Tk, D] as a view [X, Y, keys, D].

    If the tile is repeated, the view is [Y, repeats, keys, D]; the next repetition begins a tile's rows further right.
    """
    if tile.repeats == 1:
        return x[:, :, keys]
    height = length_of(tile.rows)
    every = slice(keys.start, keys.stop + height * (tile.repeats - 1))
    return x[turn, :, every].unfold(1, length_of(keys), height).transpose(2, 3)


def add_to_keys(total: torch.Tensor, part: torch.Tensor, tile: Tile, keys: slice, turn: int) -> None:
    """Add the gradient of a panel's keys to that of all keys [X, 1 or Y, Tk, D].

    Repetitions share keys, so one addition may take only as many keys as repetitions are apart: among these, no key
    occurs twice.
    """
    step = length_of(keys) if tile.repeats == 1 else length_of(tile.rows)
    for start in range(keys.start, keys.stop, step):
        some = slice(start, min(start + step, keys.stop))
        view = tile_keys(total, tile, some, turn)
        view += part[:, :, some.start - keys.start : some.stop - keys.start].sum_to_size(view.shape)


def _merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and logsumexp of two disjoint sets of keys together; a row that sees neither stays 0 and -inf."""
    total = torch.logaddexp(first[1], second[1])
    share = torch.sigmoid(second[1] - first[1]).masked_fill_(total.isneginf(), 0.0)
    return first[0].lerp_(second[0], share.unsqueeze(-1)), total


def widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return x with its last axis padded with zeros, which changes no score and no output, and with unit stride.

    Nothing is copied where nothing has to change.
    """
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    # Panels want unit stride along the last axis, and padding keeps whatever order of axes it finds.
    return x if x.stride(-1) == 1 else x.contiguous()


def _all_equal(lo: torch.Tensor, hi: torch.Tensor) -> bool:
    return bool((lo == lo[:1, :1]).all() and (hi == hi[:1, :1]).all())


def length_of(x: slice) -> int:
    """Return how many rows or keys a slice has."""
    return x.stop - x.start
