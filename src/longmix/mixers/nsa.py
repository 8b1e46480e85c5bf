"""Native sparse attention (Yuan et al. 2025, arXiv 2502.11089): compressed blocks, chosen blocks and a window.

    kc_b, vc_b = phi_k, phi_v of the tokens of block b           `compress_block` tokens, every `compress_stride`, eq. 7
    p_i        = softmax over the compressed blocks that end at i or before it, of q_i . kc_b / sqrt(d)            eq. 8
    m_i(s)     = sum of p_i(b) over pairs of a part of `compress_stride` tokens and a compressed block b with it,
                 for the parts of block s, and over the query heads that share a key head                  eq. 9 and 10
    I_i        = the first block, the last `local`, the own one among them, and those with the highest m_i(s), together
                 `blocks` blocks of `block` tokens                                                        eq. 11 and 12
    y_i        = g1 sum_b p_i(b) vc_b + g2 attention(i, I_i) + g3 attention(i, the last `window`),  g = sigmoid(W x_i)

Each part has keys, values and sink logits of its own, and every head its own gates. Everything is counted from the
first token of each document. The choice has no gradient, as published: the compressed blocks learn from their part of
the output.

What the paper leaves open: phi is a network of two layers, with a learned vector for each place in a block. Compressed
keys are of unrotated keys, and meet unrotated queries, since a block has no one position; with `qk_norm` they have a
norm of their own. Of importances whose logarithms are equal to 2^-10 the earlier block wins, however rows are cut. A
token before the end of the first compressed block gets nothing from that part.

A step of decoding reads the compressed keys and values, the chosen blocks and the window. The state has the three
parts' keys and values of all tokens too, so that any number of tokens can go on from it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import AttentionState, Rows, continued, with_sinks
from longmix.mixers.parts.base import COUNT, TOKENS, Mixer, ModelShape, at_most
from longmix.mixers.parts.block_choice import chosen_blocks, gathered, listed_rows
from longmix.mixers.parts.block_compression import BlockCompression
from longmix.mixers.parts.block_states import NSAState
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.head_gates import sink_logit_of
from longmix.mixers.parts.head_options import HeadNorm, HeadOptions, Selection
from longmix.mixers.parts.layout import Layout
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.scatterbrain_summaries import Part
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.step_sums import summed
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import (
    KeyBlocks,
    attention,
    attention_to_blocks,
    key_blocks,
    merge,
    positions_from_document_ids,
)

COMPRESSED, CHOSEN, WINDOW = range(3)
"""The parts, in the order in which keys, values and gates have them."""


_ALIKE = 2.0**-10
"""Resolution of the logarithm of an importance to the base 2: far above the rounding of float32, so that blocks of the
same text stay equal however many tokens are computed at once."""


class NSA(SoftmaxAttention):
    """Native sparse attention. The head of this file has the equations.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        block: tokens of a block that is chosen.
        blocks: blocks that a query sees, the first and the local ones among them.
        local: latest blocks that it sees in any case, its own included.
        compress_block: tokens of a compressed block.
        compress_stride: tokens from one compressed block to the next, a divisor of `compress_block` and `block`.
        compress_hidden: channels between the two layers that compress; None for those of a head.
        window: latest tokens that a query sees, its own included.

    Raises:
        ConfigError: naming the setting.
    """

    pairwise = True
    takes_sink_logits = True
    refused: ClassVar = {"bias": "a compressed block has no one place, so that no bias of two tokens is its own"}
    sizes: ClassVar = {"compress_stride": 1, "compress_block": 1, "block": 1, "window": 1}
    small: ClassVar = {"blocks": 4}
    changeable: ClassVar = (*SoftmaxAttention.changeable, "block", "blocks", "local", "window")

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        block: int = 64,
        blocks: int = 16,
        local: int = 2,
        compress_block: int = 32,
        compress_stride: int = 16,
        compress_hidden: int | None = None,
        window: int = 512,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        at_most(TOKENS, block=block, window=window, compress_block=compress_block, compress_stride=compress_stride)
        at_most(COUNT, blocks=blocks, local=local, compress_hidden=compress_hidden)
        self.block, self.blocks, self.local, self.window = block, blocks, local, window
        self.compress_block, self.compress_stride = compress_block, compress_stride
        hidden = self.head_dim if compress_hidden is None else compress_hidden
        self._check(hidden)
        kv_width = self.num_kv_heads * self.head_dim
        self.key, self.value = (nn.Linear(self.d_model, 3 * kv_width, bias=False) for _ in range(2))
        for projection in (self.key, self.value):
            nn.init.normal_(projection.weight, std=self.d_model**-0.5)
        self.compress_key, self.compress_value = (
            BlockCompression(self.head_dim, compress_block, hidden) for _ in range(2)
        )
        normed = not isinstance(self.key_norm, nn.Identity)
        self.compressed_norm = HeadNorm(self.head_dim, eps=shape.norm_eps) if normed else nn.Identity()
        if self.sink_logit is not None:
            self.sink_logit = sink_logit_of(3 * self.num_heads)
        self.gate = nn.Linear(self.d_model, 3 * self.num_heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        set_recipe(self.gate.weight, Recipe("scalar"))

    def _check(self, hidden: int) -> None:
        for name in ("block", "local", "window", "compress_block", "compress_stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mixer.{name}={getattr(self, name)} must be at least 1.")
        if hidden < 1:
            raise ConfigError(f"mixer.compress_hidden={hidden} must be at least 1, or null for the channels of a head.")
        if self.blocks <= self.local:
            raise ConfigError(
                f"mixer.blocks={self.blocks} must exceed mixer.local={self.local}: the first block is seen besides."
            )
        if self.compress_block > self.block:
            raise ConfigError(
                f"mixer.compress_block={self.compress_block} must be at most mixer.block={self.block}: a block is "
                "chosen by the compressed blocks in it."
            )
        for name in ("compress_block", "block"):
            if getattr(self, name) % self.compress_stride:
                raise ConfigError(
                    f"mixer.compress_stride={self.compress_stride} must divide mixer.{name}={getattr(self, name)}."
                )

    def taken_from(self, teacher: Mixer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Mixer.taken_from`; keys and values of another mixer are those of all three parts."""
        rows, wide = self.key.weight.shape[0], dict(weights)
        for name in ("key.weight", "value.weight"):
            if name in weights and 3 * len(weights[name]) == rows:
                wide[name] = weights[name].repeat(3, 1)
        return super().taken_from(teacher, wide)

    def value_path(self) -> None:
        """There is none: compressed values are no linear map of values."""

    def engine_window(self) -> int:
        """The window."""
        return self.window

    def select(self, x: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> Selection:
        """The gates of the three parts, [B, T, H, 3], as labels of the queries."""
        return Selection(query_labels=exact_linear(self.gate, x).unflatten(-1, (self.num_heads, 3)).sigmoid())

    def place(
        self, x: Tensor, query: Tensor, key: Tensor, layout: Layout, state: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries unrotated and rotated [B, T, 2 * H, head_dim]; keys rotated, but for those to be compressed."""
        raw, rest = key[:, :, : self.num_kv_heads], key[:, :, self.num_kv_heads :]
        turned, rest, carried = super().place(x, query, rest, layout, state)
        return torch.cat((query.to(turned.dtype), turned), 2), torch.cat((raw.to(rest.dtype), rest), 2), carried

    def _part(self, x: Tensor, part: int) -> Tensor:
        """The keys or values [B, T, Hkv, head_dim] of a part."""
        return x[:, :, part * self.num_kv_heads : (part + 1) * self.num_kv_heads]

    def compressed(self, rows: Rows) -> tuple[Tensor, Tensor, KeyBlocks]:
        """Keys and values [B, N, Hkv, head_dim] of the compressed blocks of each document, and where they are."""
        sizes = {"stride": self.compress_stride, "document_ids": rows.document_ids}
        table = key_blocks(rows.key.shape[1], self.compress_block, **sizes, device=rows.key.device)  # type: ignore[arg-type]
        return *self._compress(*(table.rows(self._part(x, COMPRESSED)) for x in (rows.key, rows.value))), table

    def _compress(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One key and one value for each of the blocks [B, N, compress_block, Hkv, head_dim]."""
        found: Tensor = self.compressed_norm(self.compress_key(key))
        return found.to(key.dtype), self.compress_value(value).to(value.dtype)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """The three parts, each with its gates."""
        return self._attend(rows, *self.compressed(rows)), {}

    def _attend(self, rows: Rows, key: Tensor, value: Tensor, compressed: KeyBlocks) -> Tensor:
        queries, keys = rows.query.shape[1], rows.key.shape[1]
        last = slice(keys - queries, None)
        raw, query = rows.query.split(self.num_heads, 2)
        row = torch.arange(keys, dtype=torch.int32, device=query.device)[None]
        position = row if rows.document_ids is None else positions_from_document_ids(rows.document_ids)
        chosen_key, chosen_value = (self._part(x, CHOSEN) for x in (rows.key, rows.value))
        first_local = (position // self.block - (self.local - 1)).clamp(min=0)
        lo = (row - position + first_local * self.block)[:, None, last].contiguous()
        hi = (row + 1)[:, None, last].expand_as(lo).contiguous()
        near = _attention(query, chosen_key, chosen_value, lo=lo, hi=hi)
        window_key, window_value = (self._part(x, WINDOW) for x in (rows.key, rows.value))
        window = _attention(query, window_key, window_value, **rows.bounds(self.window))
        if key.shape[1] == 0:
            return self._gated(rows, _nothing_like(window), near, window)
        first, seen = compressed.first[:, last], compressed.ended[:, last]
        lo, hi = (x[:, None].contiguous() for x in (first, first + seen))
        coarse = _attention(raw, key, value, lo=lo, hi=hi)
        table = key_blocks(keys, self.block, document_ids=rows.document_ids, device=query.device)
        if table.starts.shape[1] == 0:
            return self._gated(rows, coarse, near, window)
        begin = table.first[:, last]
        parts = self._parts_of(compressed, table)
        runs = (first, first + seen), (begin, begin + first_local[:, last])
        chosen = self._chosen(raw, key, coarse[1], *runs, parts)
        far = attention_to_blocks(query, chosen_key, chosen_value, chosen, table)
        return self._gated(rows, coarse, merge([near, far]), window)

    def _gated(self, rows: Rows, *parts: Part) -> Tensor:
        assert rows.query_labels is not None
        gates = rows.query_labels.to(parts[0][0].dtype).unsqueeze(-2)
        sinks = [None] * 3 if rows.sinks is None else rows.sinks.chunk(3)
        found = [with_sinks(*part, sink) for part, sink in zip(parts, sinks, strict=True)]
        return sum((part * gates[..., n] for n, part in enumerate(found)), torch.zeros_like(found[0]))

    def _parts_of(self, compressed: KeyBlocks, table: KeyBlocks) -> Tensor:
        """The compressed block [B or 1, N] that begins where each block of the table does, in their own numbers."""
        keys = table.first.shape[1]
        start = table.starts.clamp(max=keys - 1).long()
        batch = max(len(start), len(table.first))
        first, begin = (x.expand(batch, -1).gather(1, start.expand(batch, -1)) for x in (table.first, compressed.first))
        number = torch.arange(start.shape[1], device=start.device) - first
        return begin + number * (self.block // self.compress_stride)

    @torch.no_grad()
    def _chosen(
        self,
        query: Tensor,
        key: Tensor,
        logsumexp: Tensor,
        seen: tuple[Tensor, Tensor],
        allowed: tuple[Tensor, Tensor],
        parts: Tensor,
    ) -> Tensor:
        """The blocks besides the local ones, int64 [B, Tq, Hkv, blocks - local].

        Args:
            query: unrotated, [B, Tq, H, head_dim].
            key: of the compressed blocks, [B, Nc, Hkv, head_dim].
            logsumexp: of the scores between them, [B, Tq, H].
            seen: the first compressed block that a query sees, and one past the last, [B or 1, Tq].
            allowed: the same of the blocks that it may choose.
            parts: see `_parts_of`.
        """
        exact = torch.promote_types(query.dtype, torch.float32)
        number = torch.arange(key.shape[1], device=key.device)
        wide = key.to(exact)

        def scores_of(some: slice) -> Tensor:
            part = query[:, some].to(exact).unflatten(2, (self.num_kv_heads, -1))
            with torch.autocast(query.device.type, enabled=False):
                scores = torch.einsum("bthgd,bnhd->bthgn", part, wide) * self.head_dim**-0.5
            visible = (number >= seen[0][:, some, None]) & (number < seen[1][:, some, None])
            weights = (scores - logsumexp[:, some].unflatten(2, (self.num_kv_heads, -1)).unsqueeze(-1)).exp()
            weights = weights.masked_fill(~visible[:, :, None, None], 0.0).sum(3)
            importance = rounded(self._importance(weights, parts))
            # The first block of the document is seen in any case.
            block = torch.arange(importance.shape[-1], device=importance.device)
            return importance.masked_fill(block == allowed[0][:, some, None, None], torch.inf)

        at_once = query.shape[0] * query.shape[2] * key.shape[1]
        return chosen_blocks(scores_of, query.shape[1], *allowed, self.blocks - self.local, at_once)

    def _importance(self, weights: Tensor, parts: Tensor) -> Tensor:
        """Equation 9: weights [B, T, Hkv, Nc] of the compressed blocks as those of the blocks, [B, T, Hkv, N]."""
        inside, across = self.block // self.compress_stride, self.compress_block // self.compress_stride
        count = weights.shape[-1]
        total = weights.new_zeros(*weights.shape[:-1], parts.shape[-1])
        for offset in range(1 - across, inside):
            times = min(inside - 1, offset + across - 1) - max(0, offset) + 1
            place = parts + offset
            there = (place >= 0) & (place < count)
            index = place.clamp(0, count - 1)[:, None, None].expand(*total.shape)
            total = total + times * weights.gather(-1, index) * there[:, None, None]
        return total

    def attend_from(self, rows: Rows, state: Any, next_position: Tensor) -> tuple[Tensor, dict[str, Metric], Any]:
        """Continue from a state; a single token reads the compressed blocks, those that it chooses, and the window."""
        rows = continued(rows, state.seen)
        seen = self._kept(rows, next_position)
        if rows.query.shape[1] == 1:
            key, value = self._compressed_after(state, rows, next_position)
            return self._step(rows, key, value, next_position - 1), {}, NSAState(seen, key, value)
        key, value, table = self.compressed(rows)
        mixed = self._attend(rows, key, value, table)
        count = rows.key.shape[1] // self.compress_stride
        number = torch.arange(count, device=key.device)
        place = (table.first[:, -1:] + number).clamp(max=max(key.shape[1] - 1, 0)).long().expand(len(key), -1)
        there = (number < table.ended[:, -1:])[:, :, None, None]
        if key.shape[1]:
            index = place[:, :, None, None].expand(-1, -1, *key.shape[2:])
            key, value = (x.gather(1, index) * there for x in (key, value))
        else:
            key, value = (F.pad(x, (0, 0, 0, 0, 0, count)) for x in (key, value))
        return mixed, {}, NSAState(seen, key, value)

    def _compressed_after(self, state: NSAState, rows: Rows, next_position: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed blocks with the one that the last token ends, where it ends one."""
        keys, size, stride = rows.key.shape[1], self.compress_block, self.compress_stride
        more = keys // stride - state.key.shape[1]
        found = [F.pad(x.to(rows.key.dtype), (0, 0, 0, 0, 0, more)) for x in (state.key, state.value)]
        count = ((next_position + (stride - size)).clamp(min=0) // stride)[:, None]
        number = torch.arange(found[0].shape[1], device=count.device)
        if keys >= size:
            latest = [self._part(x, COMPRESSED)[:, None, keys - size :] for x in (rows.key, rows.value)]
            ends = (number == count - 1) & ((next_position[:, None] - size) % stride == 0)
            pairs = zip(self._compress(*latest), found, strict=True)
            found = [torch.where(ends[:, :, None, None], new, old) for new, old in pairs]
        there = (number < count)[:, :, None, None]  # a new document has none of the one before
        return found[0] * there, found[1] * there

    def _step(self, rows: Rows, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """The output [B, 1, H, head_dim] of one query a row, at a position [B] of its document."""
        raw, query = rows.query.split(self.num_heads, 2)
        keys = rows.key.shape[1]
        first = keys - 1 - position
        recent = [self._part(x, WINDOW)[:, -self.window :] for x in (rows.key, rows.value)]
        lo = (first - (keys - recent[0].shape[1])).clamp(min=0).int()[:, None, None]
        window = _attention(query, *recent, lo=lo, hi=torch.full_like(lo, recent[0].shape[1]))
        coarse, chosen = _nothing_like(window), query.new_empty(len(query), self.num_kv_heads, 0, dtype=torch.int64)
        first_local = (position // self.block - (self.local - 1)).clamp(min=0)
        blocks = keys // self.block
        if key.shape[1]:
            count = ((position + (1 + self.compress_stride - self.compress_block)).clamp(min=0)) // self.compress_stride
            none = torch.zeros_like(count)[:, None]
            lo, hi = none[:, None].int(), count[:, None, None].int()
            coarse = _attention(raw, key, value, lo=lo, hi=hi)
            if blocks:
                parts = torch.arange(blocks, device=key.device)[None] * (self.block // self.compress_stride)
                runs = (none, count[:, None]), (none, first_local[:, None])
                chosen = self._chosen(raw, key, coarse[1], *runs, parts)[:, 0]
        tail, length = first + first_local * self.block, self.local * self.block
        places, lo = listed_rows(chosen, blocks, first, self.block, tail, length)
        near = [gathered(self._part(x, CHOSEN), places) for x in (rows.key, rows.value)]
        hi = (places.shape[-1] - length + keys - tail[:, None]).int().expand_as(lo)
        lo, hi = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 1)[..., None] for x in (lo, hi))
        return self._gated(rows, coarse, _attention(query, *near, lo=lo.contiguous(), hi=hi.contiguous()), window)

    def state_type(self) -> type:
        """The class of the state."""
        return NSAState

    def init_state(self, batch: int) -> Any:
        """An empty cache without blocks."""
        weight = self.value.weight
        empty, none = (weight.new_empty(batch, 0, n * self.num_kv_heads, self.head_dim) for n in (3, 1))
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return NSAState(AttentionState(empty, empty, None, None, position, self.carried_before(batch)), none, none)

    def _row_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.value.weight.element_size()

    def state_bytes(self, length: int) -> int:
        """Bytes of the three parts' keys and values, and of the compressed ones, of one row after `length` tokens."""
        return (3 * length + length // self.compress_stride) * self._row_bytes() + self.carried_bytes()

    def step_bytes(self, length: int) -> int:
        """Bytes of the compressed blocks, of those that are chosen, and of the window."""
        chosen = min(self.blocks * self.block, length + 1)
        seen = length // self.compress_stride + chosen + min(self.window, length + 1)
        return seen * self._row_bytes() + self.carried_bytes()

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes`."""
        seen = summed(length, steps, self.compress_stride)
        seen += sum(summed(length + 1, steps, most=most) for most in (self.blocks * self.block, self.window))
        return seen * self._row_bytes() + steps * self.carried_bytes()

    def _compressed_blocks(self, length: int) -> int:
        return max(0, (length - self.compress_block) // self.compress_stride + 1)

    def visible_pairs(self, length: int) -> int:
        """Of all three parts: compressed blocks that have ended, local and chosen blocks, and the window."""
        count, full = self._compressed_blocks(length), min(self.window, length)
        coarse = count * (length - self.compress_block + 1) - self.compress_stride * count * (count - 1) // 2
        window = full * (full + 1) // 2 + (length - full) * full
        whole, rest = divmod(length, self.block)
        triangles = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        most = self.blocks - 1
        some = min(whole, most)
        earlier = some * (some - 1) // 2 + (whole - some) * most
        return coarse + window + triangles + self.block * (earlier * self.block + min(whole, most) * rest)

    def choosing_flops(self, length: int) -> int:
        """Operations of the scores from which blocks are chosen, of which there is no gradient."""
        count = self._compressed_blocks(length) if length >= self.block else 0
        return 2 * length * count * self.num_heads * self.head_dim

    def flops(self, length: int) -> int:
        """The base's operations, and those of compressing and choosing."""
        count = self._compressed_blocks(length) * self.num_kv_heads
        networks = self.compress_key.flops(count) + self.compress_value.flops(count)
        return super().flops(length) + networks + self.choosing_flops(length)


def rounded(importance: Tensor) -> Tensor:
    """What stands for importances where they are compared: their logarithms, in whole steps of `_ALIKE`."""
    least = torch.finfo(importance.dtype).tiny
    return (importance.clamp(min=least).log2() / _ALIKE).round()


def _attention(query: Tensor, key: Tensor, value: Tensor, **bounds: Any) -> Part:
    """Output and logsumexp of a part."""
    return attention(query, key, value, **bounds, return_logsumexp=True)


def _nothing_like(part: Part) -> Part:
    """The part of a query that sees no key."""
    return torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf)
